"""The anchors file: general prompts whose answers a job can be told to keep. Text only."""

import json
import random
from pathlib import Path

from pydantic import ValidationError

from service.errors import ConfigurationError
from workers.contract import LocalityProbe


def sample(file: Path | None, count: int, seed: str) -> list[LocalityProbe]:
    """`count` prompts of the file, or all if it has no more, drawn by `seed`.

    A line is a JSON object with `prompt` and, if known, `answer`, or else a prompt as it is; empty
    ones are passed over. Raises `ConfigurationError` naming the file and the line.
    """
    if file is None:
        raise ConfigurationError(
            f"hparams.anchor_prompts is {count}, but there is no file to take them from; "
            "name one with ERRATA_ANCHORS, or use 0"
        )
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigurationError(f"anchors: {file} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"anchors: {file} is not UTF-8 (byte {error.start}); convert it"
        ) from error
    found = [_probe(line, f"{file}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ConfigurationError(f"anchors: {file} has no prompts; one a line is expected")
    return random.Random(seed).sample(found, min(count, len(found)))


def _probe(line: str, place: str) -> LocalityProbe:
    if not line.lstrip().startswith("{"):
        return _storable(LocalityProbe(prompt=line.strip()), place)
    try:
        values = json.loads(line)
        probe = LocalityProbe(prompt=values["prompt"], answer=values.get("answer"))
    except KeyError as error:
        raise ConfigurationError(f"anchors: {place}: there is no `prompt`") from error
    except ValidationError as error:
        [first, *_] = error.errors()
        raise ConfigurationError(f"anchors: {place}: {first['loc'][0]}: {first['msg']}") from error
    except ValueError as error:
        raise ConfigurationError(f"anchors: {place}: not a JSON object ({error})") from error
    return _storable(probe, place)


def _storable(probe: LocalityProbe, place: str) -> LocalityProbe:
    """PostgreSQL holds neither NUL characters nor lone surrogates."""
    text = probe.prompt + (probe.answer or "")
    if not probe.prompt.strip():
        raise ConfigurationError(f"anchors: {place}: `prompt` is empty")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigurationError(
            f"anchors: {place}: holds a NUL character or half of a surrogate pair; remove it"
        )
    return probe
