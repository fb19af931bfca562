"""What a grammar may cost, who works for one that is dear, and what becomes of one that is too dear."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.grammar import GrammarBudgets, GrammarLanes, GrammarState, Pace, allowed_tokens, ended, follow
from engine.grammar_compiler import SLICE_S, GrammarCompiler
from engine.grammar_llguidance import LlguidanceBackend
from engine.grammar_threads import HELD_UP_S, MAX_LET_GO, NUM_QUICK, GrammarThreads
from protocol.errors import GrammarError, GrammarUnavailable
from protocol.request import Grammar, GrammarKind, SamplingParams
from tests.engine.bytes_vocabulary import EOS_ID, bytes_vocabulary, ids_of
from tests.engine.scripted_matcher import ANY, ScriptedBackend, ScriptedMatcher, scripted
from tests.router.tiny import byte_id, byte_level_gguf

AMBIGUOUS = Grammar(kind=GrammarKind.LARK, text='start: s\ns: s s | "a" | "b" | s "a" s | "a" s "b"')
SAMPLING = SamplingParams(seed=0, eos_token_ids=(EOS_ID,), grammar=ANY)
EVERYTHING_ASIDE = GrammarBudgets(slow_s=0.0, heavy_s=1.0, mean_s=10.0, worst_s=10.0)
EVERYTHING_IDLE = GrammarBudgets(slow_s=0.0, heavy_s=0.0, mean_s=10.0, worst_s=10.0)


def _on_lanes(matcher: ScriptedMatcher, budgets: GrammarBudgets | None = None) -> GrammarState:
    return GrammarState(matcher, SAMPLING, 8, budgets, GrammarLanes())


def _settle(state: GrammarState) -> None:
    deadline_s = time.monotonic() + 10
    while not state.is_settled:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def _take(state: GrammarState, num_tokens: int) -> None:
    for _ in range(num_tokens):
        state.accept(4)
        _settle(state)


# --- the clock ---


def test_the_dearer_a_grammar_is_the_humbler_the_thread_that_works_for_it() -> None:
    matcher = ScriptedMatcher(costs_s=(0.0,) * 5 + (2e-3,) * 20 + (8e-3,) * 20 + (0.0,) * 60)
    state = _on_lanes(matcher)
    _take(state, 105)
    changes = [pace for i, pace in enumerate(matcher.paces) if i == 0 or pace is not matcher.paces[i - 1]]
    assert changes == [Pace.HERE, Pace.ASIDE, Pace.IDLE, Pace.ASIDE, Pace.HERE] and state.failure is None
    assert 5 <= matcher.paces.index(Pace.ASIDE) < 10, "its mean must not take long to rise"
    assert state.spent_s == pytest.approx(0.2)


def test_a_single_dear_token_costs_the_others_no_second_one() -> None:
    matcher = ScriptedMatcher(costs_s=(0.0, 0.0, 0.1, 0.0))
    state = _on_lanes(matcher)
    _take(state, 4)
    assert matcher.paces == [Pace.HERE, Pace.HERE, Pace.HERE, Pace.IDLE] and state.failure is None


@pytest.mark.parametrize("costs_s", [(0.0, 0.25), (0.03,)])
def test_a_grammar_over_its_budget_fails_and_says_what_it_cost(costs_s: tuple[float, ...]) -> None:
    state = _on_lanes(ScriptedMatcher(costs_s=costs_s))
    _take(state, 30)
    assert state.failure is not None and "too costly" in state.failure and "ms" in state.failure


def test_who_is_done_anyway_is_let_go() -> None:
    state = scripted(ScriptedMatcher(costs_s=(0.19,)))
    state.accept(4, is_last=True)
    assert state.failure is None


def test_the_news_of_a_lane_come_when_the_state_is_whole() -> None:
    gate, told = threading.Event(), threading.Event()
    state = _on_lanes(ScriptedMatcher(costs_s=(1e-3,) * 20, gate=gate), EVERYTHING_ASIDE)
    state.on_settled = told.set
    for token_id in (4, 5):
        state.accept(token_id)  # the first here, as nothing is known of it yet
    assert [state.is_settled, told.is_set()] == [False, False]
    gate.set()
    assert told.wait(5)
    _settle(state)
    assert np.flatnonzero(allowed_tokens(state.mask(), 256)).tolist() == [4, 5, 6, 7]


def test_a_library_that_breaks_down_on_a_lane_fails_its_own_sequence() -> None:
    class Panicking(ScriptedMatcher):
        def may_end(self) -> bool:
            if self.paces and self.paces[-1] is not Pace.HERE:
                raise KeyboardInterrupt  # as a panic in Rust, no Exception
            return False

    lanes = GrammarLanes()
    broken = GrammarState(Panicking(costs_s=(1e-3,)), SAMPLING, 8, EVERYTHING_ASIDE, lanes)
    sound = GrammarState(ScriptedMatcher(costs_s=(1e-3,)), SAMPLING, 8, EVERYTHING_ASIDE, lanes)
    for state in (broken, sound):
        _take(state, 3)
    assert broken.failure is not None and "broke down" in broken.failure
    assert sound.failure is None


@pytest.mark.parametrize("budgets", [EVERYTHING_ASIDE, EVERYTHING_IDLE])
def test_threads_of_the_library_s_own_give_the_same_masks(budgets: GrammarBudgets) -> None:
    backend = LlguidanceBackend(bytes_vocabulary(), 256)
    text, lanes = '{"a": -305, "b": "yy"}', GrammarLanes()
    schema = '{"type":"object","properties":{"a":{"type":"integer"},"b":{"enum":["x","yy"]}}}'
    compiled = backend.compile(Grammar(kind=GrammarKind.JSON_SCHEMA, text=schema))
    here = GrammarState(compiled.matcher(), SAMPLING, 8)
    aside = GrammarState(compiled.matcher(), SAMPLING, 8, budgets, lanes)
    for token_id in ids_of(text)[:-1]:
        assert np.array_equal(here.mask(), aside.mask())
        here.accept(token_id)
        aside.accept(token_id)
        _settle(aside)
    assert aside.pace is (Pace.ASIDE if budgets is EVERYTHING_ASIDE else Pace.IDLE) and aside.failure is None
    aside.accept(ids_of("?")[0])
    _settle(aside)
    assert "after token" in str(aside.failure)


def test_the_library_s_threads_have_their_priority_and_their_clock() -> None:
    backend = LlguidanceBackend(bytes_vocabulary(), 256)
    matcher = backend.compile(AMBIGUOUS).matcher()
    words = np.zeros(8, np.int32)
    for pace in (Pace.ASIDE, Pace.IDLE):
        before_s = matcher.cpu_s(pace)
        for token_id in ids_of("abab" * 3):
            matcher.fill(words, pace)
            matcher.accept(token_id, pace)
        assert 0 < matcher.cpu_s(pace) - before_s < 5.0
    found = {}
    for task in Path("/proc/self/task").iterdir():
        found[(task / "comm").read_text().strip()] = int(task.name)
    assert os.sched_getscheduler(found["mask-IDLE"]) == os.SCHED_IDLE
    assert os.getpriority(os.PRIO_PROCESS, found["mask-ASIDE"]) >= 10


# --- nothing is sampled that is not allowed ---


def test_a_mask_without_a_token_is_a_failure() -> None:
    state = scripted(ScriptedMatcher(allowed=()))
    state.mask()
    assert state.failure is not None and "no token goes on" in state.failure
    state = scripted(ScriptedMatcher(allowed=(2,)))
    state.accept(4)
    assert state.failure is not None, "an EOS where the output is not complete is no token of it"


@pytest.mark.parametrize("token_id", [0, 1, 2, 255])
def test_what_the_mask_bars_is_never_taken_not_even_as_an_end(token_id: int) -> None:
    # A sampler that finds no likely token returns token 0, which may be an EOS.
    state = scripted(ScriptedMatcher(), eos_token_ids=(0, 2))
    state.mask()
    sampling = SamplingParams(seed=0, eos_token_ids=(0, 2), grammar=ANY)
    follow(sampling, state, token_id, 1, 10)
    assert state.failure is not None and f"token {token_id} was sampled" in state.failure


def test_what_the_mask_allows_is_taken() -> None:
    state = scripted(ScriptedMatcher())
    state.mask()
    for token_id in (4, 7):
        assert ended(state, follow(SAMPLING, state, token_id, 1, 10)) is None
    assert state.failure is None


# --- the library's limits ---


def _walk(grammar: Grammar, text: str) -> tuple[int, str | None]:
    """Give a text to a grammar; return how many tokens were taken, and why no more."""
    matcher = LlguidanceBackend(bytes_vocabulary(), 256).compile(grammar).matcher()
    state = GrammarState(matcher, SAMPLING, 8, GrammarBudgets(mean_s=1e6, worst_s=1e6))
    for number, token_id in enumerate(ids_of(text)):
        state.accept(token_id)
        if state.failure is not None:
            return number, state.failure
    return len(text), None


def test_ambiguity_is_ended_before_it_costs_much() -> None:
    num_taken, failure = _walk(AMBIGUOUS, "ab" * 400)
    assert failure is not None and "items" in failure and 8 < num_taken < 200


def test_a_grammar_that_is_wide_and_not_ambiguous_may_be() -> None:
    names = [f"name_{i}" for i in range(300)]
    schema = {"type": "object", "properties": {name: {"type": "integer"} for name in names}}
    wide = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))
    assert _walk(wide, json.dumps({"name_7": 1, "name_250": 2}))[1] is None
    words = " | ".join(f'"w{i}"' for i in range(1000))
    assert _walk(Grammar(kind=GrammarKind.LARK, text=f"start: ({words})+"), "w1w999w500" * 20)[1] is None


def test_a_long_text_that_is_forced_is_not_spelled_anew_with_every_token() -> None:
    vocabulary = bytes_vocabulary()
    asked: list[int] = []

    def encode(text: str) -> list[int]:
        asked.append(len(text))
        return ids_of(text)

    vocabulary = type(vocabulary)(
        vocabulary.tokens, vocabulary.special_ids, vocabulary.eos_token_ids, vocabulary.bos_token_id, encode
    )
    text = "lorem ipsum " * 2000
    grammar = Grammar(kind=GrammarKind.CHOICE, text=json.dumps([text]))
    state = GrammarState(LlguidanceBackend(vocabulary, 256).compile(grammar).matcher(), SAMPLING, 8)
    for token_id in ids_of(text[:50]):
        assert np.flatnonzero(allowed_tokens(state.mask(), 256)).tolist() == [token_id]
        state.accept(token_id)
    assert asked and max(asked) <= 1024


# --- threads that compile and replay ---


def _wait(condition: Callable[[], bool], threads: GrammarThreads) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        threads.let_go()
        time.sleep(0.002)


def test_what_takes_long_holds_up_nothing_behind_it() -> None:
    threads, gate = GrammarThreads(), threading.Event()
    stuck = [threads.submit(lambda: gate.wait(20)) for _ in range(NUM_QUICK + 1)]
    quick = threads.submit(lambda: 7)
    _wait(quick.done, threads)
    assert quick.result() == 7 and not any(future.done() for future in stuck)
    assert NUM_QUICK <= len(threads._let_go) <= MAX_LET_GO
    gate.set()
    assert [future.result(5) for future in stuck] == [True] * len(stuck)


def test_a_bounded_number_of_threads_is_let_go() -> None:
    threads, gate = GrammarThreads(), threading.Event()
    for _ in range(2 * MAX_LET_GO):
        threads.submit(lambda: gate.wait(20))
    end_s = time.monotonic() + 12 * HELD_UP_S
    while time.monotonic() < end_s:
        threads.let_go()
        time.sleep(0.002)
    assert len(threads._let_go) <= MAX_LET_GO
    gate.set()


def _compiler(tmp_path: Path, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> GrammarCompiler:
    monkeypatch.setattr("engine.grammar_compiler.open_backend", lambda *_: backend)
    return GrammarCompiler("auto", byte_level_gguf(tmp_path / "tiny.gguf"), 256)


async def test_what_was_emitted_is_replayed_in_slices_and_a_slow_one_on_its_lane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = ScriptedMatcher(costs_s=(SLICE_S / 4,) * 400 + (0.01,))
    compiler = _compiler(tmp_path, ScriptedBackend([matcher]), monkeypatch)
    slices: list[int] = []
    replay = GrammarState.replay
    monkeypatch.setattr(
        GrammarState,
        "replay",
        lambda self, *given: slices.append(given[1]) or replay(self, *given),  # type: ignore[func-returns-value]
    )
    state = await compiler.state_of(SAMPLING, (4,) * 500)
    assert state is not None and state.is_settled and len(matcher.paces) == 500
    assert len(slices) >= 100 and slices == sorted(set(slices))
    assert set(matcher.paces[:400]) == {Pace.HERE} and matcher.paces[-1] is Pace.IDLE


async def test_a_replay_that_costs_too_much_is_a_failure_of_the_grammar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = _compiler(tmp_path, ScriptedBackend([ScriptedMatcher(costs_s=(0.019,))]), monkeypatch)
    with pytest.raises(GrammarError, match="too costly"):
        await compiler.state_of(SAMPLING, (4,) * 1000)


async def test_a_machine_without_time_is_no_fault_of_the_grammar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler("auto", byte_level_gguf(tmp_path / "tiny.gguf"), 300)
    monkeypatch.setattr("engine.grammar_compiler.COMPILE_BUDGET_S", 0.0)
    with pytest.raises(GrammarUnavailable, match="no time"):
        await compiler.state_of(SAMPLING, ())


async def test_many_compile_at_once_and_each_follows_its_own(tmp_path: Path) -> None:
    compiler = GrammarCompiler("auto", byte_level_gguf(tmp_path / "tiny.gguf"), 300)
    grammars = [Grammar(kind=GrammarKind.REGEX, text=f"[a-z]{{{n}}}!") for n in range(2, 40)]
    asked = [
        compiler.state_of(SamplingParams(seed=0, eos_token_ids=(2,), grammar=g), (byte_id("x"),)) for g in grammars
    ]
    states = await asyncio.gather(*asked)
    for length, state in enumerate(states, start=2):
        assert state is not None
        for _ in range(length - 1):
            state.accept(byte_id("q"))
        assert np.flatnonzero(allowed_tokens(state.mask(), 300)).tolist() == [byte_id("!")]
