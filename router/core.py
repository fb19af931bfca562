"""What every front end calls: HTTP, gRPC and the in-process API bring requests, and get sessions.

1. `started` waits out the first seconds of a router, in which its workers may still be on their way. 2. `admit` refuses
early, then parses, renders and tokenises: a long text in a thread, so that no prompt holds up another's stream; what
its output must obey is tried in a process that may die of it.
3. `open` submits the job. Whoever opened a session closes it, however its client ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from protocol.errors import GrammarError, InvalidRequest, NotReady
from router.config import RouterConfig
from router.grammar_checks import GrammarChecks
from router.intake import Intake, Job
from router.open_requests import OpenRequests
from router.switchboard import Session, Switchboard
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
        self.intake = Intake(tokenizer, config.served_model_names)
        self.open_requests = OpenRequests()
        self.grammars = GrammarChecks(config.model_path)
        self._threads = ThreadPoolExecutor(NUM_TEXT_THREADS, thread_name_prefix="text")

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

    async def admit(self, num_bytes: int, make: Callable[[int], Job]) -> Job:
        """Refuse early, or make a job of what a client sent; cancel-safe.

        Args:
            num_bytes: length of what it sent.
            make: parses and tokenises; takes the context length.

        Raises:
            RequestRejected, RequestFailed: as `Switchboard.check_capacity` and `Intake.job` do.
        """
        max_model_len = self.switchboard.check_capacity()
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

    async def off_loop(self, num_bytes: int, work: Callable[[], Result]) -> Result:
        """Run work on text: here if it is short, in a thread if it is long."""
        if num_bytes <= LONG_TEXT_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def close(self) -> None:
        """Let threads and child processes go."""
        await self.grammars.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
