"""The generation loop: token ids in, token ids out, all versions in one continuous batch.

Owns, while it has requests, transformers' continuous batching manager with its thread and its KV
cache. Knows nothing of text, nor which versions there are.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    OutputRouter,
)

from service.errors import Unavailable
from service.replica.batching import VersionScheduler, request_id
from service.replica.sampling import PerRequestArguments, Sampler
from service.replica.versioned import ResidentVersion, VersionedModel

log = logging.getLogger(__name__)

WATCH_S = 1.0


@dataclass(frozen=True)
class Sizes:
    """What the generation loop may take while it runs."""

    kv_tokens: int = 8192
    """Capacity of the engine's KV cache, over all requests of all versions."""
    batch_tokens: int = 256
    """Most tokens in one forward pass."""
    page_tokens: int = 16
    idle_s: float = 600.0
    """Without a request for so long, it gives thread and KV cache back."""

    def batching(self) -> ContinuousBatchingConfig:
        return ContinuousBatchingConfig(
            page_size=self.page_tokens,
            num_blocks=-(-self.kv_tokens // self.page_tokens),
            max_batch_tokens=self.batch_tokens,
            scheduler_type=VersionScheduler.NAME,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )


class Router(OutputRouter):  # type: ignore[misc]  # untyped base
    """Carries results from the generation thread to the queues of the requests that wait.

    The table of queues is touched on the event loop only; results of a request that is gone are
    dropped.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self.queues: dict[str, asyncio.Queue[Any]] = {}

    def deliver(self, output: Any) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: list[Any]) -> None:
        for output in outputs:
            queue = self.queues.get(output.request_id)
            if queue is not None:
                queue.put_nowait(output)


class GenerationLoop:
    """Used from one event loop; nothing here waits for the model on it."""

    def __init__(self, model: VersionedModel, eos_tokens: Sequence[int], sizes: Sizes) -> None:
        self._model = model
        self._eos_tokens = list(eos_tokens) or [-1]
        self._sizes = sizes
        self._manager: ContinuousBatchingManager | None = None
        self._in_flight = 0
        self._ids = itertools.count()
        self._idle: asyncio.TimerHandle | None = None
        self._stopping: set[asyncio.Future[None]] = set()

    async def tokens(
        self, version: ResidentVersion, prompt: list[int], max_tokens: int, sampler: Sampler | None
    ) -> AsyncGenerator[int]:
        """The answer's token ids, an end-of-sequence token included; no sampler means greedy.

        Close the iterator to give the request up. Raises `Unavailable` if generation failed.
        """
        self._in_flight += 1
        manager = self._started()
        router: Router = manager.output_router
        name = request_id(version.id, next(self._ids))
        queue = router.queues[name] = asyncio.Queue()
        finished = False
        try:
            arguments = {"version": version} | ({} if sampler is None else {"sampler": sampler})
            self._add(manager, name, prompt, max_tokens, arguments)
            told = 0
            while not finished:
                output = await _latest(manager, queue)
                finished = output.is_finished()
                if output.error is not None:
                    raise Unavailable(f"Generation failed: {output.error}. Try again.")
                for token in output.generated_tokens[told:]:
                    yield token
                told = len(output.generated_tokens)
        finally:
            del router.queues[name]
            if not finished:
                manager.cancel_request(name)
            self._leave()

    def check(self) -> None:
        """Raise `Unavailable` if the generation thread has ended by an error."""
        if self._manager is not None and self._manager.background_thread_status.fatal_error:
            error = self._manager.background_thread_status.fatal_error
            raise Unavailable(f"The generation thread ended: {error}")

    async def close(self) -> None:
        """Fail what is in flight and give everything back."""
        self._rest(hard=True)
        await asyncio.gather(*self._stopping)

    def _started(self) -> ContinuousBatchingManager:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._manager is None:
            self._manager = self._model.model.init_continuous_batching(
                generation_config=GenerationConfig(
                    do_sample=False, eos_token_id=self._eos_tokens, pad_token_id=0
                ),
                continuous_batching_config=self._sizes.batching(),
            )
            self._manager.logit_processor = PerRequestArguments(self._model.rows)
            self._manager.output_router = Router(asyncio.get_running_loop())
            self._manager.start()
        return self._manager

    def _add(
        self,
        manager: ContinuousBatchingManager,
        name: str,
        prompt: list[int],
        max_tokens: int,
        arguments: dict[str, Any],
    ) -> None:
        added = manager.add_request(
            prompt,
            request_id=name,
            max_new_tokens=max_tokens,
            streaming=True,
            eos_token_id=self._eos_tokens,
            **arguments,
        )
        if added is None:
            raise Unavailable("The generation thread has ended. Try again.")

    def _leave(self) -> None:
        self._in_flight -= 1
        if self._in_flight == 0 and self._manager is not None:
            self._idle = asyncio.get_running_loop().call_later(self._sizes.idle_s, self._rest)

    def _rest(self, hard: bool = False) -> None:
        """Stop the thread, off the event loop; a request that comes now starts another one."""
        if self._idle is not None:
            self._idle.cancel()
        manager, self._manager, self._idle = self._manager, None, None
        if manager is None:
            return
        stopping = asyncio.get_running_loop().run_in_executor(
            None, lambda: manager.stop(hard_stop=hard)
        )
        self._stopping.add(stopping)
        stopping.add_done_callback(self._stopped)

    def _stopped(self, stopping: asyncio.Future[None]) -> None:
        self._stopping.discard(stopping)
        if self._manager is None:
            # The versions of its last batch may have been dropped since.
            self._model.rows.clear()


async def _latest(manager: ContinuousBatchingManager, queue: "asyncio.Queue[Any]") -> Any:
    """The newest result (each holds all tokens so far); watches that the thread is alive."""
    while True:
        try:
            async with asyncio.timeout(WATCH_S):
                output = await queue.get()
        except TimeoutError:
            if queue.empty() and not manager.is_running():
                raise Unavailable("The generation thread has ended. Try again.") from None
            continue
        while not queue.empty():
            output = queue.get_nowait()
        return output
