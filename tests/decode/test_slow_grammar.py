"""Sequences whose grammars are slow, through both steppers: they sit out, nobody waits, and no token changes."""

from __future__ import annotations

import threading
import time

import pytest

from decode.stepper import Abandoned, DropSequence, StepRows
from engine.grammar import GrammarBudgets, GrammarLanes, GrammarSettled
from engine.loading import LoadedModel
from prefill.stepper import AbortJob, FirstTokenReady, PromptFailed, TransferEnded
from protocol.request import FinishReason, SamplingParams
from tests.decode.pair import Pair, params, prompt_of
from tests.decode.test_grammar import BACKEND, CASES, alone
from tests.decode.test_run_ahead import AheadPair
from tests.engine.bytes_vocabulary import EOS_ID
from tests.engine.scripted_matcher import ANY, ScriptedBackend, ScriptedMatcher
from tests.engine.tiny import tiny_model

ASIDE = GrammarBudgets(slow_s=0.0, heavy_s=1.0, mean_s=10.0, worst_s=10.0)
IDLE = GrammarBudgets(slow_s=0.0, heavy_s=0.0, mean_s=10.0, worst_s=10.0)
BOUND = SamplingParams(seed=1, temperature=1.0, max_tokens=12, eos_token_ids=(EOS_ID,), grammar=ANY)
DEAR = (1e-3,)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def _slow(pair: Pair, budgets: GrammarBudgets = ASIDE) -> Pair:
    pair.grammars, pair.budgets, pair.lanes = BACKEND, budgets, GrammarLanes()
    return pair


def _scripted(model: LoadedModel, *matchers: ScriptedMatcher) -> Pair:
    """Give a pair whose grammars are these, in the order in which sequences are made: decode's before prefill's."""
    pair = _slow(Pair(model))
    pair.grammars = ScriptedBackend(list(matchers))
    return pair


@pytest.mark.parametrize("budgets", [ASIDE, IDLE])
def test_a_slow_grammar_changes_no_token_of_anybody(model: LoadedModel, budgets: GrammarBudgets) -> None:
    pair = _slow(Pair(model), budgets)
    for transfer_id, (prompt, sampling) in CASES.items():
        assert pair.place(transfer_id, prompt, sampling, [])
        pair.run(num_steps=2)
    pair.run()
    assert pair.tokens == {i: alone(model, prompt, sampling) for i, (prompt, sampling) in CASES.items()}
    assert not pair.failed
    pair.decode_pool.check(num_expected_leased=0)


