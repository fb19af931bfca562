"""Who works here: the registry of workers. Pure: no socket, no clock of its own; time comes as an argument.

    (absent) ─ register ─► PRESENT ─ drain seen ─► PRESENT, takes nothing new
                  │            ├─ channel lost ─────────────────────────► (absent)
                  │            └─ silent, or has work and no progress ──► overdue ─► removed by the caller ─► (absent)
                  └─ refused: another fingerprint (final), or its name is in use (come back later)

The first worker defines which model and KV layout is served; the definition holds until no worker is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from protocol.errors import FingerprintMismatch
from protocol.kv_layout import KVFingerprint
from protocol.readout import EmbeddingCard
from protocol.wire import Heartbeat, PeerAddress, Register, Role, WorkerStats


class WorkerKey(NamedTuple):
    """One instance of a worker. A tuple: it is looked up and compared for every message, which C does for tuples."""

    worker_id: str
    instance: int


@dataclass(slots=True, eq=False)
class Worker:
    """One registered worker and what it last said. Owned by the registry.

    Attributes:
        key: its identity; the same object for as long as it is here.
        links: prefill workers that a decode worker can receive from.
        progressed_s: when its compute thread last moved, or had nothing to do.
    """

    registration: Register
    registered_s: float
    heard_s: float
    progressed_s: float
    progress: int = 0
    stats: WorkerStats = field(default_factory=WorkerStats)
    links: frozenset[WorkerKey] = frozenset()
    is_draining: bool = False
    key: WorkerKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = WorkerKey(self.registration.worker_id, self.registration.instance)

    @property
    def role(self) -> Role:
        """What it does."""
        return self.registration.role


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a registration is not taken; a final one would fail again for the same reason."""

    reason: str
    is_final: bool


