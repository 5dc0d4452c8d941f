"""Which of the locations tried is the best, and how two rankings of them agree. Torch-free.

The LocFT-BF paper (arXiv 2509.22072) puts capability first. `RULE` says what that means here, where
unrelated answers that stay as they were stand for capability.
"""

import statistics
from collections.abc import Mapping, Sequence
from math import ceil

from workers.contract import Record
from workers.locations import MODULES, Location

MARGIN = 2.0
"""Points of reliability."""

RULE = (
    "of the locations whose reliability is within {margin:g} points of the best, the one with the "
    "highest locality; among equals the highest generalization, then the fewest tuned weights, "
    "then the highest layer, then the lowest learning rate"
)


class Figures(Record):
    """In percent; None where the sample holds nothing to ask."""

    reliability: float | None = None
    generalization: float | None = None
    locality: float | None = None
    """Unrelated prompts whose answer is still the unedited model's."""


class Trial(Record):
    """A location and how it is trained."""

    location: Location
    learning_rate: float


class Outcome(Record):
    """What became of a trial."""

    trial: Trial
    figures: Figures
    """All None if it failed."""
    epochs: int
    loss: float | None
    """Mean over the last epoch, as met before its steps; None if it failed."""
    seconds_train: float
    seconds_evaluate: float
    error: str | None = None


def ranking(outcomes: Sequence[Outcome], margin: float = MARGIN) -> list[Outcome]:
    """Best first by `RULE`; after those within the margin the others, by reliability first.

    The ones that failed are left out.
    """
    tried = [outcome for outcome in outcomes if outcome.error is None]
    best = max((_known(outcome.figures.reliability) for outcome in tried), default=0.0)
    return sorted(tried, key=lambda outcome: _key(outcome, best - margin))


def _key(outcome: Outcome, least: float) -> tuple[float, ...]:
    figures, location = outcome.figures, outcome.trial.location
    reliability = _known(figures.reliability)
    within = reliability >= least
    return (
        -within,
        0.0 if within else -reliability,
        -_known(figures.locality),
        -_known(figures.generalization),
        location.weights,
        -location.layer,
        outcome.trial.learning_rate,
    )


def _known(figure: float | None) -> float:
    """Rounded, so that equal shares are equal; what is unknown is so for all locations alike."""
    return 0.0 if figure is None else round(figure, 6)


def best_of_each(outcomes: Sequence[Outcome], margin: float = MARGIN) -> list[Outcome]:
    """`ranking` with each location once, at its best learning rate."""
    seen: dict[Location, Outcome] = {}
    for outcome in ranking(outcomes, margin):
        seen.setdefault(outcome.trial.location, outcome)
    return list(seen.values())


def most_promising(scores: Mapping[Location, float], fraction: float) -> list[Location]:
    """Of each kind of module the `fraction` of its layers with the highest scores, at least one.

    Each kind for itself, because a score grows with the number of weights.
    """
    kept: set[Location] = set()
    for module in MODULES:
        layers = [location for location in scores if location.module == module]
        layers.sort(key=lambda location: -scores[location])
        kept.update(layers[: ceil(fraction * len(layers))])
    return [location for location in scores if location in kept]


Agreement = Mapping[str, Mapping[str, float | None]]


def agreement(
    scores: Mapping[Location, float], outcomes: Sequence[Outcome], margin: float = MARGIN
) -> Agreement:
    """Spearman's correlation of `scores` with `ranking` and with each figure.

    Over all locations that were tried (`all`), and over the layers of each kind of module.
    """
    ranked = best_of_each(outcomes, margin)
    found = {"all": _correlations(scores, ranked)}
    for module in MODULES:
        alike = [outcome for outcome in ranked if outcome.trial.location.module == module]
        if alike:
            found[module] = _correlations(scores, alike)
    return found


def _correlations(
    scores: Mapping[Location, float], ranked: Sequence[Outcome]
) -> Mapping[str, float | None]:
    """A high score agrees with an early place in `ranked`, and with high figures."""
    scored = [scores[outcome.trial.location] for outcome in ranked]
    found = {"ranking": spearman(scored, [-place for place in range(len(ranked))])}
    for name in Figures.model_fields:
        values = [getattr(outcome.figures, name) for outcome in ranked]
        found[name] = None if None in values else spearman(scored, values)
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank; None for fewer than 3, or all equal."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return statistics.correlation(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
