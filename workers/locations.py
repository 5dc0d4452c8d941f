"""Where a model can be tuned: the modules of each layer by name, whatever the family calls them.

Torch-free; knows names and shapes (`plan_parameters`), not what tuning them does.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Literal, get_args

from workers.contract import Record
from workers.errors import UnknownParameter
from workers.selection import select

Module = Literal["mlp_down", "mlp_up", "mlp", "attention", "layer"]
MODULES: tuple[Module, ...] = get_args(Module)

_ENTRIES: Mapping[Module, Sequence[str]] = {
    "mlp_down": (
        ".mlp.down_proj.weight",
        ".mlp.shared_expert.down_proj.weight",
        ".mlp.experts.down_proj",
    ),
    "mlp_up": (
        ".mlp.up_proj.weight",
        ".mlp.gate_up_proj.weight",
        ".mlp.shared_expert.up_proj.weight",
        ".mlp.experts.gate_up_proj",
    ),
    "mlp": (".mlp",),
    "attention": (".self_attn",),
    "layer": ("",),
}
"""What a module is called below its layer; the first that a layer has is taken. The shared expert
is the one that the paper tunes; where gate and up-projection are one tensor, both are tuned."""


class Location(Record):
    """A module of a layer."""

    layer: int
    module: Module
    parameters: tuple[str, ...]
    """As `Hparams.parameters` takes them."""
    weights: int
    """How many numbers that tunes."""


def modules_of(text: str) -> tuple[Module, ...]:
    """The modules named in `text`, as "mlp_down,attention", in the order of `MODULES`.

    Raises `UnknownParameter` for another name.
    """
    named = [name.strip() for name in text.split(",")]
    for name in named:
        if name not in MODULES:
            raise UnknownParameter(f"no module {name!r} to tune; there are {', '.join(MODULES)}")
    return tuple(module for module in MODULES if module in named)


def layers_of(text: str, layers: int) -> tuple[int, ...]:
    """The layers named in `text`, as "all" or "0-5,7", in a model with `layers`.

    Raises `UnknownParameter` for one that it does not have.
    """
    if text == "all":
        return tuple(range(layers))
    chosen: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < layers:
            raise UnknownParameter(
                f"no layers {part.strip()!r}; there are 0-{layers - 1}, "
                'to be named as "all" or "0-5,7"'
            )
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def locations(
    shapes: Mapping[str, Sequence[int]], layers: Iterable[int], modules: Sequence[Module]
) -> tuple[list[Location], list[str]]:
    """Those there are in a model with these parameters, and a line on each kind that there is not.

    By layer, then in the order of `modules`.
    """
    found: list[Location] = []
    absent: dict[Module, list[int]] = {}
    for layer in layers:
        for module in modules:
            location = _location(shapes, layer, module)
            if location is None:
                absent.setdefault(module, []).append(layer)
            else:
                found.append(location)
    return found, [
        f"{module}: skipped, layers {', '.join(map(str, without))} have none of "
        f"{', '.join(entry[1:] for entry in _ENTRIES[module])}"
        for module, without in absent.items()
    ]


def _location(shapes: Mapping[str, Sequence[int]], layer: int, module: Module) -> Location | None:
    for entry in _ENTRIES[module]:
        name = f"model.layers.{layer}{entry}"
        try:
            tuned = select(shapes, [name])
        except UnknownParameter:
            continue
        weights = sum(prod(shapes[parameter]) for parameter in tuned)
        return Location(layer=layer, module=module, parameters=(name,), weights=weights)
    return None
