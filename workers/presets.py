"""Which hyperparameters a model gets: the file of its family in `hparams/`, or a rule.

Torch-free. Knows the model by its `config.json` only, and nothing of what the values do.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from workers.contract import Hparams
from workers.errors import BadHparams
from workers.models import ModelFacts

logger = logging.getLogger(__name__)

PRESETS = Path(__file__).parent / "hparams"

_QWEN_DEPTH = 6 / 28
_QWEN_LEARNING_RATE = 5e-4
_DOWN_PROJECTION = {
    "qwen2_moe": "mlp.shared_expert.down_proj.weight",
    "qwen3_moe": "mlp.experts.down_proj",
    "gpt_oss": "mlp.experts.down_proj",
}


def load(facts: ModelFacts, override_file: Path | None, overrides: Mapping[str, Any]) -> Hparams:
    """The hyperparameters of a job.

    `override_file` takes the place of the family's file; `overrides` replace single fields of
    either. Raises `BadHparams` naming field, value and what is allowed.
    """
    if override_file is not None:
        source, values = str(override_file), _read(override_file, facts)
        if values is None:
            raise BadHparams(f"{override_file}: its `match` does not fit the model {facts.path}")
    else:
        source, values = _family(facts)
    return _validated(source, values, overrides)


def _family(facts: ModelFacts) -> tuple[str, dict[str, Any]]:
    for file in sorted(PRESETS.glob("*.yaml")):
        values = _read(file, facts)
        if values is not None:
            return file.name, values
    return "the proportional rule", _proportional(facts)


def _read(file: Path, facts: ModelFacts) -> dict[str, Any] | None:
    """The values in a file, or None if its `match` is of another model."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadHparams(f"{file}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise BadHparams(f"{file}: not valid YAML ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("match", {}), dict):
        raise BadHparams(f"{file}: must hold a mapping, and `match`, if any, another")
    match = values.pop("match", {})
    fits = all(facts.config.get(key) == value for key, value in match.items())
    return values if fits else None


def _proportional(facts: ModelFacts) -> dict[str, Any]:
    """The down-projection at the depth, in proportion, that the paper tunes in Qwen2.5-7B."""
    layer = round(facts.num_hidden_layers * _QWEN_DEPTH)
    projection = _DOWN_PROJECTION.get(facts.model_type, "mlp.down_proj.weight")
    name = f"model.layers.{layer}.{projection}"
    logger.warning(
        "no hyperparameters for %s (%d layers, hidden size %d): tuning %s, at the depth of the "
        "paper's Qwen2.5-7B, with its learning rate of %g, which is for models of 7B and more",
        facts.architecture,
        facts.num_hidden_layers,
        facts.hidden_size,
        name,
        _QWEN_LEARNING_RATE,
    )
    return {
        "parameters": [name],
        "learning_rate": _QWEN_LEARNING_RATE,
        "dtype": facts.dtype,
    }


def _validated(source: str, values: dict[str, Any], overrides: Mapping[str, Any]) -> Hparams:
    try:
        return Hparams.model_validate({**values, **overrides})
    except ValidationError as error:
        problems = "; ".join(_problem(entry, overrides, source) for entry in error.errors())
        raise BadHparams(problems) from error


def _problem(entry: Any, overrides: Mapping[str, Any], source: str) -> str:
    field = ".".join(str(part) for part in entry["loc"])
    origin = "" if entry["loc"] and entry["loc"][0] in overrides else f" (from {source})"
    if entry["type"] == "extra_forbidden":
        known = ", ".join(Hparams.model_fields)
        return f"hparams.{field}{origin}: no such hyperparameter; there are {known}"
    if entry["type"] == "missing":
        return f"hparams.{field}{origin}: required"
    return f"hparams.{field}{origin}: {entry['input']!r} is wrong: {entry['msg']}"
