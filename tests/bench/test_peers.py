"""The comparison with peers: recipes and targets fit together, servers stop surely, ratios are those of one round."""

from __future__ import annotations

import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from baton.options import BY_KEY
from bench.peers import processes, results, serving
from bench.peers.layout import CHECKOUT, Layout
from bench.peers.measuring import Manners, Measuring
from bench.peers.processes import Process, family, machine_busy_s, send_signal, set_niceness
from bench.peers.recipes import Cores, Recipe, recipes
from bench.peers.results import FIGURES, Comparison, Measure, Target, Turn, outcome, overlap_tokens_per_s
from bench.peers.scenarios import Scenario, scenarios, targets, with_busy_arrivals
from bench.peers.serving import Server, ServingError, free_port, shown_command, start_command, stop_all
from bench.peers.summary import figures_tables, targets_table
from bench.workloads.closed import Closed
from bench.workloads.interference import Interference
from tests.bench.scenes import record, run

RECIPES = recipes(Layout(Path("/peers")), Cores())
SCENARIOS = scenarios(Cores(), 40.0)
CORE = (min(os.sched_getaffinity(0)),)


def tiny(label: str = "tiny", *options: str, cores: tuple[int, ...] = CORE) -> Recipe:
    command = (sys.executable, "-m", "tests.bench.slow_server", "--port", "{port}", *options)
    return Recipe(label, "baton", command, cores, "F32")


@pytest.fixture(autouse=True)
def own_mark(monkeypatch: pytest.MonkeyPatch) -> str:
    # A comparison may be running on this machine: its servers are not ours to see, let alone to end.
    mark = f"BENCH_PEERS_TEST_{os.getpid()}"
    monkeypatch.setattr(processes, "MARK", mark)
    monkeypatch.setattr(serving, "MARK", mark)
    return mark


class TestRecipes:
    @pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda r: r.slug)
    def test_each_can_be_started_as_it_is_written(self, recipe: Recipe) -> None:
        assert [part for part in recipe.command if "{port}" in part], "a server needs to be told its port"
        assert set(recipe.cores) <= set(Cores().both) and recipe.cores
        assert recipe.ready_path.startswith("/")
        assert all(re.fullmatch(r"[A-Z_]+", name) for name, _ in recipe.environment)
        command = start_command(recipe, 8123, "mark")
        assert command[:3] == ["taskset", "-c", ",".join(map(str, recipe.cores))]
        assert command[3] == "env" and any(part.endswith("=mark") for part in command)
        assert not any("{" in part and "port" in part for part in command)
        assert sum("8123" in part for part in command) == 1

    def test_labels_make_different_log_files(self) -> None:
        assert len({recipe.slug for recipe in RECIPES.values()}) == len(RECIPES)

    def test_one_core_means_one_core_and_one_thread(self) -> None:
        single = [r for label, r in RECIPES.items() if "1 core" in label]
        assert single
        for recipe in single:
            threads = recipe.command[recipe.command.index("-t") + 1]
            assert len(recipe.cores) == 1 and threads == recipe.command[recipe.command.index("-tb") + 1] == "1"

    def test_a_tuned_recipe_is_its_default_with_more_options(self) -> None:
        for default, tuned in (("llama Q4_0 default", "llama Q4_0 tuned"), ("vLLM default", "vLLM tuned")):
            before, after = RECIPES[default], RECIPES[tuned]
            assert (before.tuning, after.tuning) == ("default", "tuned")
            assert after.command[: len(before.command)] == before.command and len(after.command) > len(before.command)

    def test_every_option_given_to_baton_is_one_it_has(self) -> None:
        for recipe in RECIPES.values():
            if "baton" not in recipe.command:
                continue
            for part in recipe.command[recipe.command.index("baton") :]:
                if part.startswith("--"):
                    assert part[2:].replace("-", "_") in BY_KEY, f"{recipe.label}: {part}"

    def test_what_is_shown_names_no_folder_above_the_checkout(self) -> None:
        for recipe in recipes(Layout(), Cores()).values():
            assert str(CHECKOUT) not in shown_command(recipe, 8000)


