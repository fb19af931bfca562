"""`AsyncLLM`: the engine in this process, for asyncio.

1. `AsyncLLM(model, **options)` checks its options and finds the model; nothing is loaded yet.
2. `start`, `async with`, or the first request loads it. Its event loop is the one that runs it from then on.
3. A request becomes the body that it would be over HTTP, goes through the same checks, and is opened at the router's
   core. Cancelling its reader, leaving its loop, or `abort` ends it on the workers.
4. `close` ends what still runs. Without it the engine ends with its event loop, or when nobody refers to it any more.
"""

from __future__ import annotations

import asyncio
import gc
import operator
import random
import secrets
import time
import weakref
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from baton.in_process import InProcess, configure
from baton.llm_tokenizer import LLMTokenizer
from baton.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, logprobs_of
from baton.sampling import SamplingParams
from protocol.errors import InvalidRequest
from protocol.readout import floats_of
from router.api import ChatRequest, CompletionRequest, parse
from router.bodies import body_of_fields
from router.core import Core
from router.embeddings import EmbeddingsRequest, embed
from router.intake import Job
from router.prompt_logprobs import ReadPrompts, read_prompts
from router.switchboard import Session
from router.text import Piece

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or a mapping with `prompt` or `prompt_token_ids`."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation as the chat API takes it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request before it is admitted: exactly one of prompt and messages is given.

    Attributes:
        text: of the prompt, if it was given as text.
        extra: further fields of the HTTP body.
    """

    request_id: str
    sampling: SamplingParams
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    extra: Mapping[str, Any]

    def job(self, core: Core, model_name: str, max_model_len: int) -> Job:
        """Check and tokenise it. Raises RequestRejected."""
        body = {"model": model_name, **self.sampling.body(self.messages is not None), **self.extra}
        parsed: ChatRequest | CompletionRequest
        if self.messages is not None:
            parsed = parse(body_of_fields(body | {"messages": self.messages}), ChatRequest)
        else:
            prompt = self.prompt
            if self.sampling.max_tokens is None:
                # Chat takes what room there is by itself; a completion has to say how much.
                prompt = core.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt or []
                body["max_tokens"] = max(1, max_model_len - len(prompt))
            parsed = parse(body_of_fields(body | {"prompt": prompt}), CompletionRequest)
        return core.intake.job(parsed, max_model_len)


@dataclass(frozen=True, slots=True)
class Run:
    """An open request. `read` is what was read off its prompt, if that was asked for."""

    core: Core
    request: Request
    session: Session
    read: ReadPrompts | None
    metrics: RequestMetrics

    def output(self) -> RequestOutput:
        """Return an output without any token."""
        prompt_ids, text = self.session.job.prompts[0].token_ids, self.request.prompt
        if not isinstance(text, str):
            text = self.core.tokenizer.decode(prompt_ids, skip_special=False)
        outputs = [CompletionOutput(choice.index) for choice in self.session.job.choices]
        told = self._prompt_logprobs()
        return RequestOutput(
            self.request.request_id, text, list(prompt_ids), outputs, prompt_logprobs=told, metrics=self.metrics
        )

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        job = self.session.job
        if self.read is None or job.num_shown_top is None:
            return None
        prompt, num_top, tokenizer = job.prompts[0], job.num_shown_top, self.core.tokenizer
        rows = zip(prompt.token_ids[1:], self.read.of(prompt), strict=True)
        return [None, *(logprobs_of(tokenizer, token_id, row, num_top) for token_id, row in rows)]

    def add(self, output: RequestOutput, events: list[tuple[int, Piece]]) -> None:
        """Add to an output what has happened."""
        output.num_cached_tokens = self.session.num_cached_tokens
        self.metrics.note(time.monotonic(), self.session.is_over)
        has_text = self.request.sampling.detokenize is not False
        for index, piece in events:
            num_logprobs = self.session.job.choices[index].sampling.num_logprobs
            output.outputs[index].add(piece, self.core.tokenizer, num_logprobs, has_text)

    def close(self) -> None:
        """Cancel what still runs."""
        self.session.close()
        self.core.open_requests.remove(self.request.request_id)


class AsyncLLM:
    """One model in this process. Use it on one event loop.

    Args:
        model: as `baton serve` takes it: a directory, a GGUF file, a hub id, or smollm2.
        options: named as in docs/configuration.md, with `_` for `-`; those of the groups model, CPU, KV cache and
            scheduling, and max_num_requests, max_placements; or as vLLM calls them.
        seed: of all requests that bring none of their own; None draws one for each.

    Raises:
        ConfigError, ModelError: what was asked for cannot be had.
    """

    def __init__(self, model: str, *, seed: int | None = None, **options: Any) -> None:
        self._engine = InProcess(configure(model, options))
        self._seeds = None if seed is None else random.Random(seed)
        self._starting: asyncio.Task[None] | None = None
        weakref.finalize(self, self._engine.leave).atexit = False

    async def start(self) -> None:
        """Load the model, once; later calls wait for the first. Raises ConfigError."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._engine.start())
        await asyncio.shield(self._starting)

    async def close(self) -> None:
        """End what still runs and give everything back, memory too; idempotent."""
        await self.end()
        gc.collect()

    async def end(self) -> None:
        """As `close`, but leave memory to the garbage collector: at an interpreter's end nobody has time for it."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._engine.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def engine(self) -> InProcess:
        """The router and the workers behind this."""
        return self._engine

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        deltas: bool = False,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput]:
        """Generate for one prompt. Cancel-safe: who stops reading ends the request.

        Args:
            prompt: text, token ids, or a mapping with `prompt` or `prompt_token_ids`.
            sampling_params: how; None is the API's defaults.
            request_id: for `abort`; no other open request may have it.
            deltas: yield only what is new each time, instead of all there is so far.
            cache_salt: the KV of the prompt is shared only with prompts of the same salt.
            priority: lower ones are served earlier.

        Yields:
            What there is of the request, after every token or few; the last one has `finished` set.

        Raises:
            RequestRejected: it cannot be run; names the field.
            RequestFailed: it could not be completed, or was aborted.
            EngineDead: the engine is closed or broken.
        """
        request = new_request(prompt, None, sampling_params, request_id, cache_salt, priority)
        async with aclosing(self._stream(request, deltas)) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        deltas: bool = False,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput]:
        """Generate the next message of a conversation; otherwise as `generate`."""
        request = new_request(None, messages, sampling_params, request_id, cache_salt, priority)
        async with aclosing(self._stream(request, deltas)) as outputs:
            async for output in outputs:
                yield output

    async def embed(self, texts: str | Sequence[str], *, normalize: bool | None = None) -> list[list[float]]:
        """Turn texts into vectors, in their order. Cancel-safe.

        Args:
            texts: one or many, at most as many as /v1/embeddings takes.
            normalize: whether vectors have length 1; None is the model's own.

        Raises:
            RequestRejected, RequestFailed, EngineDead: as `generate` does.
        """
        await self.start()
        arrived_s, given = time.monotonic(), [texts] if isinstance(texts, str) else list(texts)
        if not given:
            return []
        body = body_of_fields({"model": self._engine.model_name, "input": given, "normalize": normalize})
        make = partial(parse, body, EmbeddingsRequest)
        found = await embed(self._engine.core, len(body), make, str, arrived_s)
        return [floats_of(vector) for vector in found.vectors]

    async def get_tokenizer(self) -> LLMTokenizer:
        """Return the model's tokenizer, with the calls that users of transformers know."""
        await self.start()
        return LLMTokenizer(self._engine.tokenizer)

    async def abort(self, request_id: str) -> bool:
        """End a request: its reader gets RequestAborted. False if none of that id is open."""
        return self._engine.core.open_requests.abort(request_id)

    async def finish(self, request: Request) -> RequestOutput:
        """Run a request to its end. Cancel-safe; raises as `generate` does."""
        run = await self._open(request)
        try:
            output = run.output()
            while events := await run.session.events():
                run.add(output, events)
            output.finished = True
            return output
        finally:
            run.close()

    async def _stream(self, request: Request, deltas: bool) -> AsyncGenerator[RequestOutput]:
        run = await self._open(request)
        try:
            output = run.output()
            while events := await run.session.events():
                if deltas:
                    output = run.output()
                run.add(output, events)
                output.finished = run.session.is_over
                yield output if deltas else _snapshot(output)
        finally:
            run.close()

    async def _open(self, request: Request) -> Run:
        await self.start()
        if self._seeds is not None and request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=self._seeds.getrandbits(63)))
        arrived_s, core, name = time.monotonic(), self._engine.core, self._engine.model_name
        num_bytes = len(request.prompt or "") if request.messages is None else len(str(request.messages))
        with core.admission():
            job = await core.admit(num_bytes, lambda max_model_len: request.job(core, name, max_model_len))
        if job.is_prompt_only:
            raise InvalidRequest("max_tokens: must be at least 1", "max_tokens")
        read = await read_prompts(core, job, arrived_s)
        core.open_requests.check(request.request_id)
        run = Run(core, request, core.open(job, arrived_s), read, RequestMetrics(arrived_s))
        core.open_requests.add(request.request_id, run.session)
        return run


