"""A model cut in three for a job: the frozen prefix, the suffix, and in it what is tuned.

Torch-free. Counts parameters; knows nothing of bytes, ranks or time.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from workers.contract import Hparams
from workers.errors import BadHparams
from workers.models import ModelFacts
from workers.plan_parameters import EMBEDDING, HEAD, NORM, Shape, Sizes, shapes, sizes
from workers.selection import select


@dataclass(frozen=True)
class Division:
    """Numbers of parameters. The prefix is the embedding and all layers below `depth`, the lowest
    tuned one; the suffix is the other layers, the final norm and the output head."""

    sizes: Sizes
    depth: int
    tuned: Mapping[str, Shape]
    total: int
    """Of the model; a head that is the embedding counts once here, and in prefix and suffix."""
    embedding: int
    head: int
    layers: tuple[int, ...]
    """Of each layer, from the lowest."""
    active_layers: tuple[int, ...]
    """As `layers`, but of the experts only as many as one token passes."""
    largest: int
    """Of the largest single parameter."""

    @property
    def prefix(self) -> int:
        return self.embedding + sum(self.layers[: self.depth])

    @property
    def largest_of_prefix(self) -> int:
        """Of the largest of what the prefix runs one by one: the embedding and the layers."""
        return max(self.embedding, *self.layers[: self.depth], 0)

    @property
    def suffix(self) -> int:
        return sum(self.layers[self.depth :]) + self.head

    @property
    def largest_pair_of_suffix(self) -> int:
        """Of the two largest neighbours among the suffix's layers and its head with the norm."""
        units = (*self.layers[self.depth :], self.head)
        return max(first + second for first, second in zip((0, *units), units, strict=False))

    @property
    def tuned_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tuned.values())

    @property
    def active_prefix(self) -> int:
        """That a token is multiplied with; the embedding is only looked up."""
        return sum(self.active_layers[: self.depth])

    @property
    def active_suffix(self) -> int:
        """That a token is multiplied with, without the head, which only learnt positions pass."""
        return sum(self.active_layers[self.depth :])


def divide(facts: ModelFacts, hparams: Hparams) -> Division:
    """Cuts the model below the lowest layer that `hparams.parameters` names.

    Raises `UnknownParameter` naming what is close to a name that the model lacks, `BadHparams` for
    the embedding, and `UnsupportedModel` for a config that cannot be.
    """
    known, its = shapes(facts), sizes(facts)
    tuned = select(known, hparams.parameters)
    counts = {name: math.prod(shape) for name, shape in known.items()}
    share = its.experts_per_token / its.experts if its.experts else 1.0
    return Division(
        sizes=its,
        depth=_depth(tuned, its.layers),
        tuned={name: known[name] for name in tuned},
        total=sum(counts.values()),
        embedding=counts[EMBEDDING],
        head=counts[NORM] + counts.get(HEAD, counts[EMBEDDING]),
        layers=_by_layer(counts, its.layers),
        active_layers=_by_layer(
            {
                name: round(count * share) if ".experts." in name else count
                for name, count in counts.items()
            },
            its.layers,
        ),
        largest=max(counts.values()),
    )


def _depth(tuned: Iterable[str], layers: int) -> int:
    if EMBEDDING in tuned:
        raise BadHparams(
            f"hparams.parameters: {EMBEDDING} is the embedding (or an output head that shares its "
            "weights), which every prompt depends on; tune a module of one of the layers"
        )
    return min((layer for name in tuned if (layer := _layer(name)) is not None), default=layers)


def _by_layer(counts: Mapping[str, int], layers: int) -> tuple[int, ...]:
    found = [0] * layers
    for name, count in counts.items():
        if (layer := _layer(name)) is not None:
            found[layer] += count
    return tuple(found)


def _layer(name: str) -> int | None:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None