class TestTargets:
    def test_every_server_of_a_scenario_has_a_recipe(self) -> None:
        for scenario in SCENARIOS.values():
            assert set(scenario.recipes) <= set(RECIPES), scenario.name
            assert all(name in FIGURES for name, _ in scenario.figures)

    @pytest.mark.parametrize("target", targets(), ids=lambda t: t.what)
    def test_each_is_measured_by_its_scenario(self, target: Target) -> None:
        for measure in (target.above, target.below):
            if measure is None:
                continue
            scenario = SCENARIOS[measure.scenario]
            assert measure.recipe in scenario.recipes
            assert (measure.figure, measure.phase) in scenario.figures
            has_phases = isinstance(scenario.workload, Interference)
            assert (measure.phase is not None) == has_phases

    def test_prompts_arrive_as_often_as_keeps_a_core_busy_for_seven_tenths(self) -> None:
        busy = with_busy_arrivals(SCENARIOS["interference-busy"], 2.1)
        assert isinstance(busy.workload, Interference) and busy.workload.every_s == 3.0


class TestServing:
    def test_a_server_is_pinned_answers_and_stops_with_all_its_family(self, tmp_path: Path) -> None:
        core = max(os.sched_getaffinity(0))
        with serving.serving(tiny("tiny", "--family", cores=(core,)), tmp_path) as server:
            members = server.processes()
            assert len(members) == 5, "itself, and the four that slow_server tells of"
            assert {frozenset(os.sched_getaffinity(p.pid)) for p in members} == {frozenset({core})}
            assert server.start_s > 0 and server.cpu_s() > 0 and server.memory_bytes() > 1 << 20
            assert server.router_cpu_s() is None
        assert server.processes() == [] and not any(Path(f"/proc/{p.pid}/cwd").exists() for p in members)
        server.stop()
        assert (tmp_path / "tiny.log").read_text().startswith("$ taskset -c")

    def test_one_that_ends_at_once_is_told_with_the_end_of_its_log(self, tmp_path: Path) -> None:
        with pytest.raises(ServingError, match=r"(?s)ended with status 3.*no such model"):
            with serving.serving(tiny("broken", "--fail"), tmp_path):
                pass

    def test_one_that_never_answers_is_given_up_and_ended(self, tmp_path: Path, own_mark: str) -> None:
        server = Server(tiny("deaf", "--deaf"), free_port(), tmp_path / "deaf.log")
        try:
            with pytest.raises(ServingError, match=r"not ready after 1 s"):
                server.wait_ready(1.0)
        finally:
            server.stop(grace_s=0.2)
        assert server.has_ended and family(None, None) == []

    def test_what_a_killed_run_left_behind_is_found_and_ended(self, tmp_path: Path) -> None:
        server = Server(tiny("left"), free_port(), tmp_path / "left.log")
        try:
            server.wait_ready(20.0)
            assert stop_all() == 1 and family(None, None) == []
        finally:
            server.stop()

    def test_a_signal_never_reaches_another_process_with_the_same_id(self) -> None:
        stale = Process(os.getpid(), 1)
        send_signal(stale, signal.SIGKILL)  # were it sent, nobody would be here to go on

    def test_niceness_reaches_every_thread_and_the_session(self, tmp_path: Path) -> None:
        with serving.serving(tiny("tiny", "--family"), tmp_path) as server:
            set_niceness(server.processes(), 5)
            for process in server.processes():
                threads = [int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()]
                assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {5}
                session = Path(f"/proc/{process.pid}/autogroup")
                assert not session.exists() or session.read_text().split()[-1] == "5"

    def test_the_machine_counts_work(self) -> None:
        before_s = machine_busy_s()
        sum(i * i for i in range(3_000_000))
        assert machine_busy_s() > before_s


