"""The base model's safetensors, read in flat ranges by parameter name.

So a rank reads just its partition, and no host ever holds the model. Knows how the files of a
checkpoint name what a parameter is made of, nothing of how weights are partitioned.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from workers.errors import UnsupportedModel

_EXPERTS = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<kind>gate_up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class BaseWeights:
    """All tensors of a checkpoint directory, by the name the model has for them.

    A parameter is one tensor of the same name, or, where transformers fuses a layer's experts, the
    concatenation of theirs in row-major order.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_of = _index(path)
        self._open = lru_cache(maxsize=None)(self._opened)

    def read(self, name: str, start: int, end: int) -> Tensor:
        """Elements `[start, end)` of the parameter, flat.

        Raises `UnsupportedModel` if the checkpoint lacks it, or it is shorter.
        """
        pieces, reached = [], 0
        for part in self._parts(name):
            stored = self._open(self._file_of[part]).get_slice(part)
            numel = torch.Size(stored.get_shape()).numel()
            first, last = max(start - reached, 0), min(end - reached, numel)
            if first < last:
                pieces.append(_flat_range(stored, first, last))
            reached += numel
        if reached < end:
            raise UnsupportedModel(
                f"{self._path}: {name} has {reached} elements, its config.json makes it {end}"
            )
        return torch.cat(pieces) if pieces else torch.empty(0)

    def _opened(self, file: str) -> Any:
        return safe_open(self._path / file, framework="pt")

    def _parts(self, name: str) -> Sequence[str]:
        if name in self._file_of:
            return (name,)
        found = _EXPERTS.fullmatch(name)
        if found is None or f"{found['experts']}.0.{_PARTS[found['kind']][0]}.weight" not in (
            self._file_of
        ):
            raise UnsupportedModel(f"{self._path}: no file holds the weights of {name}")
        pattern = re.compile(rf"{re.escape(found['experts'])}\.(\d+)\.down_proj\.weight")
        experts = len([stored for stored in self._file_of if pattern.fullmatch(stored)])
        return [
            f"{found['experts']}.{expert}.{part}.weight"
            for expert in range(experts)
            for part in _PARTS[found["kind"]]
        ]


def _index(path: Path) -> dict[str, str]:
    """The file that holds each tensor."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return file_of
    file_of = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            file_of.update(dict.fromkeys(stored.keys(), file.name))
    return file_of


def _flat_range(stored: Any, first: int, last: int) -> Tensor:
    """Reads whole rows of the outermost dimension and cuts what is beside the range."""
    shape = stored.get_shape()
    row = torch.Size(shape[1:]).numel()
    top = first // row
    rows: Tensor = stored[top : -(-last // row)]
    return rows.flatten()[first - top * row : last - top * row]
