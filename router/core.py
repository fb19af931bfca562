"""What every front end calls: HTTP, gRPC and the in-process API bring requests, and get sessions.

1. `started` waits out the first seconds of a router, in which its workers may still be on their way. 2. `admission`
refuses before any work is done, and holds a place until the session is open: what is being tokenised counts.
3. `admit` parses, renders and tokenises: a long text in a thread, so that no prompt holds up another's stream; what
its output must obey is tried in a process that may die of it. 4. `open` submits the job. Whoever opened a session
closes it, however its client ended. What is only read off prompts goes the same way: `admit_readouts`, `open_readouts`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from protocol.errors import GrammarError, InvalidRequest, NotReady, Overloaded
from protocol.readout import EmbeddingCard
from router.chat_template import RendersElsewhere
from router.config import RouterConfig
from router.grammar_checks import GrammarChecks
from router.intake import Intake, Job
from router.open_requests import OpenRequests
from router.reading import ReadQuery, ReadSession
from router.switchboard import OVERLOAD_RETRY_S, Session, Switchboard
from router.tokenizer import Tokenizer

LONG_TEXT_BYTES: Final = 20_000
NUM_TEXT_THREADS: Final = 2

Result = TypeVar("Result")


class Core:
    """Admission of one router. Used on one event loop.

    Args:
        tokenizer: of the model that is served.
        switchboard: where admitted jobs go.
    """

    def __init__(self, config: RouterConfig, tokenizer: Tokenizer, switchboard: Switchboard) -> None:
        self.tokenizer = tokenizer
        self.switchboard = switchboard
        self.max_num_requests = config.max_num_requests
        self.intake = Intake(tokenizer, config.served_model_names)
        self.open_requests = OpenRequests()
        self.grammars = GrammarChecks(config.model_path)
        self._num_admitting = self._num_in_threads = 0
        self._threads = ThreadPoolExecutor(NUM_TEXT_THREADS, thread_name_prefix="text")
        self._rendering = ThreadPoolExecutor(NUM_TEXT_THREADS, thread_name_prefix="rendering")

    async def started(self) -> None:
        """Wait until the first pair of workers is there, or has had its time to come."""
        await self.switchboard.has_started.wait()

    def max_model_len(self) -> int:
        """Return prompt plus output tokens that fit.

        Raises:
            NotReady: no worker has registered yet.
        """
        max_model_len = self.switchboard.max_model_len
        if max_model_len is None:
            raise NotReady("no worker has registered yet, so the context length is not known")
        return max_model_len

    @contextmanager
    def admission(self) -> Iterator[None]:
        """Hold a place for one request while it is tokenised and opened.

        Raises:
            RequestFailed, Overloaded: as `Switchboard.check_capacity` does.
        """
        self.switchboard.check_capacity(1 + self._num_admitting)
        self._num_admitting += 1
        try:
            yield
        finally:
            self._num_admitting -= 1

    async def admit(self, num_bytes: int, make: Callable[[int], Job]) -> Job:
        """Refuse early, or make a job of what a client sent; best within `admission`. Cancel-safe.

        Args:
            num_bytes: length of what it sent.
            make: parses and tokenises; takes the context length.

        Raises:
            RequestRejected, RequestFailed: as `Switchboard.check_capacity` and `Intake.job` do.
        """
        max_model_len = self.switchboard.check_capacity(max(1, self._num_admitting))
        self._refuse_encoder()
        return await self._checked(await self.off_loop(num_bytes, lambda: make(max_model_len)))

    async def _checked(self, job: Job) -> Job:
        """Return a job whose grammar workers can compile."""
        grammar = job.choices[0].sampling.grammar if job.choices else None
        if grammar is None:
            return job
        try:
            checked = await self.grammars.check(grammar)
        except GrammarError as error:
            raise InvalidRequest(f"{job.grammar_field}: {error}", job.grammar_field) from error
        return job if checked is grammar else job.with_grammar(checked)

    def open(self, job: Job, arrived_s: float) -> Session:
        """Submit a job; the caller closes the session. Raises as `Switchboard.open` does."""
        return self.switchboard.open(job, arrived_s)

    async def admit_readouts(self, num_bytes: int, make: Callable[[int], Result], embeds: bool = False) -> Result:
        """As `admit`, for what `make` returns, of requests that are only read; `embeds`: only for vectors."""
        max_model_len = self.switchboard.check_capacity(is_readout=True)
        if not embeds:
            self._refuse_encoder()
        return await self.off_loop(num_bytes, lambda: make(max_model_len))

    def open_readouts(self, queries: Sequence[ReadQuery], cache_salt: str, arrived_s: float) -> ReadSession:
        """Submit readouts; the caller closes the session. Raises as `Switchboard.open_readouts` does."""
        return self.switchboard.open_readouts(queries, cache_salt, arrived_s)

    def embedding_card(self) -> EmbeddingCard:
        """Return what the workers say of their vectors.

        Raises:
            InvalidRequest: they give none.
        """
        card = self.switchboard.registry.embedding
        if card is None:
            raise InvalidRequest("model: its workers give no embeddings", "model")
        return card

    def _refuse_encoder(self) -> None:
        if self.switchboard.registry.is_encoder:
            raise InvalidRequest("model: this model only embeds: use /v1/embeddings", "model")

    async def off_loop(self, num_bytes: int, work: Callable[[], Result]) -> Result:
        """Run work on text: here if it is short, in a thread if it is long or its chat template is not plain.

        Raises:
            Overloaded: as many long texts as may wait for a thread do.
        """
        threads = self._threads
        if num_bytes <= LONG_TEXT_BYTES:
            try:
                return work()
            except RendersElsewhere:
                # Threads of its own: a template that takes its time holds up no other text.
                threads = self._rendering
        if self._num_in_threads >= self.max_num_requests:
            raise Overloaded(f"{self._num_in_threads} long texts wait to be tokenised", OVERLOAD_RETRY_S)
        self._num_in_threads += 1
        future = asyncio.get_running_loop().run_in_executor(threads, work)
        # A thread works on for a client that has left, so its place is free when the thread is.
        future.add_done_callback(self._left_thread)
        return await asyncio.shield(future)

    def _left_thread(self, future: asyncio.Future[Any]) -> None:
        self._num_in_threads -= 1
        if not future.cancelled():
            future.exception()  # whoever waits for it has it; nobody does where its client has left

    async def close(self) -> None:
        """Let threads and child processes go."""
        await self.grammars.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._rendering.shutdown(wait=False, cancel_futures=True)
