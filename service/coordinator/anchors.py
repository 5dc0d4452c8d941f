"""The anchors file: general prompts whose answers a job can be told to keep."""

import random
from pathlib import Path

from service.coordinator import prompt_files
from service.errors import ConfigurationError
from workers.contract import LocalityProbe


def sample(file: Path | None, count: int, seed: str) -> list[LocalityProbe]:
    """`count` prompts of the file, or all if it has no more, drawn by `seed`.

    Raises `ConfigurationError` if there is no file, and as `prompt_files.read`.
    """
    if file is None:
        raise ConfigurationError(
            f"hparams.anchor_prompts is {count}, but there is no file to take them from; "
            "name one with ERRATA_ANCHORS, or use 0"
        )
    found = prompt_files.read(file, "anchors")
    return random.Random(seed).sample(found, min(count, len(found)))