def new_request(
    prompt: Prompt | None,
    messages: Messages | None,
    sampling_params: SamplingParams | None,
    request_id: str | None = None,
    cache_salt: str | None = None,
    priority: int = 0,
    **more: Any,
) -> Request:
    """Make a request of what a caller gave; `more` are further fields of its HTTP body.

    Raises:
        InvalidRequest: the prompt has none of the shapes allowed.
    """
    if isinstance(prompt, Mapping) and cache_salt is None:
        cache_salt = prompt.get("cache_salt")
    extra = {"priority": priority, **more} | ({} if cache_salt is None else {"cache_salt": cache_salt})
    plain = None if messages is None else [dict(message) for message in messages]
    return Request(
        request_id or secrets.token_hex(12),
        # A copy: whoever gave it may change its own.
        replace(sampling_params or SamplingParams()),
        None if prompt is None else _plain_prompt(prompt),
        plain,
        extra,
    )


def _plain_prompt(prompt: Prompt) -> str | list[int]:
    if isinstance(prompt, Mapping):
        found = prompt.get("prompt_token_ids", prompt.get("prompt"))
        if found is None or isinstance(found, Mapping):
            raise InvalidRequest("prompt: a mapping needs `prompt` or `prompt_token_ids`", "prompt")
        for name in ("multi_modal_data", "prompt_embeds"):
            if prompt.get(name) is not None:
                raise InvalidRequest(f"prompt: {name} is not supported: text and token ids are", "prompt")
        return _plain_prompt(found)
    if isinstance(prompt, str):
        return prompt
    try:
        return [operator.index(token_id) for token_id in prompt]
    except TypeError as error:
        raise InvalidRequest("prompt: must be text or token ids", "prompt") from error


def _snapshot(output: RequestOutput) -> RequestOutput:
    """Return a copy that later tokens do not change."""
    choices = [replace(choice, token_ids=list(choice.token_ids)) for choice in output.outputs]
    for choice in choices:
        choice.logprobs = None if choice.logprobs is None else list(choice.logprobs)
    return replace(output, outputs=choices)
