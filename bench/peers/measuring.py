"""Take turns: start a scenario's servers, let one compute at a time, and note who else used the machine meanwhile.

for each scenario:
    start its servers, one after the other ─► all stand idle (checked)
    for each round:  for each server, forwards and then backwards:
        wait until others leave the machine alone ─► run the workload ─► a Turn
        disturbed? the same turn again with another seed, a few times
    stop its servers
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import uvloop

from bench.figures import figures
from bench.generator import Listener, run_workload
from bench.machine import machine
from bench.peers import results
from bench.peers.processes import machine_busy_s, set_niceness, vector_extensions
from bench.peers.recipes import Recipe
from bench.peers.results import Comparison, Turn
from bench.peers.scenarios import Scenario, long_prompt_alone, with_busy_arrivals
from bench.peers.serving import Server, ServingError, serving
from bench.records import Run
from bench.servers import Server as Target
from bench.workloads.interference import Interference
from bench.workloads.plan import Workload
from protocol.errors import ConfigError

_MAX_IDLE_CORES: Final = 0.02
_QUIET_LOOK_S: Final = 1.0
# A turn that is done again must not meet prompts that a prefix cache has seen.
_SEED_STEP: Final = 1000

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Manners:
    """How a comparison is made.

    Attributes:
        max_foreign_cores: a turn during which others kept more processors busy than this is disturbed.
        num_repeats: how often a disturbed turn is done again.
        quiet_budget_s: how long to wait, before a turn, for others to become quiet.
        niceness: of servers and client alike; below 0 they come before whatever else the machine does (root only).
        idle_check_s: how long servers are watched before the first turn, and left alone before that.
    """

    num_rounds: int = 3
    seed: int = 1
    max_foreign_cores: float = 0.15
    num_repeats: int = 2
    quiet_budget_s: float = 60.0
    idle_check_s: float = 3.0
    niceness: int = 0


class _Remarks(Listener):
    def __init__(self, say: Say) -> None:
        self._say = say

    def line(self, text: str) -> None:
        self._say(f"    {text}")


class Measuring:
    """One comparison in the making; `turns` holds what has been measured so far."""

    def __init__(self, recipes: dict[str, Recipe], manners: Manners, logs: Path, say: Say) -> None:
        self._recipes, self._manners, self._logs, self._say = recipes, manners, logs, say
        self.turns: list[Turn] = []
        self._commands: dict[str, str] = {}

    def comparison(self) -> Comparison:
        """Return what there is so far, as it is written to disk."""
        made_at = datetime.now(UTC).isoformat(timespec="seconds")
        where = f"{machine()}, {vector_extensions()}"
        return Comparison(tuple(self.turns), dict(self._commands), where, made_at, self._manners.niceness)

    def measure(self, scenario: Scenario, only: Sequence[str] | None = None) -> None:
        """Run every round of a scenario, or of those of its servers that `only` names.

        A server that cannot be started is reported and left out.
        """
        labels = [label for label in scenario.recipes if only is None or label in only]
        if scenario.workload is None:
            for number in range(1, self._manners.num_rounds + 1):
                for label in labels:
                    self._measure_start(scenario, label, number)
            return
        with contextlib.ExitStack() as stack:
            servers = self._start_all(stack, labels)
            if not servers:
                return
            self._check_idle(servers)
            if scenario.name == "interference-busy":
                scenario = self._timed(scenario, servers)
            for number in range(1, self._manners.num_rounds + 1):
                order = servers if number % 2 else servers[::-1]
                for server in order:
                    self._take_turn(scenario, server, [s for s in servers if s is not server], number)

    def _start_all(self, stack: contextlib.ExitStack, labels: Sequence[str]) -> list[Server]:
        servers = []
        for label in labels:
            try:
                server = stack.enter_context(serving(self._recipes[label], self._logs))
            except ServingError as error:
                self._say(f"  {error}")
                continue
            self._note(server)
            if self._manners.niceness:
                set_niceness(server.processes(), self._manners.niceness)
            self._say(f"  {label}: ready after {server.start_s:.1f} s, {server.memory_bytes() / 2**20:.0f} MiB")
            servers.append(server)
        return servers

    def _measure_start(self, scenario: Scenario, label: str, number: int) -> None:
        self._wait_until_quiet()
        try:
            with serving(self._recipes[label], self._logs) as server:
                self._note(server)
                turn = Turn(scenario.name, number, label, (), server.start_s, server.cpu_s())
        except ServingError as error:
            self._say(f"  {error}")
            return
        self._say(f"  {label}: ready after {turn.start_s:.1f} s")
        self.turns.append(turn)

    def _note(self, server: Server) -> None:
        self._commands[server.recipe.label] = server.shown_command

    def _check_idle(self, servers: Sequence[Server]) -> None:
        """Say which of the servers compute although nobody asks them anything: they would disturb the others."""
        time.sleep(self._manners.idle_check_s)
        before = [server.cpu_s() for server in servers]
        began_s = time.monotonic()
        time.sleep(self._manners.idle_check_s)
        took_s = time.monotonic() - began_s
        for server, used_s in zip(servers, before, strict=True):
            cores = (server.cpu_s() - used_s) / took_s
            if cores > _MAX_IDLE_CORES:
                self._say(f"  {server.recipe.label}: uses {cores:.3f} cores while idle")

    def _timed(self, scenario: Scenario, servers: Sequence[Server]) -> Scenario:
        (run,) = uvloop.run(self._run(long_prompt_alone(), servers[0], self._manners.seed))
        alone_ms = figures(run).ttft.p50_ms
        if alone_ms is None:
            raise ServingError(f"{servers[0].recipe.label}: did not answer the long prompts")
        timed = with_busy_arrivals(scenario, alone_ms / 1e3)
        if isinstance(timed.workload, Interference):
            self._say(f"  a long prompt takes {alone_ms:.0f} ms alone: one arrives each {timed.workload.every_s} s")
        return timed

    def _take_turn(self, scenario: Scenario, server: Server, others: Sequence[Server], number: int) -> None:
        for attempt in range(self._manners.num_repeats + 1):
            self._wait_until_quiet()
            seed = self._manners.seed + number + attempt * _SEED_STEP
            try:
                turn = self._turn(scenario, server, others, number, seed)
            except ConfigError as error:
                self._say(f"  {error}")
                return
            self.turns.append(turn)
            self._say(f"  round {number}: {_line_of(scenario, turn)}")
            if not turn.is_disturbed:
                return

    def _turn(self, scenario: Scenario, server: Server, others: Sequence[Server], number: int, seed: int) -> Turn:
        if scenario.workload is None:
            raise TypeError(f"{scenario.name} has no workload")
        with _pinned(scenario.client_cores):
            router_s, server_s, others_s = server.router_cpu_s(), server.cpu_s(), sum(s.cpu_s() for s in others)
            began_s, busy_s, client_s = time.monotonic(), machine_busy_s(), time.process_time()
            runs = uvloop.run(self._run(scenario.workload, server, seed))
            took_s, busy_s = time.monotonic() - began_s, machine_busy_s() - busy_s
            client_s = time.process_time() - client_s
            server_s, others_s = server.cpu_s() - server_s, sum(s.cpu_s() for s in others) - others_s
            router_after_s = server.router_cpu_s()
        foreign = max(0.0, busy_s - client_s - server_s - others_s) / took_s
        return Turn(
            scenario=scenario.name,
            round=number,
            recipe=server.recipe.label,
            runs=tuple(runs),
            start_s=server.start_s,
            server_cpu_s=server_s,
            router_cpu_s=None if router_s is None or router_after_s is None else router_after_s - router_s,
            idle_cpu_s=others_s,
            foreign_cores=foreign,
            memory_bytes=server.memory_bytes(),
            is_disturbed=foreign > self._manners.max_foreign_cores,
        )

    async def _run(self, workload: Workload, server: Server, seed: int) -> list[Run]:
        recipe = server.recipe
        target = Target(server.url, recipe.model, recipe.label, extra_body=recipe.extra_body)
        return await run_workload(workload, target, seed, listener=_Remarks(self._say))

    def _wait_until_quiet(self) -> None:
        give_up_s = time.monotonic() + self._manners.quiet_budget_s
        while time.monotonic() < give_up_s:
            busy_s = machine_busy_s()
            time.sleep(_QUIET_LOOK_S)
            if (machine_busy_s() - busy_s) / _QUIET_LOOK_S <= self._manners.max_foreign_cores:
                return


@contextlib.contextmanager
def _pinned(cores: Sequence[int]) -> Iterator[None]:
    """Keep this process, the load generator, on these cores for a while."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _line_of(scenario: Scenario, turn: Turn) -> str:
    shown = []
    for name, phase in scenario.figures:
        value = results.FIGURES[name](turn, phase)
        shown.append(f"{name}{f' {phase}' if phase else ''} {'-' if value is None else f'{value:.1f}'}")
    client = statistics.fmean(run.client_cpu_s / run.duration_s for run in turn.runs if run.duration_s) * 100
    notes = f"client {client:.1f} % of a core, others {turn.foreign_cores:.2f}, idle servers {turn.idle_cpu_s:.2f} s"
    notes += ", DISTURBED" if turn.is_disturbed else ""
    notes += f", {turn.num_errors} ERRORS" if turn.num_errors else ""
    return f"{turn.recipe}: {'; '.join(shown)} ({notes})"
