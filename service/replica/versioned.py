"""One model that runs several versions in one forward pass, each row with its version's parameters.

Owns what a resident version adds to the base, and how its rows find it. Knows nothing of requests,
of batching, nor of which versions ought to be in memory.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from service.errors import VersionRejected
from service.replica.row_layout import Forward, RowLayout


@dataclass(frozen=True, eq=False)
class ResidentVersion:
    """What a version has of its own. Who holds it can run it, whether or not it was dropped."""

    id: str
    tensors: Mapping[str, torch.Tensor]
    """Its parameters in place of the base's."""
    modules: Mapping[str, torch.nn.Module]
    """By name in the base, each module that owns one of them, with it in place."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "ResidentVersion":
        """Itself: a request that is evicted and begun again goes on with its version."""
        return self


def resident(
    base: Any,
    layouts: Mapping[str, RowLayout],
    version_id: str,
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> ResidentVersion:
    """Copies only the modules that own an edited parameter, not their other parameters.

    Adopts tensors that are on the base's device in its dtype. Where the base ties parameters, the
    version's are tied. Raises `VersionRejected` for a parameter that the base does not have, that
    has another shape there, that is not finite, or whose module does not work row by row.
    """
    parameters = dict(base.named_parameters(remove_duplicate=False))
    own: dict[str, torch.Tensor] = {}
    memo: dict[int, Any] = {}
    for name, tensor in tensors:
        own[name] = _fitting(parameters, name, tensor)
        memo[id(parameters[name])] = own[name]
    modules = {}
    for name, module in base.named_modules():
        edited = [key for key, each in module.named_parameters(recurse=False) if id(each) in memo]
        if edited and name not in layouts:
            raise VersionRejected(
                f"Parameter {f'{name}.{edited[0]}'!r} belongs to a {type(module).__name__}, which "
                "does not work row by row: versions that differ in it cannot share a batch. Tune "
                "parameters of projections, norms, embeddings, routers or experts."
            )
        if edited:
            modules[name] = _copy(module, memo)
    return ResidentVersion(version_id, own, modules)


def view(base: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """A model like `base` that shares all its tensors except the ones given by parameter name."""
    parameters = dict(base.named_parameters(remove_duplicate=False))
    return _copy(base, {id(parameters[name]): tensor for name, tensor in tensors.items()})


def _fitting(
    parameters: Mapping[str, torch.Tensor], name: str, tensor: torch.Tensor
) -> torch.nn.Parameter:
    parameter = parameters.get(name)
    if parameter is None:
        raise VersionRejected(f"The base model has no parameter {name!r}.")
    if parameter.shape != tensor.shape:
        raise VersionRejected(
            f"Parameter {name!r} has shape {tuple(tensor.shape)}; "
            f"the base model's is {tuple(parameter.shape)}."
        )
    own = tensor.detach().to(parameter.device, parameter.dtype)
    # The fastest look at all of it: one bad value would end every request it is sampled with.
    if not own.sum().isfinite():
        raise VersionRejected(f"Parameter {name!r} holds values that are not finite.")
    return torch.nn.Parameter(own, requires_grad=False)


def _copy(module: Any, replacements: Mapping[int, torch.Tensor]) -> Any:
    """A module that shares each tensor, but for those to be replaced, by id."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, {**shared, **replacements})


Runs = Sequence[tuple[Any, int]]
"""Whose rows follow each other, and how many; neighbours differ."""


class BatchRows:
    """Which version each row of a forward pass is of; set before it, on the thread that runs it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Let go of the versions."""
        self.tokens: Runs = ()
        self.positions: Runs = ()
        """Of the positions that logits are made for."""

    def lay_out(self, requests: Sequence[tuple[ResidentVersion, int, bool]]) -> None:
        """In the batch's order: version, tokens, and whether logits are made for the last one.

        The model is asked for as many positions as there are requests; those in excess come last
        and are read by nobody.
        """
        self.tokens = _runs((version, tokens) for version, tokens, _ in requests)
        wanted = [(version, 1) for version, _, last in requests if last]
        unread = (requests[-1][0], len(requests) - len(wanted))
        self.positions = _runs((*wanted, unread) if unread[1] else wanted)


def _runs(counts: Iterable[tuple[Any, int]]) -> Runs:
    runs: list[tuple[Any, int]] = []
    for owner, rows in counts:
        if runs and runs[-1][0] is owner:
            runs[-1] = (owner, runs[-1][1] + rows)
        else:
            runs.append((owner, rows))
    return runs


class VersionedModel:
    """A view of the base, run by one thread at a time, whose rows may be of several versions."""

    def __init__(self, base: Any) -> None:
        self.model = view(base, {})
        self.rows = BatchRows()
        self._forwards: dict[str, Forward] = {}

    def admit(self, version: ResidentVersion, layouts: Mapping[str, RowLayout]) -> None:
        """From now on rows may be of this version; from any thread, also while the model runs.

        What it adds to a module stays when the version is gone: the next one edits the same.
        """
        for name in version.modules:
            module = self.model.get_submodule(name)
            forward = _by_version(module.forward, name, layouts[name], self.rows)
            # The first one stays, also where two threads admit versions at once.
            module.forward = self._forwards.setdefault(name, forward)


def _by_version(base: Forward, name: str, layout: RowLayout, rows: BatchRows) -> Forward:
    """A module's forward that gives each version's rows to the version's own copy of the module."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        runs = rows.positions if layout.positions else rows.tokens
        parts = _runs((version.modules.get(name, base), count) for version, count in runs)
        if len(parts) == 1:
            return parts[0][0](*args, **kwargs)
        return layout.run(parts, args, kwargs)

    return forward
