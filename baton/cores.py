"""Share out the CPU cores of one machine among its workers: pure, so that every case is a plain test.

1. What the user fixed (cores or threads of a role) holds; cores that this process may not use are an error.
2. The cores left are split between the prefill and the decode workers in proportion to their number, prefill taking the
   larger half, because prompts are bound by compute and decode steps by memory; two cores are one each.
3. Within a role each worker gets an even, contiguous share and is pinned to it, so that no step of one waits for a core
   that another computes on. With fewer cores than workers nobody is pinned: all share, with one thread each.
4. Colocated workers take every core with one thread each, unpinned; so does anything that computes on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WorkerCores:
    """What one worker computes with: `cores` is empty where it is not pinned."""

    num_threads: int
    cores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CoreRequest:
    """What the user fixed; None and empty leave it to the plan. `threads` is for both roles, the others win over it."""

    threads: int | None = None
    prefill_threads: int | None = None
    decode_threads: int | None = None
    prefill_cores: tuple[int, ...] = ()
    decode_cores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CorePlan:
    """The share of each worker, in the order of their numbers."""

    prefill: tuple[WorkerCores, ...]
    decode: tuple[WorkerCores, ...]


def plan_cores(
    usable: Sequence[int], num_prefill: int, num_decode: int, request: CoreRequest, *, is_pinned: bool = True
) -> CorePlan:
    """Plan the cores of separate prefill and decode workers.

    Args:
        usable: cores this process may run on, at least one.
        num_prefill: prefill workers, at least one.
        num_decode: decode workers, at least one.
        request: what the user fixed.
        is_pinned: False leaves every worker unpinned unless the user named its cores.

    Raises ConfigError when the user named a core that is not usable.
    """
    for name, cores in (("prefill-cores", request.prefill_cores), ("decode-cores", request.decode_cores)):
        if missing := sorted(set(cores) - set(usable)):
            raise ConfigError(f"{name}: this process may not run on {missing}; it may on {sorted(usable)}")
    prefill_threads = request.prefill_threads or request.threads
    decode_threads = request.decode_threads or request.threads
    if not (request.prefill_cores or request.decode_cores) and len(usable) < num_prefill + num_decode:
        return CorePlan(
            prefill=(WorkerCores(prefill_threads or 1),) * num_prefill,
            decode=(WorkerCores(decode_threads or 1),) * num_decode,
        )
    prefill_group, decode_group = _groups(sorted(usable), num_prefill, num_decode, request)
    return CorePlan(
        prefill=_share(prefill_group, num_prefill, prefill_threads, is_pinned or bool(request.prefill_cores)),
        decode=_share(decode_group, num_decode, decode_threads, is_pinned or bool(request.decode_cores)),
    )


def plan_prefill(usable: Sequence[int], num_prefill: int, request: CoreRequest, *, is_pinned: bool = True) -> CorePlan:
    """Plan the cores of prefill workers that no decode worker stands beside; arguments as for `plan_cores`.

    Raises ConfigError when the user named a core that is not usable.
    """
    if missing := sorted(set(request.prefill_cores) - set(usable)):
        raise ConfigError(f"prefill-cores: this process may not run on {missing}; it may on {sorted(usable)}")
    group = tuple(request.prefill_cores or sorted(usable))
    threads = request.prefill_threads or request.threads
    return CorePlan(_share(group, num_prefill, threads, is_pinned or bool(request.prefill_cores)), ())


def plan_alone(usable: Sequence[int], threads: int | None, cores: tuple[int, ...]) -> WorkerCores:
    """Plan one worker that nobody shares with: every core, unpinned, unless the user fixed something."""
    if missing := sorted(set(cores) - set(usable)):
        raise ConfigError(f"cores: this process may not run on {missing}; it may on {sorted(usable)}")
    return WorkerCores(threads or len(cores or usable), cores)


def _groups(
    usable: list[int], num_prefill: int, num_decode: int, request: CoreRequest
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give the cores of either role; there are enough for all, or the user named some."""
    prefill, decode = request.prefill_cores, request.decode_cores
    if prefill and decode:
        return prefill, decode
    if prefill:
        return prefill, tuple(core for core in usable if core not in prefill) or tuple(usable)
    if decode:
        return tuple(core for core in usable if core not in decode) or tuple(usable), decode
    num_decode_cores = max(num_decode, len(usable) * num_decode // (num_prefill + num_decode))
    split = len(usable) - num_decode_cores
    return tuple(usable[:split]), tuple(usable[split:])


def _share(group: tuple[int, ...], num_workers: int, threads: int | None, is_pinned: bool) -> tuple[WorkerCores, ...]:
    """Split a role's cores among its workers; more workers than cores share them all, unpinned."""
    if len(group) < num_workers:
        return (WorkerCores(threads or 1),) * num_workers
    size, larger = divmod(len(group), num_workers)
    shares, start = [], 0
    for index in range(num_workers):
        cores = group[start : start + size + (index < larger)]
        start += len(cores)
        shares.append(WorkerCores(threads or len(cores), cores if is_pinned else ()))
    return tuple(shares)
