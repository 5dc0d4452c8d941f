"""The naive ways to swap weights, for comparison: one model a replica, the version is all of it.

`Naive` answers with Serve and transformers' continuous batching alone, in the service's protocol.
A swap either starts replicas anew with other weights, as a redeployment does, or writes the weights
in place while generation is paused; what is in flight is waited for, given up, or kept.
"""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import torch
from starlette.requests import Request
from starlette.responses import StreamingResponse
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from service.replica.text import Detokenizer
from tests.benchmarks.swap_service import KV_TOKENS
from tests.stored_tensors import read_tensors
from workers.artifact import read_manifest

InFlight = Literal["wait", "abort", "keep"]

PAGE_TOKENS, BATCH_TOKENS = 16, 256
"""As the service's replicas."""


class Naive:
    """One replica: a model that is one version at a time."""

    async def __init__(self, model: str, store: str, version: str, generation: int) -> None:  # type: ignore[misc]  # Serve awaits it
        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self._store = store
        self._base: dict[str, torch.Tensor] = {}
        self._drained = asyncio.Condition()
        self._open = asyncio.Event()
        self._open.set()
        self._queues: dict[str, asyncio.Queue[Any]] = {}
        self._ids = itertools.count()
        self._load(version)
        self._version, self._generation = version, generation
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=[-1], pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=KV_TOKENS // PAGE_TOKENS,
                max_batch_tokens=BATCH_TOKENS,
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
        )
        self._manager.start()

    async def __call__(self, request: Request) -> StreamingResponse:
        body = await request.json()
        await self._open.wait()
        headers = {
            "X-Errata-Version": self._version,
            "X-Errata-Generation": str(self._generation),
        }
        return StreamingResponse(
            self._events(body["prompt"], body["max_tokens"]),
            media_type="text/event-stream",
            headers=headers,
        )

    async def swap(self, version: str, generation: int, in_flight: InFlight) -> None:
        """In place: pause, write, resume."""
        self._open.clear()
        if in_flight == "abort":
            for queue in self._queues.values():
                queue.put_nowait(None)
        if in_flight != "keep":
            async with self._drained:
                await self._drained.wait_for(lambda: not self._queues)
        await asyncio.to_thread(self._write, version)
        self._version, self._generation = version, generation
        self._open.set()

    def _write(self, version: str) -> None:
        with self._manager.pause():
            self._load(version)

    @torch.no_grad()
    def _load(self, version: str) -> None:
        tensors = dict(self._base)
        if version != "v0":
            tensors |= read_tensors(self._store, read_manifest(self._store, version))
        for name, tensor in tensors.items():
            parameter = self._model.get_parameter(name)
            self._base.setdefault(name, parameter.detach().clone())
            parameter.copy_(tensor)

    async def _events(self, prompt: str, max_tokens: int) -> AsyncIterator[str]:
        name, queue = str(next(self._ids)), asyncio.Queue[Any]()
        tokens = self._tokenizer(prompt)["input_ids"]
        detokenizer = Detokenizer(self._tokenizer, tokens)
        self._queues[name] = queue
        self._manager.register_result_handler(name, queue.put_nowait)
        self._manager.add_request(
            tokens, request_id=name, max_new_tokens=max_tokens, streaming=True
        )
        told, ended = 0, False
        try:
            while not ended:
                output = await queue.get()
                if output is None:
                    self._manager.cancel_request(name)
                    yield _event({"error": {"message": "given up for new weights"}})
                    return
                ended = output.is_finished()
                text = "".join(map(detokenizer.add, output.generated_tokens[told:]))
                told = len(output.generated_tokens)
                if ended:
                    text += detokenizer.flush()
                if text:
                    yield self._piece(text)
            yield "data: [DONE]\n\n"
        finally:
            del self._queues[name]
            async with self._drained:
                self._drained.notify_all()

    def _piece(self, text: str) -> str:
        return _event(
            {
                "model": f"errata@{self._version}",
                "system_fingerprint": f"errata-{self._version}",
                "choices": [{"text": text}],
            }
        )


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