def test_on_a_device_a_slow_grammar_changes_no_token_either(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny_model(tmp_path_factory.mktemp("torch"), kernels="torch")
    pair = _slow(AheadPair(model))
    for transfer_id, (prompt, sampling) in CASES.items():
        assert pair.place(transfer_id, prompt, sampling, [])
        pair.run(num_steps=1)
    pair.run()
    assert pair.tokens == {i: alone(model, prompt, sampling) for i, (prompt, sampling) in CASES.items()}


@pytest.mark.parametrize("is_replayed", [True, False])
def test_placed_again_a_slow_sequence_goes_on_token_for_token(model: LoadedModel, is_replayed: bool) -> None:
    prompt, sampling = CASES[5]
    expected = alone(model, prompt, sampling)
    pair = _slow(Pair(model))
    assert pair.place(1, prompt, sampling, expected[:9], is_replayed)
    pair.run()
    assert pair.tokens[1] == expected and pair.reasons[1] is FinishReason.STOP


def test_steps_go_on_while_a_grammar_works_and_its_token_is_told_afterwards(model: LoadedModel) -> None:
    gate = threading.Event()
    pair = _scripted(model, ScriptedMatcher(costs_s=DEAR, gate=gate), ScriptedMatcher())
    assert pair.place(1, prompt_of(1, 9), BOUND, [])
    assert pair.place(2, prompt_of(2, 9), params(2, max_tokens=20), [])
    for _ in range(40):
        pair.decode.step()
    told = [row for emission in pair.from_decode if isinstance(emission, StepRows) for _, row in emission.rows]
    plain = [row for row in told if row.request_id == 2]
    assert len(plain) == 19 and plain[-1].finish_reason is FinishReason.LENGTH
    assert not [row for row in told if row.request_id == 1], "its second token waits for its grammar"
    assert pair.decode.num_running == pair.decode.num_behind == 1, "which is no work of the compute thread"
    assert not pair.decode.step()
    gate.set()
    pair.run()
    assert len(pair.tokens[1]) == BOUND.max_tokens and set(pair.tokens[1]) <= {4, 5, 6, 7}
    assert [row.index for row in pair.rows[1]] == list(range(1, BOUND.max_tokens))
    pair.decode_pool.check(num_expected_leased=0)


def test_who_leaves_while_its_grammar_works_leaves_nothing_behind(model: LoadedModel) -> None:
    gate = threading.Event()
    pair = _scripted(model, ScriptedMatcher(costs_s=DEAR, gate=gate), ScriptedMatcher())
    assert pair.place(1, prompt_of(1, 9), BOUND, [])
    for _ in range(5):
        pair.decode.step()
    assert pair.decode.num_behind == 1
    pair.decode.handle(DropSequence(1))
    assert pair.decode.num_behind == 0
    gate.set()
    time.sleep(0.02)
    pair.decode.handle(GrammarSettled())
    pair.run()
    assert 1 not in pair.rows and not pair.failed
    pair.decode_pool.check(num_expected_leased=0)


@pytest.mark.parametrize("costs_s", [(0.0,), DEAR])
def test_a_grammar_that_fails_ends_its_sequence_as_its_own_fault(
    model: LoadedModel, costs_s: tuple[float, ...]
) -> None:
    pair = _scripted(model, ScriptedMatcher(costs_s=costs_s, fails_at=4), ScriptedMatcher())
    assert pair.place(1, prompt_of(1, 9), BOUND, [])
    assert pair.place(2, *CASES[2], [])
    pair.run()
    assert [(transfer_id, failure and failure.is_of_grammar) for transfer_id, failure in pair.failed] == [(1, True)]
    assert len(pair.tokens[1]) == 3, "what obeyed was told"
    assert pair.tokens[2] == alone(model, *CASES[2])
    pair.decode_pool.check(num_expected_leased=0)


def test_a_first_token_that_decode_s_own_grammar_refuses_ends_the_sequence(model: LoadedModel) -> None:
    pair = _scripted(model, ScriptedMatcher(fails_at=1), ScriptedMatcher())
    assert pair.place(1, prompt_of(1, 9), BOUND, [])
    failures = [e.failure for e in pair.from_decode if isinstance(e, Abandoned)]
    assert len(failures) == 1 and failures[0] is not None
    assert failures[0].is_of_grammar and failures[0].reason.endswith("it gave up")
    pair.decode_pool.check(num_expected_leased=0)


# --- prefill ---


def _first_tokens(pair: Pair) -> list[int]:
    """Step prefill for a while; return whose first tokens it has told so far."""
    for _ in range(10):
        pair.prefill.step()
    return [e.transfer_id for e in pair.from_prefill if isinstance(e, FirstTokenReady)]


def test_a_first_token_waits_for_its_grammar_and_others_do_not(model: LoadedModel) -> None:
    gate = threading.Event()
    pair = _scripted(model, ScriptedMatcher(costs_s=DEAR, gate=gate))
    pair.begin(1, prompt_of(1, 9), BOUND, [4])
    assert _first_tokens(pair) == [] and pair.prefill.num_behind == 1
    pair.begin(2, prompt_of(2, 9), params(2))
    assert _first_tokens(pair) == [2]
    gate.set()
    while pair.prefill.num_behind:
        pair.prefill.handle(GrammarSettled())
        pair.prefill.step()
    assert _first_tokens(pair) == [2, 1]


def test_an_abort_while_the_first_token_waits_tells_nothing_and_holds_nothing(model: LoadedModel) -> None:
    gate = threading.Event()
    pair = _scripted(model, ScriptedMatcher(costs_s=DEAR, gate=gate))
    pair.begin(1, prompt_of(1, 9), BOUND, [4])
    assert _first_tokens(pair) == []
    pair.prefill.handle(AbortJob(1))
    pair.prefill.handle(TransferEnded(1))
    assert pair.prefill.pool_counts.leased, "a block may not go while its token waits"
    gate.set()
    while pair.prefill.num_behind:
        pair.prefill.step()
    assert _first_tokens(pair) == [] and pair.prefill.pool_counts.leased == 0


@pytest.mark.parametrize("matcher", [ScriptedMatcher(fails_at=1), ScriptedMatcher(allowed=(2,), fails_at=9)])
def test_a_first_token_whose_grammar_fails_is_never_told(model: LoadedModel, matcher: ScriptedMatcher) -> None:
    pair = _scripted(model, matcher)
    pair.begin(1, prompt_of(1, 9), BOUND)
    assert _first_tokens(pair) == []
    failures = [e.failure for e in pair.from_prefill if isinstance(e, PromptFailed)]
    assert len(failures) == 1 and failures[0].is_of_grammar
