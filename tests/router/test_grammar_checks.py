"""Who ended a trial: a child's own end is a verdict, anybody else's is our fault and says nothing of the grammar."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from protocol.errors import GrammarError, NotReady, RequestFailed
from protocol.request import Grammar, GrammarKind
from router.grammar_checks import GrammarChecks
from router.grammar_child import Question, Trial, Verdict, _judged
from router.tokenizer import Tokenizer
from tests.router.tiny import byte_level_gguf
from tests.router.workers import CHAT, HI, staged

A, B, C = (Grammar(kind=GrammarKind.REGEX, text=text) for text in "abc")
OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGXCPU)  # SIGHUP they pass over


@pytest_asyncio.fixture
async def checks(tmp_path: Path) -> AsyncIterator[GrammarChecks]:
    """Checks for the small vocabulary, with a child at hand."""
    checks = GrammarChecks(str(byte_level_gguf(tmp_path / "tiny.gguf")))
    await checks.check(A)
    yield checks
    await checks.close()


class Struck:
    """Ends children the moment they are asked, as often as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *signals: int) -> None:
        self.left, self.num_asked = list(signals), 0
        from router import grammar_checks

        ask, struck = grammar_checks._Child.ask, self

        async def strike(child: Any, question: Question, budget_s: float) -> Verdict:
            struck.num_asked += 1
            if struck.left:
                os.kill(child._process.pid, struck.left.pop(0))
            return await ask(child, question, budget_s)

        monkeypatch.setattr(grammar_checks._Child, "ask", strike)


@pytest.mark.parametrize("number", OUTSIDE)
async def test_a_child_killed_from_outside_is_replaced_within_the_request(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    struck = Struck(monkeypatch, number)
    assert await checks.check(B) is B
    assert struck.num_asked == 2


async def test_what_lost_all_its_children_is_our_fault_and_heals(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.grammar_checks.RETRY_S", 0.2)
    struck = Struck(monkeypatch, *[signal.SIGKILL] * 2)
    with pytest.raises(NotReady, match="from outside") as caught:
        await checks.check(B)
    assert caught.value.retry_after_s == 0.2
    with pytest.raises(NotReady, match="come back"):
        await checks.check(B)
    assert struck.num_asked == 2, "it rests"
    assert await checks.check(C) is C, "no other schema does"
    await asyncio.sleep(0.25)
    assert await checks.check(B) is B, "a good schema is not condemned"


async def test_a_schema_that_keeps_losing_its_children_is_tried_less_and_less(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.grammar_checks.RETRY_S", 0.01)
    monkeypatch.setattr("router.grammar_checks.MAX_RETRY_S", 0.05)
    struck, rests = Struck(monkeypatch, *[signal.SIGKILL] * 100), []
    for _ in range(4):
        with pytest.raises(NotReady) as caught:
            await checks.check(B)
        rests.append(caught.value.retry_after_s)
        await asyncio.sleep(rests[-1] + 0.01)
    assert rests == [0.01, 0.02, 0.04, 0.05] and struck.num_asked == 8


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGPROF])
async def test_what_a_child_does_to_itself_is_a_verdict_and_costs_once(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    struck = Struck(monkeypatch, number)
    for _ in range(2):
        with pytest.raises(GrammarError, match="too much time or memory"):
            await checks.check(B)
    assert struck.num_asked == 1
    assert await checks.check(C) is C


async def test_a_fault_of_ours_ends_no_child_and_is_not_told_as_the_clients(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Trial):
        def __init__(self) -> None:
            """Have nothing."""

    verdict = _judged(Broken(), B)
    assert verdict.is_ours and "AttributeError" in verdict.error

    from router import grammar_checks

    async def fail(child: Any, question: Question, budget_s: float) -> Verdict:
        return verdict

    with monkeypatch.context() as patch:
        patch.setattr(grammar_checks._Child, "ask", fail)
        with pytest.raises(RequestFailed, match="internal error"):
            await checks.check(B)
    with pytest.raises(RequestFailed, match="internal error"):
        await checks.check(B)
    assert caplog.text.count("a grammar cannot be tried") == 1 and "AttributeError" in caplog.text
    assert await checks.check(C) is C


async def test_no_verdict_falls_where_no_child_starts(checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tries = 0

    async def refuse(*_: object, **__: object) -> None:
        nonlocal num_tries
        num_tries += 1
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr("router.grammar_checks.RETRY_S", 0.2)
    os.kill(checks._free[-1]._process.pid, signal.SIGKILL)
    await checks._free[-1]._process.wait()
    with monkeypatch.context() as patch:
        patch.setattr("asyncio.create_subprocess_exec", refuse)
        for _ in range(5):
            with pytest.raises(NotReady, match="not available"):
                await checks.check(B)
        assert num_tries == 1, "starts are not tried in a row"
    await asyncio.sleep(0.25)
    assert await checks.check(B) is B


async def test_over_http_it_is_a_503_with_retry_after(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tokenizer, model_path=str(byte_level_gguf(tmp_path / "tiny.gguf"))) as stage:
        await stage.router.core.grammars.check(A)
        await stage.pair()
        Struck(monkeypatch, *[signal.SIGKILL] * 2)
        status, body, headers = await stage.post(CHAT, {**HI, "guided_regex": "b"})
        assert (status, headers["Retry-After"]) == (503, "2"), body
        assert body["error"]["type"] == "server_error"
