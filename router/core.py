"""What every front end calls: HTTP, gRPC and the in-process API bring requests, and get sessions.

1. `started` waits out the first seconds of a router, in which its workers may still be on their way. 2. `admission`
refuses before any work is done, and holds a place until the session is open: what is being tokenised counts.
3. `admit` parses, renders and tokenises: a long text in a thread, so that no prompt holds up another's stream; what
its output must obey is tried in a process that may die of it. 4. `open` submits the job. Whoever opened a session
closes it, however its client ended. What is only read off prompts goes the same way: `admit_readouts`, `open_readouts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Final, TypeVar

from protocol.errors import GrammarError, InvalidRequest, NotReady
from protocol.readout import EmbeddingCard
from router.access_log import current
from router.chat_template import RendersElsewhere
from router.config import RouterConfig
from router.fairness import Shares
from router.grammar_checks import GrammarChecks
from router.intake import Intake, Job
from router.open_requests import OpenRequests
from router.reading import ReadQuery, ReadSession
from router.slices import Slices
from router.switchboard import Session, Switchboard
from router.text_threads import TextThreads
from router.tokenizer import Tokenizer

# Two or three milliseconds at the worst, whatever it says: it is worked on where everybody's streams are.
LONG_TEXT_BYTES: Final = 4_000
# So many may ask a hundred questions, each of which is tokenised on its own.
LONG_INQUIRY_BYTES: Final = 500

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
        self.intake = Intake(tokenizer, config.served_model_names, config.max_answer_values)
        self.open_requests = OpenRequests()
        self.grammars = GrammarChecks(config.model_path)
        self.slices = Slices()
        self._admitting = Shares()
        self._threads = TextThreads(config.max_num_requests)
        self._rendering = TextThreads(config.max_num_requests)

    def reload(self, config: RouterConfig) -> None:
        """Take over limits."""
        self.max_num_requests = config.max_num_requests
        self.switchboard.reload(config)

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
        client = current().client
        self.switchboard.check_capacity(admitting=self._admitting)
        self._admitting.take(client)
        try:
            yield
        finally:
            self._admitting.give(client)

    async def admit(self, num_bytes: int, make: Callable[[int], Job]) -> Job:
        """Refuse early, or make a job of what a client sent; best within `admission`. Cancel-safe.

        Args:
            num_bytes: length of what it sent.
            make: parses and tokenises; takes the context length.

        Raises:
            RequestRejected, RequestFailed: as `Switchboard.check_capacity` and `Intake.job` do.
        """
        is_admitted = self._admitting.held(current().client) > 0
        max_model_len = self.switchboard.check_capacity(0 if is_admitted else 1, admitting=self._admitting)
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

    def answering(self, num_places: int = 1) -> AbstractContextManager[None]:
        """Hold places for an answer from its last token on: until its client has read it, it counts for newcomers."""
        return self.switchboard.answering(num_places)

    async def admit_readouts(self, num_bytes: int, make: Callable[[int], Result], embeds: bool = False) -> Result:
        """As `admit`, for what `make` returns, of requests that are only read; `embeds`: only for vectors."""
        max_model_len = self.switchboard.check_capacity(is_readout=True)
        if not embeds:
            self._refuse_encoder()
        return await self.off_loop(num_bytes, lambda: make(max_model_len), LONG_INQUIRY_BYTES)

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

    async def off_loop(self, num_bytes: int, work: Callable[[], Result], long_bytes: int = LONG_TEXT_BYTES) -> Result:
        """Run work on text: here if it is short, in a thread if it is long or its chat template is not plain.

        Raises:
            Overloaded: as many long texts as may wait for a thread do, of everybody or of this party.
        """
        threads = self._threads
        if num_bytes <= long_bytes:
            try:
                return work()
            except RendersElsewhere:
                # Threads of its own: a template that takes its time holds up no other text.
                threads = self._rendering
        return await threads.run(num_bytes, work)

    async def close(self) -> None:
        """Let threads and child processes go."""
        await self.grammars.close()
        self._threads.close()
        self._rendering.close()
