"""Where a module has the rows of a batch, found by running it.

A module works row by row if each row of its results depends on the same row of its arguments only:
projections, norms, embeddings, routers and experts do, attention does not. Only such a module can
run the rows of several versions with parameters of their own. Knows nothing of versions.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

SMALL, LARGE = (17, 5), (29, 7)
"""Tokens of a trial pass and the positions that it makes logits for; a size that differs between
the two passes is a number of rows."""

Forward = Callable[..., Any]
Shapes = list[torch.Size | None]


@dataclass(frozen=True)
class RowLayout:
    """How a module takes and gives rows."""

    arguments: tuple[int | None, ...]
    """For each argument the dimension of its rows; None for one that is the same for all rows."""
    results: tuple[int, ...]
    """For each result the dimension of its rows; a tensor alone is one result."""
    positions: bool
    """Its rows are the positions that logits are made for, not the batch's tokens."""

    def run(
        self, parts: Sequence[tuple[Forward, int]], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """One call of a module, made by several functions: each takes so many rows, in order."""
        counts = [rows for _, rows in parts]
        columns = [
            [argument] * len(parts) if dim is None else argument.split(counts, dim)
            for argument, dim in zip(args, self.arguments, strict=True)
        ]
        results = [
            forward(*pieces, **kwargs)
            for (forward, _), pieces in zip(parts, zip(*columns, strict=True), strict=True)
        ]
        if isinstance(results[0], torch.Tensor):
            return torch.cat(results, self.results[0])
        joined = zip(zip(*results, strict=True), self.results, strict=True)
        return tuple(torch.cat(pieces, dim) for pieces, dim in joined)


@dataclass(frozen=True)
class _Call:
    """A call of a module in a trial pass."""

    forward: Forward
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def results(self) -> tuple[Any, ...]:
        return self.output if isinstance(self.output, tuple) else (self.output,)

    def plain(self) -> bool:
        """Tensors come as arguments and go as results, with only plain values besides."""
        others = [a for a in self.args if not isinstance(a, torch.Tensor)] + [*self.kwargs.values()]
        tensors = all(isinstance(result, torch.Tensor) for result in self.results)
        return tensors and all(o is None or isinstance(o, bool | int | float | str) for o in others)

    def shapes(self) -> Shapes:
        """Of the arguments, then of the results; None for what is no tensor."""
        return [getattr(value, "shape", None) for value in (*self.args, *self.results)]


@torch.no_grad()
def row_layouts(model: Any) -> dict[str, RowLayout]:
    """Of each module, by name, that has parameters of its own and works row by row.

    Runs the causal language model twice on a few tokens; nothing else may run it meanwhile.
    """
    small: dict[str, list[Shapes]] = defaultdict(list)
    large: dict[str, list[RowLayout | None]] = defaultdict(list)
    _observe(model, *SMALL, lambda name, call: small[name].append(call.shapes()))
    _observe(model, *LARGE, lambda name, call: large[name].append(_layout(call, small[name])))
    return {
        name: layouts[0]
        for name, layouts in large.items()
        if len(layouts) == 1 and layouts[0] is not None
    }


def _observe(model: Any, tokens: int, positions: int, tell: Callable[[str, _Call], None]) -> None:
    """A forward pass that tells of each call of a module with parameters of its own."""

    def hook(
        name: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        tell(name, _Call(module.forward, args, kwargs, output))

    handles = [
        module.register_forward_hook(partial(hook, name), with_kwargs=True)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    wanted = torch.arange(positions, device=model.device)
    options = {"logits_to_keep": wanted} if model._supports_logits_to_keep() else {}
    ids = torch.arange(2, 2 + tokens, device=model.device)
    try:
        model(ids[None], use_cache=False, **options)
    finally:
        for handle in handles:
            handle.remove()


def _layout(call: _Call, before: list[Shapes]) -> RowLayout | None:
    """Of a call in the large pass, given the shapes of the module's calls in the small one."""
    shapes = call.shapes()
    if len(before) != 1 or not call.plain() or len(before[0]) != len(shapes):
        return None
    dims: list[int | None] = []
    sizes: set[tuple[int, int]] = set()
    for old, new in zip(before[0], shapes, strict=True):
        varying = _varying(old, new)
        if varying is None or len(varying) > 1:
            return None
        dims.append(varying[0] if varying else None)
        sizes.update((old[dim], new[dim]) for dim in varying if old and new)
    count = len(call.args)
    results = [dim for dim in dims[count:] if dim is not None]
    if len(results) != len(call.results) or sizes not in ({_TOKENS}, {_POSITIONS}):
        return None
    layout = RowLayout(tuple(dims[:count]), tuple(results), sizes == {_POSITIONS})
    return layout if _row_by_row(call, layout) else None


_TOKENS, _POSITIONS = zip(SMALL, LARGE, strict=True)


def _varying(old: torch.Size | None, new: torch.Size | None) -> list[int] | None:
    """The dimensions whose sizes differ; None if the shapes cannot be compared."""
    if old is None or new is None:
        return [] if old is new else None
    if len(old) != len(new):
        return None
    return [dim for dim in range(len(new)) if old[dim] != new[dim]]


def _row_by_row(call: _Call, layout: RowLayout) -> bool:
    """Whether the call gives the same made on one row and on the others."""
    rows = LARGE[1 if layout.positions else 0]
    try:
        output = layout.run([(call.forward, 1), (call.forward, rows - 1)], call.args, call.kwargs)
    except RuntimeError:
        return False  # It does not run on a part of the rows.
    apart = output if isinstance(output, tuple) else (output,)
    return all(map(_close, call.results, apart))


def _close(whole: torch.Tensor, apart: torch.Tensor) -> bool:
    """Equal but for rounding; indices are not compared, as they turn on it."""
    if whole.shape != apart.shape:
        return False
    if not whole.is_floating_point():
        return True
    whole, apart = whole.float(), apart.float()
    return torch.allclose(whole, apart, rtol=0.01, atol=0.01 * whole.abs().max().item())
