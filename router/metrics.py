"""What the router measures, for Prometheus.

Every observation is made once, under a `baton_` name. The `vllm:` names that dashboards and load generators know are
the same numbers, renamed when they are read. Counters of workers are added up by difference, so that they keep growing
when a worker restarts. Bucket edges include the latency objectives, so that attainment can be read off exactly.
What is counted for every token or request is kept in plain numbers and becomes metrics when they are read.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from protocol.request import FinishReason
from protocol.timeline import Timeline
from protocol.wire import FirstToken, Role, WorkerStats
from router.histogram import PlainHistogram
from router.members import Registry, Worker

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_LONG: Final = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 5, 10, 20, 40, 80, 160)
_SHORT: Final = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
                 0.5, 0.75, 1, 2.5, 5, 10)  # fmt: skip

# Field of WorkerStats, name, text; all counted where KV arrives.
_TRANSFERS: Final = (
    ("num_bytes_transferred", "transfer_bytes", "KV bytes received."),
    ("num_blocks_transferred", "transfer_blocks", "KV blocks received."),
    ("num_blocks_skipped", "transfer_blocks_skipped", "KV blocks not sent, since decode held them already."),
    ("transfer_s", "transfer_seconds", "Time that transfers took, added up."),
    ("num_transfers", "transfers", "Transfers that landed."),
    ("num_transfers_failed", "transfers_failed", "Transfers that broke."),
    ("num_transfers_cancelled", "transfers_cancelled", "Transfers called off: nobody wanted them any more."),
)
_MAX_KNOWN_WORKERS: Final = 1024
_MAX_GONE_WORKERS: Final = 64


class Metrics:
    """All metrics of one router.

    Args:
        model_name: label of what concerns requests.
    """

    def __init__(self, model_name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._model = (model_name,)
        self._aliases: list[tuple[str, Collector]] = []
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._gone: deque[tuple[str, str]] = deque()
        self._num_new_tokens = 0
        self._request_metrics()
        self._token_metrics()
        self._worker_metrics()
        self._registry.register(_Aliases(self._aliases))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], alias: str) -> PlainHistogram:
        made = PlainHistogram(name, text, {"model_name": self._model[0]}, buckets)
        self._registry.register(made)
        self._aliases.append((alias, made))
        return made

    def _request_metrics(self) -> None:
        make = self._histogram
        self._ttft = make("baton_time_to_first_token_seconds", "Arrival to first token.", _LONG,
                          "vllm:time_to_first_token_seconds")  # fmt: skip
        self._e2e = make("baton_e2e_request_latency_seconds", "Arrival to last token.", _LONG,
                         "vllm:e2e_request_latency_seconds")  # fmt: skip
        self._queue = make("baton_request_queue_time_seconds", "Waiting in router and prefill worker.", _LONG,
                           "vllm:request_queue_time_seconds")  # fmt: skip
        self._prefill = make("baton_request_prefill_time_seconds", "Computing the prompt.", _LONG,
                             "vllm:request_prefill_time_seconds")  # fmt: skip
        self._decode = make("baton_request_decode_time_seconds", "First to last token.", _LONG,
                            "vllm:request_decode_time_seconds")  # fmt: skip
        success = Counter("baton_request_success", "Finished requests.", ("model_name", "finished_reason"),
                          registry=self._registry)  # fmt: skip
        self._success = {reason: success.labels(*self._model, str(reason)) for reason in FinishReason}
        self._aliases.append(("vllm:request_success", success))
        self._failed = Counter("baton_request_failed", "Accepted requests that ended otherwise.", ("reason",),
                               registry=self._registry)  # fmt: skip
        for reason in ("not_ready", "placements", "grammar"):
            self._failed.labels(reason)
        self._cancelled = Counter("baton_request_cancelled", "Accepted requests whose clients left before the end.",
                                  registry=self._registry)  # fmt: skip
        self._grammars = Counter("baton_grammar_failures", "Answers whose grammar failed while they were written.",
                                 registry=self._registry)  # fmt: skip
        self._stale = Counter("baton_stale_tokens", "Tokens of placements and workers given up, which were dropped.",
                              registry=self._registry)  # fmt: skip
        self._num_stale = 0
        self._shed = Counter("baton_requests_shed", "Requests answered with 429.", registry=self._registry)
        self._readouts = Histogram("baton_readout_seconds", "Arrival of a request to one of its readings.", ("kind",),
                                   buckets=_LONG, registry=self._registry)  # fmt: skip
        for kind in ("labels", "prompt", "embedding"):
            self._readouts.labels(kind)
        self._running = self._gauge("baton_num_requests_running", "Requests with workers.", "vllm:num_requests_running")
        self._waiting = self._gauge("baton_num_requests_waiting", "Requests without.", "vllm:num_requests_waiting")

    def _token_metrics(self) -> None:
        self._itl = self._histogram("baton_inter_token_latency_seconds", "Gap between two tokens.", _SHORT,
                                    "vllm:inter_token_latency_seconds")  # fmt: skip
        self._tpot = self._histogram("baton_time_per_output_token_seconds", "Mean gap of a request.", _SHORT,
                                     "vllm:request_time_per_output_token_seconds")  # fmt: skip
        self._prompt_tokens = self._count("baton_prompt_tokens", "Prompt tokens.", "vllm:prompt_tokens")
        self._output_tokens = self._count("baton_generation_tokens", "Output tokens.", "vllm:generation_tokens")
        self._computed = self._count("baton_prefill_computed_tokens", "Prompt tokens computed.", None)
        self._cached = self._count("baton_prefill_cached_tokens", "Prompt tokens found cached.",
                                   "vllm:prefix_cache_hits")  # fmt: skip
        self._looked_up = self._count("baton_prefill_tokens", "Prompt tokens computed or found cached.",
                                      "vllm:prefix_cache_queries")  # fmt: skip
        self._preemptions = self._count("baton_preemptions", "Sequences that gave way.", "vllm:num_preemptions")

    def _worker_metrics(self) -> None:
        self._blocks = Gauge("baton_kv_blocks", "KV blocks.", ("worker", "role", "state"), registry=self._registry)
        self._up = Gauge("baton_worker_up", "Whether a worker is here.", ("worker", "role"), registry=self._registry)
        self._usage = self._gauge("baton_kv_cache_usage_ratio", "Leased share of the KV blocks of decode workers.",
                                  "vllm:kv_cache_usage_perc")  # fmt: skip
        self._transfer = {
            stat: Counter(f"baton_kv_{name}", text, ("transport",), registry=self._registry)
            for stat, name, text in _TRANSFERS
        }

    def _count(self, name: str, text: str, alias: str | None) -> Counter:
        made = Counter(name, text, ("model_name",), registry=self._registry)
        if alias is not None:
            self._aliases.append((alias, made))
        return made.labels(*self._model)

    def _gauge(self, name: str, text: str, alias: str) -> Gauge:
        made = Gauge(name, text, ("model_name",), registry=self._registry)
        self._aliases.append((alias, made))
        return made.labels(*self._model)

    # --- requests ---

    def accepted(self, num_prompt_tokens: int) -> None:
        """Count an accepted choice."""
        self._prompt_tokens.inc(num_prompt_tokens)

    def token(self, timeline: Timeline, gap_s: float | None) -> None:
        """Count an output token, already recorded in its timeline."""
        self._num_new_tokens += 1
        if gap_s is not None:
            self._itl.observe(gap_s)
        elif timeline.ttft_s is not None:
            self._ttft.observe(timeline.ttft_s)

    def prefilled(self, timeline: Timeline, first: FirstToken) -> float:
        """Observe how the time to the first token was spent; returns how much of it was waiting."""
        in_router_s = 0.0 if timeline.placed_s is None else timeline.placed_s - timeline.arrived_s
        queue_s = max(0.0, in_router_s + first.queue_s)
        self._queue.observe(queue_s)
        self._prefill.observe(max(0.0, first.prefill_s))
        return queue_s

    def finished(self, timeline: Timeline, reason: FinishReason) -> None:
        """Observe a finished choice."""
        self._success[reason].inc()
        if timeline.e2e_s is not None:
            self._e2e.observe(timeline.e2e_s)
        if timeline.tpot_s is not None:
            self._tpot.observe(timeline.tpot_s)
        if timeline.first_token_s is not None and timeline.finished_s is not None:
            self._decode.observe(timeline.finished_s - timeline.first_token_s)

    def read(self, kind: str, took_s: float) -> None:
        """Observe a readout; what has no tokens has no time per token."""
        self._readouts.labels(kind).observe(took_s)

    def failed(self, reason: str) -> None:
        """Count a choice that could not be completed."""
        self._failed.labels(reason).inc()

    def grammar_failed(self) -> None:
        """Count a choice that ended with its grammar: the client's, so that no alert on failures need ring."""
        self._grammars.inc()
        self._failed.labels("grammar").inc()

    def cancelled(self) -> None:
        """Count a choice whose client left: no failure."""
        self._cancelled.inc()

    def shed(self) -> None:
        """Count a request answered with 429."""
        self._shed.inc()

    # --- workers ---

    def worker_came(self, worker: Worker) -> None:
        """Note a registration: its series exist from now."""
        name = (worker.registration.worker_id, str(worker.role))
        self._up.labels(*name).set(1)
        if name in self._gone:
            self._gone.remove(name)
        if worker.registration.address is not None:
            for counter in self._transfer.values():
                counter.labels(worker.registration.address.transport)

    def worker_went(self, worker: Worker) -> None:
        """Note a loss. Of workers long gone no series is kept."""
        name = (worker.registration.worker_id, str(worker.role))
        self._up.labels(*name).set(0)
        self._gone.append(name)
        if len(self._gone) > _MAX_GONE_WORKERS:
            self._up.remove(*self._gone.popleft())

    def heartbeat(self, worker: Worker, transport: str | None) -> None:
        """Add what a worker's counters grew by since its last heartbeat.

        Args:
            worker: with its new stats.
            transport: how KV reaches it, if it is a decode worker with a link.
        """
        known = self._known_of(worker)
        before, stats = known.stats, worker.stats
        known.stats = stats
        if worker.role is Role.PREFILL:
            num_computed = max(0, stats.num_computed_tokens - before.num_computed_tokens)
            num_cached = max(0, stats.num_cached_tokens - before.num_cached_tokens)
            self._computed.inc(num_computed)
            self._cached.inc(num_cached)
            self._looked_up.inc(num_computed + num_cached)
            return
        self._preemptions.inc(max(0, stats.num_preemptions - before.num_preemptions))
        # While it has no link, what it received over the last one still counts for that.
        known.transport = transport or known.transport
        for stat, counter in self._transfer.items():
            grown = getattr(stats, stat) - getattr(before, stat)
            if grown > 0:
                counter.labels(known.transport).inc(grown)

    def _known_of(self, worker: Worker) -> _Known:
        """Return what this instance reported last, also over an earlier connection; zeros for a new instance."""
        worker_id, instance = worker.registration.worker_id, worker.registration.instance
        known = self._known.get(worker_id)
        if known is None or known.instance != instance:
            transport = "none" if known is None else known.transport
            known = self._known[worker_id] = _Known(instance, WorkerStats(), transport)
        self._known.move_to_end(worker_id)
        if len(self._known) > _MAX_KNOWN_WORKERS:
            self._known.popitem(last=False)
        return known

    def render(self, registry: Registry, num_running: int, num_waiting: int, num_stale_tokens: int) -> bytes:
        """Return the text format, with gauges as of now."""
        self._stale.inc(num_stale_tokens - self._num_stale)
        self._num_stale = num_stale_tokens
        self._output_tokens.inc(self._num_new_tokens)
        self._num_new_tokens = 0
        self._running.set(num_running)
        self._waiting.set(num_waiting)
        self._blocks.clear()
        leased = total = 0
        for worker in registry:
            stats, name = worker.stats, (worker.registration.worker_id, str(worker.role))
            for state in ("free", "cached", "leased", "total"):
                self._blocks.labels(*name, state).set(getattr(stats, f"blocks_{state}"))
            if worker.role is Role.DECODE:
                leased, total = leased + stats.blocks_leased, total + stats.blocks_total
        self._usage.set(leased / total if total else 0.0)
        return generate_latest(self._registry)


@dataclass(slots=True)
class _Known:
    instance: int
    stats: WorkerStats
    transport: str


class _Aliases(Collector):
    """The same samples under other names, with vLLM's label `engine` besides."""

    def __init__(self, aliases: Iterable[tuple[str, Collector]]) -> None:
        self._pairs = aliases

    def collect(self) -> Iterator[Metric]:
        """Read the originals."""
        for name, source in self._pairs:
            for original in source.collect():
                metric = Metric(name, original.documentation, original.type)
                for sample in original.samples:
                    renamed = name + sample.name.removeprefix(original.name)
                    metric.add_sample(renamed, {**sample.labels, "engine": "0"}, sample.value)
                yield metric
