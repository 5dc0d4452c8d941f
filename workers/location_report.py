"""What a location search found, as files: JSON, a picture, and hyperparameters. Torch-free."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from workers import heat_map, presets
from workers.contract import DType, Hparams, Record
from workers.location_choice import Agreement, Figures, Outcome, best_of_each
from workers.locations import Location
from workers.models import ModelFacts

_MATCH = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
"""What tells a model from others, as in `hparams/*.yaml`."""


class Scored(Record):
    location: Location
    score: float


class Training(Record):
    """How every location was trained, besides its learning rate."""

    batch_size: int
    max_epochs: int
    loss_threshold: float
    seed: int
    dtype: DType


class LocationReport(Record):
    """A search from its settings to its choice."""

    model: str
    """As it was named."""
    architecture: str
    source: str
    edits: int
    rephrases: int
    locality_prompts: int
    training: Training
    rule: str
    margin: float
    skipped: tuple[str, ...]
    """A line on each kind of module that some layers do not have."""
    before: Figures
    """Of the unedited model."""
    outcomes: tuple[Outcome, ...]
    """Best first; those that failed last."""
    chosen: Outcome
    fisher: tuple[Scored, ...] | None
    """The diagonal Fisher scores, highest first, if the locations were scored."""
    left_out: tuple[Location, ...]
    """Those that were not tried because of their scores."""
    agreement: Agreement | None
    """Spearman's correlation of the scores with the outcomes."""
    seconds: float

    @property
    def title(self) -> str:
        return f"{self.name}, each location on {self.edits} edits of {Path(self.source).name}"

    @property
    def name(self) -> str:
        """The model's, short enough for a title: a hub id, or the end of a path."""
        return "/".join(Path(self.model).parts[-2:])


def training_of(hparams: Hparams) -> Training:
    return Training.model_validate(hparams.model_dump(include=set(Training.model_fields)))


def write(report: LocationReport, facts: ModelFacts, folder: Path) -> Mapping[str, str]:
    """`locate.json`, `locate.png` and `hparams.yaml` in `folder`; their paths by kind.

    Raises `BadHparams` if `presets.load` would not take the hyperparameters.
    """
    files = {
        "json": folder / "locate.json",
        "picture": folder / "locate.png",
        "hparams": folder / "hparams.yaml",
    }
    files["json"].write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    shown = [*best_of_each(report.outcomes, report.margin), *_failures(report.outcomes)]
    heat_map.draw(files["picture"], _caption(report), shown, report.chosen)
    files["hparams"].write_text(hparams_yaml(report, facts), encoding="utf-8")
    presets.load(facts, files["hparams"], {})
    return {kind: str(file) for kind, file in files.items()}


def hparams_yaml(report: LocationReport, facts: ModelFacts) -> str:
    """The hyperparameters of the chosen location, in the form of `hparams/*.yaml`."""
    trial = report.chosen.trial
    values: dict[str, Any] = {
        "match": {key: facts.config[key] for key in _MATCH if key in facts.config},
        "parameters": list(trial.location.parameters),
        "learning_rate": trial.learning_rate,
        **report.training.model_dump(exclude={"seed"}),
    }
    places = len({outcome.trial.location for outcome in report.outcomes})
    comment = (
        f"# Found by `errata locate` on {report.name}, the best of {places} locations "
        f"for {report.edits} edits of\n# {Path(report.source).name}: {said(report.chosen.figures)} "
        "percent.\n"
    )
    return comment + yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def said(figures: Figures) -> str:
    known = {name: value for name, value in figures.model_dump().items() if value is not None}
    return ", ".join(f"{name} {value:.4g}" for name, value in known.items())


def place(outcome: Outcome) -> str:
    """Where a trial was, in words."""
    location = outcome.trial.location
    return f"layer {location.layer}, {location.module}"


def _caption(report: LocationReport) -> str:
    rate = report.chosen.trial.learning_rate
    chosen = f"chosen (framed): {place(report.chosen)}, learning rate {rate:g}"
    return f"{report.title}\n{chosen}"


def _failures(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Locations at which no learning rate held."""
    held = {outcome.trial.location for outcome in outcomes if outcome.error is None}
    failed = {o.trial.location: o for o in outcomes if o.trial.location not in held}
    return list(failed.values())
