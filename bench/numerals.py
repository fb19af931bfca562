"""How figures are written: three significant digits, the same in tables and in the report."""

from __future__ import annotations

from bench.spreads import Spread

MISSING = "–"


def number(value: float | None, unit: str = "") -> str:
    """Write a figure without its unit, only "%" is shown; a share from 0 to 1 counts as 0 to 100 %."""
    if value is None:
        return MISSING
    if unit == "%":
        return f"{_floored_percent(value)}%"
    if unit == "" and value == int(value):
        return f"{value:.0f}"
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def extent(spread: Spread | None, unit: str = "") -> str:
    """Write least and greatest, as "11.8–13.0"; empty where they read the same."""
    return _between(number(spread.low, unit), number(spread.high, unit)) if spread else ""


def times(value: float | None) -> str:
    """Write a ratio, as "×1.05"."""
    if value is None:
        return MISSING
    return f"×{value:.2f}" if value < 9.995 else f"×{value:.1f}" if value < 99.95 else f"×{value:.0f}"


def times_extent(spread: Spread | None) -> str:
    """Write the range of a ratio, as "1.02–1.09"; empty where both ends read the same."""
    return _between(times(spread.low)[1:], times(spread.high)[1:]) if spread else ""


def duration(value_ms: float) -> str:
    """Write milliseconds with the unit that suits them, as "850 us", "12.3 ms" or "5.21 s"."""
    if value_ms < 1:
        return f"{value_ms * 1e3:.0f} us"
    return f"{number(value_ms)} ms" if value_ms < 1000 else f"{number(value_ms / 1e3)} s"


def _between(low: str, high: str) -> str:
    return "" if low == high else f"{low}–{high}"


def _floored_percent(share: float) -> str:
    # Rounded down, so that 100 % is said of all and of nothing less.
    percent = int(share * 1000 + 1e-9) / 10
    return f"{percent:.0f}" if percent == int(percent) else f"{percent:.1f}"
