"""Sampling per request inside one continuous batch: each has its own temperature and generator.

The batch itself is greedy (an argmax); a sampled row is replaced by one that has all its weight on
the token drawn. So greedy requests stay exact, and a seed gives the same answer whatever else is in
the batch. Knows nothing of text or threads, and of versions only whose rows are to be told.
"""

from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from service.replica.versioned import BatchRows, ResidentVersion


class Sampler:
    """How one request draws its tokens; holds the state of its random generator."""

    def __init__(
        self, temperature: float, top_p: float, seed: int | None, device: torch.device
    ) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._generator = torch.Generator(device=device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sampler":
        """Itself: a request that is evicted and begun again goes on with its own generator."""
        return self

    def draw(self, logits_V: torch.Tensor) -> torch.Tensor:
        """One token id, as a tensor of shape [1]."""
        probs_V = torch.softmax(logits_V.float() / self._temperature, dim=-1)
        if self._top_p < 1:
            probs_V = _nucleus(probs_V, self._top_p)
        return torch.multinomial(probs_V, 1, generator=self._generator)


def _nucleus(probs_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """The fewest likeliest tokens that make up `top_p`; the others get weight 0."""
    sorted_V, indices_V = probs_V.sort(descending=True)
    before_V = sorted_V.cumsum(0) - sorted_V
    kept_V = torch.where(before_V < top_p, sorted_V, 0)
    return torch.zeros_like(probs_V).scatter(0, indices_V, kept_V)


class PerRequestArguments(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]  # untyped base
    """Stands in for the batch's logits processors; a request's arguments are its logits arguments.

    `version` tells whose the rows of the coming forward pass are, `sampler` how to draw from them;
    without one a request is greedy. Needs synchronous batching without CUDA graphs: both are
    remembered between `prepare_tensor_args` and the forward pass that follows it.
    """

    def __init__(self, rows: BatchRows) -> None:
        super().__init__(LogitsProcessorList())
        self.supported_keys = {"version": ResidentVersion, "sampler": Sampler}
        self._rows = rows
        self._samplers: list[Sampler | None] = []

    def prepare_tensor_args(
        self, requests_in_batch: list[Any], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        arguments = [request.state.logit_processor_kwargs for request in requests_in_batch]
        self._rows.lay_out(
            [
                (given["version"], request.query_length, request.has_new_token)
                for given, request in zip(arguments, requests_in_batch, strict=True)
            ]
        )
        self._samplers = [
            given.get("sampler")
            for given, request in zip(arguments, requests_in_batch, strict=True)
            if request.has_new_token
        ]
        self.do_processing = any(self._samplers)
        return arg_storage

    def __call__(
        self,
        input_ids: torch.Tensor,  # noqa: ARG002  the base's signature
        scores: torch.Tensor,
        logits_processor_args: torch.Tensor,  # noqa: ARG002
    ) -> torch.Tensor:
        """Scores of shape [rows, vocabulary], rows in the order of the requests."""
        for row, sampler in enumerate(self._samplers):
            if sampler is not None:
                token = sampler.draw(scores[row])
                scores[row] = float("-inf")
                scores[row, token] = 0.0
        return scores
