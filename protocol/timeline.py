"""What happened to one request, and the latencies that follow from it.

    ARRIVED ─► PLACED ─► FIRST_TOKEN ─► (TOKEN)* ─► FINISHED

TTFT = first token − arrival; ITL = each gap between tokens; TPOT = (E2E − TTFT) / (output tokens − 1).
All times are seconds on the recorder's monotonic clock; they never travel to another machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Timeline:
    """Recorder of one request's events; mutable, owned by the router."""

    arrived_s: float
    placed_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    num_output_tokens: int = 0
    worst_gap_s: float = 0.0
    num_placements: int = field(default=0)

    def placed(self, now_s: float) -> None:
        """Record that a pair of workers was chosen; only the first placement counts for latency."""
        self.num_placements += 1
        if self.placed_s is None:
            self.placed_s = now_s

    def token(self, now_s: float) -> float | None:
        """Record an output token and return its ITL in seconds, None for the first token."""
        self.num_output_tokens += 1
        gap_s = None if self.last_token_s is None else now_s - self.last_token_s
        if gap_s is None:
            self.first_token_s = now_s
        else:
            self.worst_gap_s = max(self.worst_gap_s, gap_s)
        self.last_token_s = now_s
        return gap_s

    def finished(self, now_s: float) -> None:
        """Record the terminal event."""
        self.finished_s = now_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, seconds; None before it."""
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def e2e_s(self) -> float | None:
        """Arrival to terminal event, seconds; None while running."""
        return None if self.finished_s is None else self.finished_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, seconds; None while running or with fewer than two tokens."""
        if self.finished_s is None or self.first_token_s is None or self.num_output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.num_output_tokens - 1)
