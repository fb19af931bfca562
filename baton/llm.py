"""`LLM`: the engine in this process, for batch jobs without asyncio.

1. `LLM(model, **options)` loads the model; its event loop runs in a thread of its own from then on.
2. `generate` and `chat` open a bounded number of requests, and one more for each that ends: a batch of any size keeps
   the decode batch full and holds little. Results come back in order.
3. `close`, the end of `with`, the end of the last reference, or the end of the process ends it, on whatever thread.
4. A process that is forked has no engine: whatever it asks of this one is refused, and nothing of it is closed there.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from baton.async_llm import AsyncLLM, Messages, Prompt, Request, new_request
from baton.llm_tokenizer import LLMTokenizer
from baton.outputs import RequestOutput
from baton.sampling import SamplingParams
from engine.compute_loop import THREAD_NAME as COMPUTE_THREAD
from protocol.errors import EngineDead, InvalidRequest

Result = TypeVar("Result")
LOOP_THREAD: Final = "engine"
CHAT_FIELDS: Final = frozenset({"add_generation_prompt", "continue_final_message", "chat_template_kwargs"})


class LLM:
    """One model in this process; calls block. Several threads may call it.

    Args:
        model: as `baton serve` takes it: a directory, a GGUF file, a hub id, or smollm2.
        options: as for `AsyncLLM`.

    Raises:
        ConfigError, ModelError: what was asked for cannot be had.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._engine = AsyncLLM(model, **options)
        self._thread = LoopThread()
        self._finalizer = weakref.finalize(self, _end, self._engine, self._thread)
        try:
            self._thread.run(self._engine.start())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what still runs and give everything back, memory too; idempotent."""
        self._finalizer()
        gc.collect()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] | None = None,
        *,
        show_progress: bool | None = None,
        cache_salt: str | None = None,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Generate for every prompt; return the outputs in the order of the prompts.

        Args:
            prompts: one or many, each text, token ids, or a mapping with `prompt` or `prompt_token_ids`.
            sampling_params: for all, or one for each.
            use_tqdm: vLLM's name of `show_progress`; a class of bars counts as True.
            show_progress: None shows a bar where stderr is a terminal.
            cache_salt: the KV of the prompts is shared only with prompts of the same salt.
            priority: lower ones are served earlier; for all, or one for each.

        Raises:
            RequestRejected: one cannot be run; the others are ended.
            RequestFailed, EngineDead: one could not be completed; the others are ended.
        """
        found = [cast(Prompt, prompts)] if _is_one_prompt(prompts) else list(cast(Sequence[Prompt], prompts))
        each = _for_each(sampling_params, len(found))
        priorities = [priority] * len(found) if isinstance(priority, int) else priority
        if len(priorities) != len(found):
            raise InvalidRequest(f"priority: {len(priorities)} for {len(found)} prompts", "priority")
        requests = [
            new_request(prompt, None, sampling, cache_salt=cache_salt, priority=order)
            for prompt, sampling, order in zip(found, each, priorities, strict=True)
        ]
        return self._run(requests, _is_shown(use_tqdm, show_progress))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] | None = None,
        *,
        show_progress: bool | None = None,
        cache_salt: str | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation, or of many; otherwise as `generate`.

        Args:
            messages: of one conversation, or a list of these for each of many.
            sampling_params: for all, or one for each.
            use_tqdm: as for `generate`.
            show_progress: as for `generate`.
            cache_salt: as for `generate`.
            fields: add_generation_prompt, continue_final_message or chat_template_kwargs, as the HTTP API has them.

        Raises:
            InvalidRequest: another field is given, besides what `generate` raises.
        """
        for name, value in fields.items():
            if name not in CHAT_FIELDS and value is not None:
                raise InvalidRequest(f"{name}: LLM.chat does not take it; the server does what it can", name)
        given = {name: value for name, value in fields.items() if value is not None}
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        found = [cast(Messages, messages)] if is_one else list(cast(Sequence[Messages], messages))
        each = _for_each(sampling_params, len(found))
        requests = [
            new_request(None, conversation, sampling, cache_salt=cache_salt, **given)
            for conversation, sampling in zip(found, each, strict=True)
        ]
        return self._run(requests, _is_shown(use_tqdm, show_progress))

    def get_tokenizer(self) -> LLMTokenizer:
        """Return the model's tokenizer, with the calls that users of transformers know."""
        return LLMTokenizer(self._engine.engine.tokenizer)

    def embed(self, texts: str | Sequence[str], *, normalize: bool | None = None) -> list[list[float]]:
        """Turn texts into vectors, in their order; as `AsyncLLM.embed`."""
        return self._thread.run(self._engine.embed(texts, normalize=normalize))

    def _run(self, requests: list[Request], is_shown: bool) -> list[RequestOutput]:
        with _progress(len(requests), is_shown) as progress:
            return self._thread.run(self._run_all(requests, progress))

    async def _run_all(self, requests: list[Request], progress: Progress | None) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        positions = iter(range(len(requests)))

        async def run_some() -> None:
            for i in positions:
                outputs[i] = await self._engine.finish(requests[i])
                if progress is not None:
                    progress.advance(progress.task_ids[0])

        most_choices = max((request.sampling.n or 1 for request in requests), default=1)
        num_open = max(1, self._engine.engine.max_num_open // most_choices)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(num_open, len(requests))):
                    group.create_task(run_some())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [outputs[i] for i in range(len(requests))]


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=LOOP_THREAD, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine there and wait for it; an interrupt here cancels it there.

        Raises:
            EngineDead: after `stop`, and in another process than the one that made this.
        """
        if not self.is_here or self._loop.is_closed():
            work.close()
            why = "it was closed" if self.is_here else "it lives in the process that made it: make one here"
            raise EngineDead(f"the engine is not running: {why}")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def is_here(self) -> bool:
        """Whether this is the process that it was made in: a fork has no thread."""
        return self._pid == os.getpid()

    def stop(self) -> None:
        """End the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _end(engine: AsyncLLM, thread: LoopThread) -> None:
    if not thread.is_here:
        return
    if threading.current_thread().name in (LOOP_THREAD, COMPUTE_THREAD):
        # Garbage is collected on any thread, and these would wait for themselves.
        threading.Thread(target=_close, args=(engine, thread), name="closing").start()
    else:
        _close(engine, thread)


def _close(engine: AsyncLLM, thread: LoopThread) -> None:
    try:
        thread.run(engine.end())
    finally:
        thread.stop()


def _is_one_prompt(prompts: Any) -> bool:
    if isinstance(prompts, str | Mapping):
        return True
    return len(prompts) > 0 and all(hasattr(part, "__index__") for part in prompts)


def _is_shown(use_tqdm: bool | Callable[..., Any] | None, show_progress: bool | None) -> bool:
    asked = use_tqdm if show_progress is None else show_progress
    return sys.stderr.isatty() if asked is None else bool(asked)


def _for_each(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * num_prompts
    if len(sampling_params) != num_prompts:
        raise InvalidRequest(
            f"sampling_params: {len(sampling_params)} for {num_prompts} prompts; give one, or one for each",
            "sampling_params",
        )
    return sampling_params


@contextmanager
def _progress(num_requests: int, is_shown: bool) -> Iterator[Progress | None]:
    if not is_shown:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        progress.add_task("requests", total=num_requests)
        yield progress
