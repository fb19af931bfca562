"""What a run leaves behind: one record per request, one per run, and the file that both go to.

    workload ─► load generator ─► Record per request ─► Run ─► JSON ─► tables, ratios, HTML report

Every figure that the harness prints is computed from these, so that a saved run can be looked at again.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

FORMAT = 1


class Record(msgspec.Struct, frozen=True):
    """One request as its client saw it. Times are seconds since the start of the run's measured window.

    Attributes:
        kind: what the request is within its workload: "request", or "steady" and "arrival" for interference.
        chunk_s: arrival of each chunk that carried text.
        chunk_tokens: tokens in each of those chunks: all 1 where the server streams token by token; where it does
            not say, the output tokens it counted are spread over the chunks.
        num_prompt_tokens: as the server counted, or None where it does not say.
        planned_prompt_tokens: what the workload meant to send.
        num_output_tokens: as the server counted, or the sum of `chunk_tokens`.
        planned_s: when an open-loop workload meant to send it, else None; `started_s` less this is the client's lag.
        is_warmup: left out of every figure.
        error: why it failed, or None.
    """

    request_id: str
    kind: str
    started_s: float
    finished_s: float
    chunk_s: tuple[float, ...]
    chunk_tokens: tuple[int, ...]
    planned_prompt_tokens: int
    num_prompt_tokens: int | None
    num_output_tokens: int
    planned_s: float | None = None
    is_warmup: bool = False
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return self.chunk_s[0] - self.started_s if self.chunk_s else None

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Gaps between chunks (ITL)."""
        return tuple(b - a for a, b in zip(self.chunk_s, self.chunk_s[1:], strict=False))

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, up to the last token."""
        later = sum(self.chunk_tokens[1:])
        return (self.chunk_s[-1] - self.chunk_s[0]) / later if later else None

    @property
    def e2e_s(self) -> float:
        """From sending to the end of the stream."""
        return self.finished_s - self.started_s


class Slo(msgspec.Struct, frozen=True):
    """What a request must meet to count as good; None bounds nothing. All in seconds.

    Attributes:
        itl_p99_s: bound on the 99th percentile of the request's own gaps.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_p99_s: float | None = None
    e2e_s: float | None = None


class Run(msgspec.Struct, frozen=True):
    """One measured window of one workload against one server with one seed.

    Attributes:
        server: the label that tables show, as "baton" or "llama-server Q4_0".
        parameters: the workload's own settings, enough to repeat the run.
        duration_s: length of the measured window; warm-up lies before it.
        client_cpu_s: CPU time of the load generator during the window.
        client_lag_s: how late its event loop woke from sleeps during the window, 99th percentile.
        started_at: wall-clock time of the start, ISO 8601, for the reader only.
    """

    workload: str
    server: str
    url: str
    model: str
    seed: int
    parameters: dict[str, float | int | str | None]
    slo: Slo
    records: tuple[Record, ...]
    duration_s: float
    client_cpu_s: float
    client_lag_s: float
    started_at: str

    def measured(self, kind: str | None = None) -> list[Record]:
        """Records that count, of one kind or of all."""
        return [r for r in self.records if not r.is_warmup and kind in (None, r.kind)]


class RunFile(msgspec.Struct, frozen=True):
    """What is written to disk: all runs of one call, and the machine they ran on."""

    runs: tuple[Run, ...]
    machine: str
    format: int = FORMAT


def save(path: Path, file: RunFile) -> None:
    """Write runs as JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n")


def load(path: Path) -> RunFile:
    """Read what `save` wrote; raises ValueError for another format or a damaged file."""
    try:
        file = msgspec.json.decode(path.read_bytes(), type=RunFile)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path.name}: not a file of runs ({error})") from error
    if file.format != FORMAT:
        raise ValueError(f"{path.name}: format {file.format}, this harness reads {FORMAT}")
    return file