class Registry:
    """The workers of one router.

    Args:
        lease_ttl_s: silence after which a worker is overdue.
        stall_s: work without progress after which a worker is overdue.
    """

    def __init__(self, lease_ttl_s: float, stall_s: float) -> None:
        self._lease_ttl_s = lease_ttl_s
        self._stall_s = stall_s
        self._workers: dict[str, Worker] = {}
        self._stalled: set[WorkerKey] = set()
        self.fingerprint: KVFingerprint | None = None
        self.max_model_len: int | None = None
        self.embedding: EmbeddingCard | None = None

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def get(self, worker_id: str) -> Worker | None:
        """Return a worker that is present."""
        return self._workers.get(worker_id)

    def find(self, key: WorkerKey) -> Worker | None:
        """Return a worker if this very instance is present."""
        worker = self._workers.get(key.worker_id)
        return worker if worker is not None and worker.key == key else None

    @property
    def prefills(self) -> list[Worker]:
        """The prefill workers."""
        return [w for w in self._workers.values() if w.role is Role.PREFILL]

    @property
    def decodes(self) -> list[Worker]:
        """The decode workers."""
        return [w for w in self._workers.values() if w.role is Role.DECODE]

    @property
    def phases_agree(self) -> bool:
        """Whether a token's bits do not depend on which worker computes it, nor in which company."""
        return all(worker.registration.phases_agree for worker in self._workers.values())

    @property
    def addresses(self) -> tuple[PeerAddress, ...]:
        """Where decode workers find the prefill workers."""
        return tuple(w.registration.address for w in self.prefills if w.registration.address is not None)

    def register(self, registration: Register, now_s: float) -> Worker | Refusal:
        """Take a worker in, or say why not. The caller has removed an earlier registration of the same instance."""
        if refusal := self._refusal(registration, now_s):
            return refusal
        worker = Worker(registration, registered_s=now_s, heard_s=now_s, progressed_s=now_s)
        self._workers[registration.worker_id] = worker
        if self.fingerprint != registration.fingerprint:
            self.fingerprint = registration.fingerprint
        if registration.role is Role.PREFILL:
            self.embedding = registration.embedding
        self._update_limits()
        return worker

    def heartbeat(self, key: WorkerKey, beat: Heartbeat, now_s: float) -> Worker | None:
        """Note a sign of life; returns the worker, or None if this instance is not present."""
        worker = self.find(key)
        if worker is None:
            return None
        # Work that waits for someone else (KV on its way, blocks in transfer) is no reason to move.
        can_move = beat.stats.num_running if worker.role is Role.DECODE else beat.stats.queued_tokens
        if beat.progress != worker.progress or not beat.has_work or not can_move:
            worker.progressed_s = now_s
        worker.heard_s, worker.progress = now_s, beat.progress
        worker.stats, worker.is_draining = beat.stats, beat.is_draining
        return worker

    def set_links(self, key: WorkerKey, peers: Iterable[tuple[str, int]]) -> Worker | None:
        """Note which prefill workers a decode worker can receive from."""
        worker = self.find(key)
        if worker is not None:
            worker.links = frozenset(WorkerKey(*peer) for peer in peers)
        return worker

    def remove(self, key: WorkerKey) -> Worker | None:
        """Forget an instance; idempotent."""
        worker = self.find(key)
        if worker is not None:
            del self._workers[key.worker_id]
            self._update_limits()
        return worker

    def overdue(self, now_s: float) -> list[tuple[WorkerKey, str, bool]]:
        """Return the workers that count as dead, each with the reason and whether its instance is hopeless."""
        found = []
        for worker in self._workers.values():
            silent_s, stalled_s = now_s - worker.heard_s, now_s - worker.progressed_s
            if silent_s > self._lease_ttl_s:
                found.append((worker.key, f"silent for {silent_s:.1f} s", False))
            elif stalled_s > self._stall_s:
                self._stalled.add(worker.key)
                found.append((worker.key, f"has work but made no progress for {stalled_s:.1f} s", True))
        return found

    def missing(self) -> list[str]:
        """Return what stands in the way of serving, in words; empty when a pair of workers is ready."""
        usable = [w for w in self._workers.values() if not w.is_draining]
        prefills = {w.key for w in usable if w.role is Role.PREFILL}
        decodes = [w for w in usable if w.role is Role.DECODE]
        if self.is_encoder:
            return [] if prefills else ["no prefill worker"]
        found = [f"no {role} worker" for role, there in (("prefill", prefills), ("decode", decodes)) if not there]
        if not found and not any(w.links & prefills for w in decodes):
            found.append("no decode worker is linked with a prefill worker yet")
        return found

    @property
    def is_encoder(self) -> bool:
        """Whether the model that is served only embeds: no decode worker is needed, and nothing is generated."""
        return self.embedding is not None and self.embedding.is_encoder

    @property
    def is_ready(self) -> bool:
        """Whether a prefill and a decode worker can serve together."""
        return not self.missing()

    def _refusal(self, registration: Register, now_s: float) -> Refusal | None:
        if WorkerKey(registration.worker_id, registration.instance) in self._stalled:
            return Refusal("this instance made no progress; it must be restarted", is_final=True)
        if registration.role not in (Role.PREFILL, Role.DECODE):
            return Refusal(f"a {registration.role} is no worker", is_final=True)
        is_encoder = registration.embedding is not None and registration.embedding.is_encoder
        if registration.role is Role.PREFILL and registration.address is None and not is_encoder:
            return Refusal("a prefill worker must tell its address", is_final=True)
        if registration.worker_id in self._workers:
            return Refusal(f"another worker is registered as {registration.worker_id!r}", is_final=False)
        if self._workers and self.fingerprint is not None:
            try:
                self.fingerprint.require_equal(registration.fingerprint, registration.worker_id)
            except FingerprintMismatch as error:
                return Refusal(str(error), is_final=True)
        return None

    def _update_limits(self) -> None:
        """Keep the last known limits while nobody is there: requests may wait for a restart."""
        if self._workers:
            self.max_model_len = min(w.registration.max_model_len for w in self._workers.values())
