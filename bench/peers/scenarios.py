"""What is compared: which servers meet in which workload, and the targets that follow.

    scenario = one workload + the servers that take turns at it + where the client runs
    target   = a figure of one of them, or its ratio to another's, and a bound

One core against one core: a peer is pinned to the core on which Baton's worker for that phase runs, and the client runs
on the other one. What a peer does on its one core besides computing (HTTP, text) Baton's router may do on the other; so
there is also llama.cpp with one thread that computes and the other core for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from bench.peers.recipes import Cores
from bench.peers.results import Measure, Target
from bench.workloads.closed import Closed
from bench.workloads.interference import Interference
from bench.workloads.plan import Workload

SPLIT: Final = "Baton Q4_0 split"
SPLIT_Q4_1: Final = "Baton Q4_1 split"
COLOCATED: Final = "Baton Q4_0 colocated"
COLOCATED_1: Final = "Baton Q4_0 colocated, 1 thread"
LLAMA_1: Final = "llama Q4_0 1 core"
LLAMA_1_Q4_1: Final = "llama Q4_1 1 core"
LLAMA_1_THREAD: Final = "llama Q4_0 1 thread"
LLAMA_1_PREFILL: Final = "llama Q4_0 1 core, first"
LLAMA_TUNED: Final = "llama Q4_0 tuned"
LLAMA: Final = "llama Q4_0 default"
VLLM_TUNED: Final = "vLLM tuned"
VLLM: Final = "vLLM default"
TRANSFORMERS: Final = "transformers"
MAKE_SERVE: Final = "make serve"

TUNED_PEERS: Final = (LLAMA_TUNED, VLLM_TUNED)
_LONG_TOKENS: Final = 1500
_BUSY_SHARE: Final = 0.7


@dataclass(frozen=True, slots=True)
class Scenario:
    """Servers that take turns at one workload.

    Attributes:
        recipes: labels, in the order of odd rounds; even rounds go backwards.
        workload: None measures the start of the server alone, which is then started anew in every round.
        client_cores: what the load generator is pinned to.
        figures: shown for every server, with the phase of the workload that each is read from.
    """

    name: str
    recipes: tuple[str, ...]
    workload: Workload | None
    client_cores: tuple[int, ...]
    figures: tuple[tuple[str, str | None], ...]


def scenarios(cores: Cores, window_s: float) -> dict[str, Scenario]:
    """Return every scenario by its name; `window_s` is the length of each phase of the interference ones."""
    made = [*_one_core(cores), *_two_cores(cores, window_s)]
    return {scenario.name: scenario for scenario in made}


def _one_core(cores: Cores) -> list[Scenario]:
    on_prefill, on_decode = (cores.prefill,), (cores.decode,)
    return [
        Scenario(
            "one-stream",
            (SPLIT, LLAMA_1, LLAMA_1_THREAD, SPLIT_Q4_1, LLAMA_1_Q4_1),
            Closed(concurrency=1, requests=3, prompt_tokens=128, output_tokens=128),
            on_prefill,
            (("TPOT ms", None),),
        ),
        Scenario(
            "eight-streams",
            (SPLIT, LLAMA_1, LLAMA_1_THREAD),
            Closed(concurrency=8, requests=8, prompt_tokens=32, output_tokens=160),
            on_prefill,
            (("decode tokens/s", None), ("TPOT ms", None)),
        ),
        Scenario(
            "prefill",
            (SPLIT, LLAMA_1_PREFILL, COLOCATED_1),
            Closed(concurrency=1, requests=6, prompt_tokens=512, output_tokens=1),
            on_decode,
            (("prefill tokens/s", None), ("TTFT ms", None)),
        ),
    ]


def _two_cores(cores: Cores, window_s: float) -> list[Scenario]:
    beside = Interference(long_tokens=_LONG_TOKENS, every_s=10.0, window_s=window_s)
    alone = tuple((f"steady {name}", "alone") for name in ("ITL p50 ms", "ITL p99 ms", "tokens/s"))
    arrivals = ("steady ITL p50 ms", "steady ITL p99 ms", "steady ITL max ms", "steady tokens/s", "long TTFT ms")
    shown = (*alone, *((name, "arrivals") for name in arrivals))
    many = Closed(concurrency=64, requests=64, prompt_tokens=16, output_tokens=64)
    return [
        Scenario("interference", (SPLIT, *TUNED_PEERS, COLOCATED), beside, cores.both, shown),
        Scenario("interference-defaults", (SPLIT, LLAMA, VLLM, TRANSFORMERS), beside, cores.both, shown),
        Scenario("interference-busy", (SPLIT,), beside, cores.both, shown),
        Scenario("router", (SPLIT,), many, cores.both, (("router us/token", None),)),
        Scenario("start", (MAKE_SERVE,), None, cores.both, (("start s", None),)),
    ]


def long_prompt_alone() -> Workload:
    """Return the workload that tells how long a long prompt takes on an idle server."""
    return Closed(concurrency=1, requests=3, prompt_tokens=_LONG_TOKENS, output_tokens=1)


def with_busy_arrivals(scenario: Scenario, prompt_s: float) -> Scenario:
    """Return `interference-busy` with prompts arriving so often that they keep the prefill core 70 % busy.

    Args:
        scenario: it, before that is known.
        prompt_s: how long one long prompt takes alone.
    """
    if not isinstance(scenario.workload, Interference):
        raise TypeError(f"{scenario.name} has no arrivals")
    return replace(scenario, workload=replace(scenario.workload, every_s=round(prompt_s / _BUSY_SHARE, 2)))


def targets() -> list[Target]:
    """Return the targets in the order of the table."""
    prefill = Measure("prefill", SPLIT, "TTFT ms")
    return [
        *_one_core_targets(),
        *(_arrivals_target(what, name) for what, name in _ARRIVALS),
        *(target for peer in TUNED_PEERS for target in _peer_targets(peer)),
        _ratio("TTFT, 512 tokens, idle: Baton split / colocated", prefill, COLOCATED_1, 1.05),
        Target("router CPU us per token, 64 streams", Measure("router", SPLIT, "router us/token"), None, 60.0),
        Target("start of `make serve`, s", Measure("start", MAKE_SERVE, "start s"), None, 4.0),
    ]


_ARRIVALS: Final = (
    ("with prompts each 10 s / alone", "interference"),
    ("prefill core 70 % busy / alone", "interference-busy"),
)


def _ratio(what: str, above: Measure, recipe: str, bound: float, *, is_at_most: bool = True) -> Target:
    """Bound a figure's ratio to the same figure of another server."""
    return Target(what, above, replace(above, recipe=recipe), bound, is_at_most)