def turn(recipe: str, number: int, gap_s: float, **changes: object) -> Turn:
    streams = [record([0.5 + i * gap_s for i in range(11)]), record([1.0 + i * gap_s for i in range(11)])]
    made = Turn("one-stream", number, recipe, (run(streams, server=recipe),), start_s=2.0)
    changed: Turn = msgspec.structs.replace(made, **changes)
    return changed


class TestRatios:
    RATIO = Target("a / b", Measure("one-stream", "a", "TPOT ms"), Measure("one-stream", "b", "TPOT ms"), 0.6)

    def test_only_turns_of_one_round_are_divided(self) -> None:
        # The machine is half as fast in round 2: ratios stay, medians of figures would not.
        turns = [turn("a", 1, 0.01), turn("b", 1, 0.02), turn("b", 2, 0.04), turn("a", 2, 0.024)]
        found = outcome(turns, self.RATIO)
        assert found is not None and found.n == 2
        assert found.low == pytest.approx(0.5) and found.high == pytest.approx(0.6)
        assert found.median == pytest.approx(0.55) and self.RATIO.is_met(found.median)
        assert not self.RATIO.is_met(0.61) and replace(self.RATIO, is_at_most=False).is_met(0.61)

    def test_disturbed_and_failed_turns_give_none_and_a_repeated_one_counts(self) -> None:
        bad = run([record([0.1, 0.2], error="gone")])
        turns = [
            turn("a", 1, 0.01, is_disturbed=True),
            turn("a", 1, 0.03),
            turn("b", 1, 0.02),
            turn("a", 2, 0.01, is_disturbed=True),
            turn("b", 2, 0.02),
            turn("a", 3, 0.01),
            turn("b", 3, 0.02, runs=(bad,)),
        ]
        found = outcome(turns, self.RATIO)
        assert found is not None and found.n == 1 and found.median == pytest.approx(1.5)
        assert outcome(turns[3:], self.RATIO) is None

    def test_a_bound_may_be_on_the_figure_itself(self) -> None:
        target = Target("start", Measure("one-stream", "a", "start s"), None, 4.0)
        found = outcome([turn("a", 1, 0.01), turn("a", 2, 0.01, start_s=3.0)], target)
        assert found is not None and (found.median, found.low, found.high) == (2.5, 2.0, 3.0)

    def test_decode_rate_counts_only_while_all_streams_run(self) -> None:
        # Both run from 1.0 to 2.0; in that time the first gives 5 tokens, the second 10 (a chunk of two each 0.2 s).
        first = record([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
        second = record([1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4], chunk_tokens=[1, 2, 2, 2, 2, 2, 2, 2])
        assert overlap_tokens_per_s([first, second]) == pytest.approx(15.0)
        assert overlap_tokens_per_s([first, record([2.5, 2.6])]) is None
        assert overlap_tokens_per_s([record([0.1, 0.2], error="gone")]) is None

    def test_prefill_rate_and_router_time_per_token(self) -> None:
        one = turn("a", 1, 0.01, runs=(run([record([0.5])]),), router_cpu_s=0.0005)
        assert FIGURES["prefill tokens/s"](one, None) == pytest.approx(16.0)
        assert FIGURES["router us/token"](one, None) == pytest.approx(500.0)
        assert FIGURES["router us/token"](turn("a", 1, 0.01), None) is None

    def test_phases_of_interference_are_kept_apart(self) -> None:
        steady = record([0.1 * i for i in range(50)], kind="steady")
        stalled = record([0.1 * i for i in range(25)] + [4.0 + 0.1 * i for i in range(25)], kind="steady")
        late = record([3.0], started_s=1.0, kind="arrival")
        runs = (
            run([steady], parameters={"phase": "alone"}),
            run([stalled, late], parameters={"phase": "arrivals"}),
        )
        both = turn("a", 1, 0.01, runs=runs)
        alone, beside = (FIGURES["steady ITL max ms"](both, phase) for phase in ("alone", "arrivals"))
        assert alone == pytest.approx(100.0) and beside == pytest.approx(1600.0)
        assert FIGURES["long TTFT ms"](both, "arrivals") == pytest.approx(2000.0)
        assert FIGURES["long TTFT ms"](both, None) is None

    def test_a_saved_comparison_reads_back_and_a_damaged_one_is_refused(self, tmp_path: Path) -> None:
        made = Comparison((turn("a", 1, 0.01),), {"a": "run a"}, "a machine", "2026-03-05T10:00:00+00:00")
        path = tmp_path / "deep" / "made.json"
        results.save(path, made)
        assert results.load(path) == made
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match="not a comparison"):
            results.load(path)


class TestMeasuring:
    def test_servers_take_turns_and_the_ratio_is_that_of_their_pace(self, tmp_path: Path) -> None:
        known = {r.label: r for r in (tiny("quick", "--gap-ms", "10"), tiny("slow", "--gap-ms", "30"))}
        workload = Closed(concurrency=2, requests=2, prompt_tokens=8, output_tokens=12)
        scenario = Scenario("one-stream", ("quick", "slow"), workload, CORE, (("TPOT ms", None),))
        said: list[str] = []
        manners = Manners(num_rounds=2, max_foreign_cores=99.0, quiet_budget_s=0.0, idle_check_s=0.1)
        measuring = Measuring(known, manners, tmp_path, said.append)
        measuring.measure(scenario, scenario.recipes)
        turns = measuring.turns
        assert [(t.round, t.recipe) for t in turns] == [(1, "quick"), (1, "slow"), (2, "slow"), (2, "quick")]
        assert all(t.num_errors == 0 and t.memory_bytes > 0 and t.foreign_cores >= 0 for t in turns)
        assert turns[0].runs[0].seed == turns[1].runs[0].seed != turns[2].runs[0].seed
        ratio = Target("pace", Measure("one-stream", "quick", "TPOT ms"), Measure("one-stream", "slow", "TPOT ms"), 0.6)
        found = outcome(turns, ratio)
        assert found is not None and found.n == 2 and 0.2 < found.median < 0.7
        assert family(None, None) == []
        self._tables_show_it(measuring.comparison(), scenario, ratio)

    def _tables_show_it(self, comparison: Comparison, scenario: Scenario, ratio: Target) -> None:
        assert set(comparison.commands) == {"quick", "slow"}
        (table,) = figures_tables(comparison, [scenario])
        assert table.row_count == 2
        reached = targets_table(comparison, [ratio, replace(ratio, below=Measure("one-stream", "none", "TPOT ms"))])
        assert list(reached.columns[-1].cells) == ["yes", "not measured"]

    def test_a_disturbed_turn_is_done_again_with_other_prompts(self, tmp_path: Path) -> None:
        # No more than minus one core may be used by others: every turn is disturbed.
        manners = Manners(num_rounds=1, max_foreign_cores=-1.0, num_repeats=1, quiet_budget_s=0.0, idle_check_s=0.1)
        measuring = Measuring({"tiny": tiny()}, manners, tmp_path, lambda _: None)
        workload = Closed(concurrency=1, requests=1, prompt_tokens=8, output_tokens=2)
        measuring.measure(Scenario("one-stream", ("tiny",), workload, CORE, (("TPOT ms", None),)), ("tiny",))
        assert [t.is_disturbed for t in measuring.turns] == [True, True]
        assert len({t.runs[0].seed for t in measuring.turns}) == 2

    def test_a_server_that_cannot_start_is_said_and_left_out(self, tmp_path: Path) -> None:
        said: list[str] = []
        known = {"broken": tiny("broken", "--fail"), "tiny": tiny()}
        measuring = Measuring(known, Manners(num_rounds=2, quiet_budget_s=0.0, idle_check_s=0.1), tmp_path, said.append)
        measuring.measure(Scenario("start", ("broken", "tiny"), None, CORE, (("start s", None),)), ("broken", "tiny"))
        assert [t.recipe for t in measuring.turns] == ["tiny", "tiny"] and all(t.start_s > 0 for t in measuring.turns)
        assert any("broken" in line and "no such model" in line for line in said)
