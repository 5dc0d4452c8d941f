"""The frozen prefix: all layers below the tuned ones, run once over the job's samples.

Nothing below the lowest tuned layer changes during a job, so its output never does. It is computed
layer by layer, each over all samples before the next, and kept; epochs run only what is above.

Knows the shape of transformers' decoders (`layers`, `norm`, `embed_tokens`), not how weights come
to be there: `Acquire` brings a module's and lets them go.
Shapes: T tokens, D hidden size, R rows of C cells.
"""

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workers.errors import BadHparams, TrainingFailed
from workers.examples import Batch, Example, pack

CHUNK_TOKENS = 8192
"""Tokens in one forward pass of a prefix layer."""

Acquire = Callable[[nn.Module], AbstractContextManager[object]]
"""Makes a module's weights usable in the block."""


class Skip(nn.Module):
    """Stands in a decoder for a layer that is not run, so that the others keep their index."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class Span(nn.Module):
    """Layers `[first, last)` of a decoder as a function of hidden states.

    A view of the decoder's own code and weights: masks, positions and what depends on a layer's
    index are the model's. `norm` says whether the decoder's final norm follows.
    """

    def __init__(self, decoder: Any, first: int, last: int, *, norm: bool) -> None:
        super().__init__()
        view = copy.copy(decoder)
        view._modules = dict(decoder._modules)
        del view._modules["embed_tokens"]
        view.layers = nn.ModuleList([Skip() for _ in range(first)])
        view.layers.extend(decoder.layers[first:last])
        if not norm:
            view.norm = nn.Identity()
        self.decoder = view

    def forward(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        """Hidden states of the batch's tokens to those of its cells: [R * C, D]."""
        rows, columns = batch.position_ids_RC.shape
        cells = hidden_TD.new_zeros(rows * columns, hidden_TD.shape[1])
        cells = cells.index_copy(0, batch.cell_T, hidden_TD)
        hidden_RCD = cells.view(rows, columns, -1)
        output: Tensor = self.decoder(
            inputs_embeds=hidden_RCD,
            position_ids=batch.position_ids_RC,
            attention_mask=_masks(self.decoder.config, hidden_RCD, batch.position_ids_RC),
            use_cache=False,
        ).last_hidden_state
        return output.flatten(0, 1)


def _masks(config: Any, hidden_RCD: Tensor, position_ids_RC: Tensor) -> dict[str, Any] | None:
    """gpt_oss makes its masks without a look at the positions, so it is given them ready-made."""
    if config.model_type != "gpt_oss":
        return None
    from transformers import masking_utils

    known = {
        "config": config,
        "inputs_embeds": hidden_RCD,
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_ids_RC,
    }
    return {
        "full_attention": masking_utils.create_causal_mask(**known),
        "sliding_attention": masking_utils.create_sliding_window_causal_mask(**known),
    }


class HiddenStates:
    """The prefix's output for some of the samples, in memory or in a file: [T, D].

    Raises `TrainingFailed` if the file finds no room.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        width: int,
        dtype: torch.dtype,
        budget_bytes: int,
        file: Path,
    ) -> None:
        self._spans: dict[int, tuple[int, int]] = {}
        end = 0
        for example in examples:
            self._spans[example.index] = (end, end + len(example))
            end += len(example)
        self.width, self.dtype = width, dtype
        self.bytes = end * width * dtype.itemsize
        self.file = file if self.bytes > budget_bytes else None
        if self.file is None:
            self._flat = torch.empty(end, width, dtype=dtype)
        else:
            _reserve(self.file, self.bytes)
            self._flat = torch.from_file(
                str(self.file), shared=True, size=end * width, dtype=dtype
            ).view(end, width)

    def of(self, examples: Sequence[Example]) -> Tensor:
        """Their tokens' hidden states, one sample after the other."""
        spans = [self._spans[example.index] for example in examples]
        return torch.cat([self._flat[start:end] for start, end in spans])

    def put(self, examples: Sequence[Example], hidden_TD: Tensor) -> None:
        lengths = [len(example) for example in examples]
        pieces = torch.split(hidden_TD.to(self._flat.device), lengths)
        for example, piece in zip(examples, pieces, strict=True):
            start, end = self._spans[example.index]
            self._flat[start:end] = piece

    def close(self) -> None:
        """Removes the file, if there is one."""
        del self._flat
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def _reserve(file: Path, size: int) -> None:
    """Takes the room on disk now: a mapped page that finds none later kills the process."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise TrainingFailed(
            f"the frozen prefix's hidden states need {size} bytes in {file.parent}: "
            f"{error.strerror}; free some space or raise the memory budget of the cache"
        ) from error


def depth_of(tuned: Iterable[str], layers: int) -> int:
    """How many layers are below the lowest of the tuned parameters.

    Raises `BadHparams` for one that is below all layers.
    """
    depth = layers
    for name in tuned:
        if found := re.search(r"\blayers\.(\d+)\.", name):
            depth = min(depth, int(found[1]))
        elif "embed_tokens" in name:
            raise BadHparams(
                f"hparams.parameters: {name} is the embedding (or an output head that shares its "
                "weights), which every prompt depends on; tune a module of one of the layers"
            )
    return depth


@torch.no_grad()
def run(
    decoder: Any,
    depth: int,
    examples: Sequence[Example],
    states: HiddenStates,
    acquire: Acquire = nullcontext,
    release: Callable[[int], None] | None = None,
    device: torch.device | None = None,
    reached: int | None = None,
) -> None:
    """Fills `states` with the output of the first `depth` layers.

    With no layers that is the embedding's. Each layer is acquired once, and released after.
    `reached` is the depth whose output `states` already holds, if it holds any.
    """
    device = device or torch.device("cpu")
    chunks = list(_chunks(examples))
    if reached is None:
        with acquire(decoder.embed_tokens):
            for chunk in chunks:
                tokens_T = torch.tensor([token for example in chunk for token in example.read])
                states.put(chunk, decoder.embed_tokens(tokens_T.to(device)))
    for layer in range(reached or 0, depth):
        with acquire(decoder.layers[layer]):
            span = Span(decoder, layer, layer + 1, norm=False)
            for chunk in chunks:
                batch = pack(chunk).to(device)
                cells = span(states.of(chunk).to(device), batch)
                states.put(chunk, cells[batch.cell_T])
        if release is not None:
            release(layer)


def _chunks(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Samples of like length together, at most `CHUNK_TOKENS` in a chunk of more than one."""
    chunk: list[Example] = []
    for example in sorted(examples, key=len):
        if chunk and (len(chunk) + 1) * len(example) > CHUNK_TOKENS:
            yield chunk
            chunk = []
        chunk.append(example)
    if chunk:
        yield chunk
