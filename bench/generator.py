"""The load generator: one workload against one server with one seed.

1. Calibrate: two short probes tell how many tokens the server makes of a text; lengths are corrected if need be.
2. Warm up: the workload's own requests of moderate size, sent together, in no figure.
3. For each plan: write every prompt, then play it in a window; while the window is open nothing else is done.
4. Each plan becomes a `Run`. What went wrong with a request is in its record; only a server that cannot be measured
   at all raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Final

from bench.client import Reply, stream
from bench.players import Prepared, Wire, play_closed, play_open, play_steady
from bench.records import Run, Slo
from bench.servers import Server, reach
from bench.text import Calibration, Part, Style, Writer, pieces
from bench.window import Progress, Window
from bench.workloads.plan import Ask, ClosedLoop, OpenLoop, Plan, SteadyStreams, Workload
from protocol.errors import ConfigError

# Short enough for a slow CPU, long enough to tell 1.00 tokens a word from 1.01.
_PROBE_PIECES: Final = (24, 152)
# After streams have been hung up on, the server needs a moment to notice.
_BETWEEN_PLANS_S: Final = 0.5


class Listener:
    """Hears what a generator does; this one ignores it."""

    def line(self, text: str) -> None:
        """Take a remark for the reader."""

    def progress(self, what: str, progress: Progress) -> None:
        """Take how far a window is, about once a second; must return at once, the clock is running."""

    def prompt(self, server: Server, ask: Ask, text: str) -> None:
        """Take the text of a prompt that will be sent."""


async def run_workload(
    workload: Workload, server: Server, seed: int, slo: Slo | None = None, listener: Listener | None = None
) -> list[Run]:
    """Measure a workload once and return a run for each of its plans.

    Cancel-safe: every connection is closed.

    Args:
        workload: what to send.
        server: whom to ask; an empty model name is asked for.
        seed: all texts and arrival times follow from it and the workload's settings.
        slo: what a request must meet to count as good; None takes the workload's own.
        listener: hears remarks, progress and prompts.

    Raises:
        ConfigError: the server cannot be reached or refuses even a probe.
    """
    generator = _Generator(await reach(server), listener or Listener())
    return await generator.run(workload, seed, workload.slo if slo is None else slo)


class _Generator:
    def __init__(self, server: Server, listener: Listener) -> None:
        self._server = server
        self._listener = listener
        self._writer = Writer()

    async def run(self, workload: Workload, seed: int, slo: Slo) -> list[Run]:
        plans = workload.plans(seed)
        warmup = workload.warmup(seed)
        self._writer = Writer(await self._calibrate(_style_of(warmup, plans), f"{workload.stem(seed)} probe"))
        runs = []
        for number, plan in enumerate(plans):
            if number:
                await asyncio.sleep(_BETWEEN_PLANS_S)
            runs.append(await self._measure(workload, plan, seed, slo, () if number else warmup))
        return runs

    async def _measure(self, workload: Workload, plan: Plan, seed: int, slo: Slo, warmup: Sequence[Ask]) -> Run:
        what = f"{self._server.label} {workload.name} {_phase(plan)}seed {seed}".replace("  ", " ")
        asks = plan.arrivals if isinstance(plan, SteadyStreams) else plan.asks
        prepared = [self._prepare(ask) for ask in asks]
        num_total = None if isinstance(plan, SteadyStreams) else len(asks)
        window = Window(num_total, lambda progress: self._listener.progress(what, progress))
        with _quiet_collector():
            await self._play(plan, window, prepared, warmup)
        self._listener.progress(what, window.progress())
        parameters = workload.parameters
        if isinstance(plan, SteadyStreams):
            parameters["phase"] = plan.phase
        run = Run(
            workload=workload.name,
            server=self._server.label,
            url=self._server.endpoint,
            model=self._server.model,
            seed=seed,
            parameters=parameters,
            slo=slo,
            records=window.records(),
            duration_s=window.duration_s,
            client_cpu_s=window.client_cpu_s,
            client_lag_s=window.client_lag_s,
            started_at=window.started_at,
        )
        self._remark(what, run, {ask.request_id: ask.output_tokens for ask in asks})
        return run

    async def _play(self, plan: Plan, window: Window, prepared: Sequence[Prepared], warmup: Sequence[Ask]) -> None:
        async with self._server.new_session() as http:
            wire = Wire(http, self._server, window)
            await asyncio.gather(*(wire.send(self._prepare(ask), is_warmup=True) for ask in warmup))
            if isinstance(plan, ClosedLoop):
                await play_closed(wire, plan, prepared)
            elif isinstance(plan, OpenLoop):
                await play_open(wire, prepared)
            else:
                await play_steady(wire, plan, prepared, self._prepare)

    def _prepare(self, ask: Ask) -> Prepared:
        text = self._writer.write(ask.parts)
        self._listener.prompt(self._server, ask, text)
        return Prepared(ask, self._server.body(text, ask.output_tokens))

    async def _calibrate(self, style: Style, seed: str) -> Calibration:
        counted = []
        async with self._server.new_session() as http:
            for num_pieces in _PROBE_PIECES:
                reply = Reply()
                text = "".join(pieces(f"{seed} {num_pieces}", num_pieces, style))
                await stream(http, self._server.endpoint, self._server.body(text, 1), reply)
                if reply.error is not None:
                    raise ConfigError(f"{self._server.name} refused a probe: {reply.error}")
                if reply.num_prompt_tokens is None:
                    self._say("counts no prompt tokens: lengths are those of SmolLM2's vocabulary")
                    return Calibration()
                counted.append((num_pieces, reply.num_prompt_tokens))
        found = Calibration.of_probes(counted[0], counted[1])
        if not found.is_exact:
            self._say(f"makes {found.tokens_per_piece:.3f} tokens of a word: lengths are corrected, to a few per cent")
        elif found.constant_tokens:
            self._say(f"adds {found.constant_tokens} tokens to a prompt: texts are that much shorter, lengths exact")
        return found

    def _remark(self, what: str, run: Run, asked: dict[str, int]) -> None:
        """Say what a reader of the figures should know about this run."""
        good = [r for r in run.measured() if r.error is None]
        short = sum(r.num_output_tokens < asked.get(r.request_id, 0) for r in good)
        if short:
            self._listener.line(f"{what}: {short} answers are shorter than asked for (does it know ignore_eos?)")
        off = [r for r in good if r.num_prompt_tokens not in (None, r.planned_prompt_tokens)]
        if off and self._writer.calibration.is_exact:
            self._listener.line(f"{what}: {len(off)} prompts were counted otherwise than planned")
        errors = [r.error for r in run.records if r.error is not None]
        if errors:
            self._listener.line(f"{what}: {len(errors)} requests failed, the first with: {errors[0]}")

    def _say(self, text: str) -> None:
        self._listener.line(f"{self._server.label} {text}")


@contextlib.contextmanager
def _quiet_collector() -> Iterator[None]:
    """Collect garbage now, and let the collector skip what exists: it would stop the clock's reader for long."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _style_of(warmup: Sequence[Ask], plans: Sequence[Plan]) -> Style:
    """Return the style of the text whose length is adjusted, for the probes."""
    asks = [ask for plan in plans if not isinstance(plan, SteadyStreams) for ask in plan.asks[:1]]
    own: list[Part] = [part for ask in [*asks, *warmup] for part in ask.parts if not part.is_shared]
    return own[0].style if own else "prose"


def _phase(plan: Plan) -> str:
    return f"{plan.phase} " if isinstance(plan, SteadyStreams) else ""