def _arrivals_target(what: str, scenario: str) -> Target:
    above = Measure(scenario, SPLIT, "steady ITL p99 ms", "arrivals")
    return Target(f"steady ITL p99, Baton split: {what}", above, replace(above, phase="alone"), 1.15)


def _one_core_targets() -> list[Target]:
    tpot, tpot_q4_1 = Measure("one-stream", SPLIT, "TPOT ms"), Measure("one-stream", SPLIT_Q4_1, "TPOT ms")
    decode = Measure("eight-streams", SPLIT, "decode tokens/s")
    prefill = Measure("prefill", SPLIT, "prefill tokens/s")
    eight, one = "decode tokens/s, 8 streams: Baton Q4_0 / llama Q4_0", "TPOT, 1 stream: Baton"
    prompt = "prefill tokens/s, 512 tokens: Baton Q4_0 / llama Q4_0, 1 core"
    return [
        _ratio(f"{one} Q4_0 / llama Q4_0, 1 core", tpot, LLAMA_1, 0.6),
        _ratio(f"{one} Q4_0 / llama Q4_0, 1 thread", tpot, LLAMA_1_THREAD, 0.6),
        _ratio(f"{one} Q4_1 / llama Q4_0, 1 core", tpot_q4_1, LLAMA_1, 0.6),
        _ratio(f"{one} Q4_1 / llama Q4_1 (same file), 1 core", tpot_q4_1, LLAMA_1_Q4_1, 0.5),
        _ratio(f"{eight}, 1 core", decode, LLAMA_1, 1.5, is_at_most=False),
        _ratio(f"{eight}, 1 thread", decode, LLAMA_1_THREAD, 1.5, is_at_most=False),
        _ratio(prompt, prefill, LLAMA_1_PREFILL, 2.0, is_at_most=False),
    ]


def _peer_targets(peer: str) -> list[Target]:
    """Bound what prompts do to streams against one tuned peer; the harshest of them is that against the best."""
    itl, rate, ttft = (
        Measure("interference", SPLIT, name, "arrivals")
        for name in ("steady ITL p99 ms", "steady tokens/s", "long TTFT ms")
    )
    return [
        _ratio(f"steady ITL p99 beside prompts: Baton split / {peer}", itl, peer, 0.15),
        _ratio(f"steady tokens/s beside prompts: Baton split / {peer}", rate, peer, 1.0, is_at_most=False),
        _ratio(f"TTFT of the long prompts: Baton split / {peer}", ttft, peer, 1.0),
    ]
