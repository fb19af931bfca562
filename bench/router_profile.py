"""`python -m bench.router_profile OUT ROLE …`: run `baton ROLE …` and sample what it does in chosen stretches.

SIGUSR1 begins a stretch, the next one ends it; then the samples so far are written to OUT as JSON: how often each
Python function was met. The clock of the samples is the process's CPU time outside the kernel, so that neither waiting
nor other processes count, and nothing is added to a call. It ticks 250 times a second on most systems: a few seconds of
CPU time make a thousand samples. Time in native code counts for the Python function that called it, or that ran next.
"""

from __future__ import annotations

import json
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Final

# The first match counts.
AREAS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    (
        "control message: receive, decode",
        ("protocol/channel", "protocol/wire", "router/control", "aiohttp/web_protocol", "aiohttp/web_ws"),
    ),
    ("order, placement", ("router/dispatch", "router/load", "router/placement", "router/instructions")),
    ("hand over to the stream", ("router/switchboard", "router/members", "asyncio/locks", "asyncio/tasks")),
    ("detokenise, stop strings", ("router/text", "router/tokenizer", "codecs", "encodings")),
    ("metrics, timeline", ("router/metrics", "router/histogram", "prometheus_client", "protocol/timeline")),
    ("shape and format the event", ("router/stream", "router/responses", "router/intake")),
    ("write", ("router/event_stream", "router/server", "aiohttp/", "asyncio/timeouts", "asyncio/streams")),
)
REST: Final = "rest"
INTERVAL_S: Final = 0.001


def area_of(place: str) -> str:
    """Return what the time spent in a file belongs to."""
    return next((area for area, marks in AREAS if any(mark in place for mark in marks)), REST)


def shares(samples: Mapping[str, int]) -> dict[str, float]:
    """Return the share of each area, of samples by file and function."""
    found = dict.fromkeys([*(area for area, _ in AREAS), REST], 0.0)
    for place, count in samples.items():
        found[area_of(place)] += count
    total = sum(found.values()) or 1.0
    return {area: count / total for area, count in found.items()}


class Sampler:
    """Counts the functions met in this process, on its main thread."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._samples: Counter[str] = Counter()
        self._is_on = False

    def install(self) -> None:
        """Take the two signals."""
        signal.signal(signal.SIGVTALRM, self._sample)
        signal.signal(signal.SIGUSR1, self._toggle)

    def _toggle(self, *_: object) -> None:
        self._is_on = not self._is_on
        interval_s = INTERVAL_S if self._is_on else 0.0
        signal.setitimer(signal.ITIMER_VIRTUAL, interval_s, interval_s)
        if not self._is_on:
            self._out.write_text(json.dumps(self._samples))

    def _sample(self, _: int, frame: FrameType | None) -> None:
        # The methods that dataclasses make stand in no file.
        while frame is not None and frame.f_code.co_filename.startswith("<"):
            frame = frame.f_back
        if frame is not None:
            self._samples[f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"] += 1


def main(out: Path, arguments: list[str]) -> None:
    """Run `baton` in this process, sampled on demand."""
    Sampler(out).install()
    sys.argv = ["baton", *arguments]
    runpy.run_module("baton", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
