"""The tables and the JSON of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from bench.kernels.ceilings import Ceilings, median_of
from bench.kernels.timing import Timing
from bench.spreads import Spread


def ceilings_lines(rounds: Sequence[Ceilings], how: str) -> list[str]:
    """Return what the ceilings were, and how they were measured, line by line."""
    peaks = median_of(rounds)
    best = max(peaks.details, key=lambda name: peaks.details[name])
    reads = [one.memory_gb_s for one in rounds]
    spread = f"{min(reads):.1f}-{max(reads):.1f} over {len(rounds)} rounds"
    lines = [f"memory  {peaks.memory_gb_s:.1f} GB/s ({spread}; best way: {best}), {how}"]
    lines.append("        " + ", ".join(f"{name} {value:.1f}" for name, value in peaks.details.items()))
    if peaks.cache_gb_s:
        lines.append(f"cache   {peaks.cache_gb_s:.0f} GB/s read and written together in the second-level cache")
    parts = (("float", peaks.float_gop_s), ("int8", peaks.int8_gop_s), ("int4", peaks.int4_gop_s))
    shown = [f"{name} {peak:.0f}" for name, peak in parts if peak]
    if shown:
        lines.append(f"peaks   {', '.join(shown)} billion operations a second")
    else:
        lines.append("peaks   not measured: floors are those of memory alone")
    return lines


def tables_of(timings: Sequence[Timing], clock: str) -> list[Table]:
    """Return a table for each group; `clock` heads the column of times.

    "x floor" is time over floor; "torch x" is torch's time over this one.
    """
    return [_table(group, [t for t in timings if t.group == group], clock) for group in _groups(timings)]


def _groups(timings: Iterable[Timing]) -> list[str]:
    return list(dict.fromkeys(t.group for t in timings))


def _table(group: str, timings: Sequence[Timing], clock: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(group, no_wrap=True)
    for name in (clock, "wall", "bytes", "ops", "floor", "bound", "x floor", "torch x"):
        table.add_column(name, justify="left" if name == "bound" else "right", no_wrap=True)
    for t in timings:
        table.add_row(
            t.name,
            spread_text(t.busy_s),
            spread_text(t.wall_s),
            amount_text(t.work.num_bytes + t.work.cached_bytes),
            amount_text(t.work.num_operations),
            time_text(t.floor_s),
            t.bound,
            f"{t.over_floor.median:.2f}",
            f"{t.plain_over.median:.1f}" if t.plain_over else "-",
        )
    return table


def time_text(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    factor, unit = _unit(seconds)
    return f"{_digits(seconds * factor)} {unit}"


def spread_text(spread: Spread) -> str:
    """Return a median and its range in one unit."""
    factor, unit = _unit(spread.median)
    low, middle, high = (_digits(seconds * factor) for seconds in (spread.low, spread.median, spread.high))
    return f"{middle} {unit} ({low}-{high})"


def amount_text(count: float) -> str:
    """Return a number of bytes or operations with three digits and the letter of its thousands."""
    for letter in ("", "k", "M"):
        if count < 999.5:
            return _digits(count) + letter if count else "0"
        count /= 1e3
    return _digits(count) + "G"


def _unit(seconds: float) -> tuple[float, str]:
    return (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def as_json(timings: Sequence[Timing], rounds: Sequence[Ceilings], how: str) -> dict[str, Any]:
    """Return a run's figures for a file; times in seconds, ceilings in GB/s and 10^9 operations a second."""
    return {
        "ceilings": {**asdict(median_of(rounds)), "how": how, "rounds": [asdict(one) for one in rounds]},
        "timings": [asdict(t) for t in timings],
    }
