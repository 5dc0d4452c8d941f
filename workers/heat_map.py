"""The figures of a location search as a picture: layers by modules, one panel per figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workers.location_choice import Figures, Outcome
from workers.locations import MODULES, Module

_NUMBERED_LAYERS = 40
"""With more, a cell has no room for its number."""
_DARK_BELOW = 55.0
"""A number in a darker cell is white."""


def draw(file: Path, title: str, outcomes: Sequence[Outcome], chosen: Outcome) -> None:
    """Writes a PNG. `outcomes` has each location at most once; cells of others are grey.

    The location of `chosen` has a frame.
    """
    # Imported here: it takes a second, and only this needs it.
    from matplotlib.figure import Figure

    layers = sorted({outcome.trial.location.layer for outcome in outcomes})
    present = {outcome.trial.location.module for outcome in outcomes}
    modules = [module for module in MODULES if module in present]
    names = list(Figures.model_fields)
    height = 1.9 + max(0.36 * min(len(layers), _NUMBERED_LAYERS), 1.4)
    picture = Figure(figsize=(1.4 + len(names) * (0.9 + 0.62 * len(modules)), height), dpi=150)
    picture.set_layout_engine("constrained")
    panels = picture.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        image = _panel(panel, name, outcomes, layers, modules)
        _frame(panel, chosen, layers, modules)
    panels[0].set_ylabel("layer")
    picture.colorbar(image, ax=list(panels), label="percent", shrink=0.9, pad=0.015)
    picture.suptitle(title, fontsize=10)
    picture.savefig(file)


def _panel(
    panel: Any, name: str, outcomes: Sequence[Outcome], layers: list[int], modules: list[Module]
) -> Any:
    import numpy as np

    values = np.full((len(layers), len(modules)), np.nan)
    for outcome in outcomes:
        location, value = outcome.trial.location, getattr(outcome.figures, name)
        cell = layers.index(location.layer), modules.index(location.module)
        values[cell] = np.nan if value is None else value
        if len(layers) <= _NUMBERED_LAYERS:
            said = "failed" if outcome.error else "" if value is None else f"{value:.0f}"
            light = value is None or value >= _DARK_BELOW
            panel.text(
                *reversed(cell),
                said,
                ha="center",
                va="center",
                fontsize=8,
                color="black" if light else "white",
            )
    image = panel.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto", origin="lower")
    empty = bool(np.isnan(values).all())
    panel.set_facecolor("0.85")
    panel.set_title(f"{name} (nothing asked)" if empty else name, fontsize=10)
    panel.set_xticks(range(len(modules)), modules, rotation=40, ha="right", fontsize=8)
    step = -(-len(layers) // _NUMBERED_LAYERS)
    panel.set_yticks(range(0, len(layers), step), layers[::step], fontsize=8)
    return image


def _frame(panel: Any, chosen: Outcome, layers: list[int], modules: list[Module]) -> None:
    from matplotlib.patches import Rectangle

    location = chosen.trial.location
    corner = modules.index(location.module) - 0.5, layers.index(location.layer) - 0.5
    for width, colour in ((4.5, "white"), (2.2, "red")):
        panel.add_patch(
            Rectangle(corner, 1, 1, fill=False, ec=colour, lw=width, clip_on=False, zorder=3)
        )
