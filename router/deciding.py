"""Answers questions about a state: every front end that decides, scores or reranks comes through here.

1. Each question becomes a prompt that begins with the state (router/question_prompts.py). 2. All of them are read on
prefill workers: the state is computed once, each question behind it (router/reading.py). 3. The labels' probabilities
are the answer. The client that leaves takes all of its questions with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router.core import Core
from router.question_prompts import Asked, QuestionPrompts
from router.questions import Distribution
from router.reading import ReadQuery

MAX_QUESTIONS = 400


@dataclass(frozen=True, slots=True)
class AskedState:
    """Questions about one text. `param` names the text's field in errors."""

    state: str
    questions: tuple[Asked, ...]
    param: str


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What a request asks: of one state, or of several.

    Attributes:
        model: its name as the client wrote it, None for whatever is served.
        cache_salt: partitions the prefix cache.
    """

    model: str | None
    states: tuple[AskedState, ...]
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class ReadUsage:
    """Tokens of an inquiry: a state counts once, however many questions it has.

    Attributes:
        num_cached_tokens: leading ones that were in the prefix cache before.
        num_shared_tokens: of the states.
    """

    num_input_tokens: int
    num_cached_tokens: int
    num_shared_tokens: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answers to an inquiry, in the order of its questions."""

    answers: list[Distribution]
    usage: ReadUsage


async def decide(core: Core, num_bytes: int, make: Callable[[], Inquiry], arrived_s: float) -> Verdict:
    """Answer an inquiry; on cancellation every question of it is cancelled.

    Args:
        core: of the router.
        num_bytes: length of what the client sent.
        make: parses it; may run in a thread.
        arrived_s: on the monotonic clock.

    Raises:
        RequestRejected, RequestFailed: it cannot be taken, or cannot be completed.
    """
    await core.started()

    def prepare(max_model_len: int) -> tuple[list[list[ReadQuery]], str]:
        inquiry = make()
        core.intake.check_model(inquiry.model)
        prompts = QuestionPrompts(core.tokenizer, max_model_len)
        return [prompts.queries(s.state, s.questions, s.param) for s in inquiry.states], inquiry.cache_salt

    by_state, cache_salt = await core.admit_readouts(num_bytes, prepare)
    queries = [query for of_state in by_state for query in of_state]
    session = core.open_readouts(queries, cache_salt, arrived_s)
    try:
        readings = await session.readings()
    finally:
        session.close()
    answers = await core.slices.run(Distribution.of(one.labels) for one in readings)
    return Verdict(answers, _usage(by_state, [one.num_cached_tokens for one in readings]))


def _usage(by_state: Sequence[Sequence[ReadQuery]], num_cached: Sequence[int]) -> ReadUsage:
    num_input = num_cached_tokens = num_shared = start = 0
    for queries in by_state:
        shared = len(queries[0].shared) if queries else 0
        num_shared += shared
        num_input += shared + sum(len(query.tokens) for query in queries)
        # The first one to be computed found what others had left; those behind it found what it left.
        of_state = num_cached[start : start + len(queries)]
        num_cached_tokens += min(of_state, default=0)
        start += len(queries)
    return ReadUsage(num_input, num_cached_tokens, num_shared)
