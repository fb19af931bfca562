"""A registry with workers that exist on paper, for tests of the pure parts."""

from __future__ import annotations

from typing import Any

from protocol.kv_layout import KVFingerprint
from protocol.request import FinishReason, SamplingParams, TokenRow
from protocol.wire import FirstToken, Heartbeat, PeerAddress, Register, Role, WorkerStats
from router.instructions import Submission
from router.members import Refusal, Registry, Worker, WorkerKey

BLOCK_SIZE = 4
FINGERPRINT = KVFingerprint(
    model_hash="m", dtype="float32", block_size=BLOCK_SIZE, num_layers=2, num_kv_heads=1, head_dim=8
)


def registration(worker_id: str, instance: int = 1, **fields: Any) -> Register:
    """Make a registration; ids that begin with p are prefill workers."""
    role = Role.PREFILL if worker_id.startswith("p") else Role.DECODE
    address = PeerAddress(worker_id=worker_id, instance=instance, transport="ucx", host="127.0.0.1", port=1)
    defaults: dict[str, Any] = {
        "role": role,
        "fingerprint": FINGERPRINT,
        "num_blocks": 100,
        "max_num_seqs": 8,
        "max_model_len": 256,
        "address": address if role is Role.PREFILL else None,
    }
    return Register(worker_id=worker_id, instance=instance, **{**defaults, **fields})


def add(registry: Registry, worker_id: str, instance: int = 1, now_s: float = 0.0, **fields: Any) -> Worker:
    """Register a worker."""
    worker = registry.register(registration(worker_id, instance, **fields), now_s)
    assert not isinstance(worker, Refusal), worker
    return worker


def link_all(registry: Registry) -> None:
    """Link every decode worker with every prefill worker."""
    for decode in registry.decodes:
        registry.set_links(decode.key, [(p.key.worker_id, p.key.instance) for p in registry.prefills])


def cluster(num_prefills: int = 1, num_decodes: int = 1, **fields: Any) -> Registry:
    """Make a registry with p0, p1, … and d0, d1, …, all linked."""
    registry = Registry(lease_ttl_s=3.0, stall_s=20.0)
    for role, count in (("p", num_prefills), ("d", num_decodes)):
        for i in range(count):
            add(registry, f"{role}{i}", **fields)
    link_all(registry)
    return registry


def key(worker_id: str, instance: int = 1) -> WorkerKey:
    """Name an instance."""
    return WorkerKey(worker_id, instance)


def beat(progress: int = 0, has_work: bool = False, is_draining: bool = False, **stats: Any) -> Heartbeat:
    """Make a heartbeat."""
    return Heartbeat(progress=progress, has_work=has_work, is_draining=is_draining, stats=WorkerStats(**stats))


def submission(request_id: int, num_prompt_tokens: int = 6, max_tokens: int = 5, first: int = 0) -> Submission:
    """Make a request; its prompt is `first`, `first` + 1, …"""
    prompt = tuple(range(first, first + num_prompt_tokens))
    sampling = SamplingParams(seed=request_id, max_tokens=max_tokens)
    return Submission(request_id, prompt, sampling, first_token_due_s=1.0)


def row(request_id: int, epoch: int, index: int, finish: FinishReason | None = None) -> TokenRow:
    """Make a token; its id follows from request and index, as with a seeded sampler."""
    return TokenRow(request_id, epoch, index, 1000 * request_id + index, finish)


def first_token(transfer_id: int, first: TokenRow) -> FirstToken:
    """Make a first token."""
    return FirstToken(transfer_id=transfer_id, row=first, num_cached_tokens=0, queue_s=0.0, prefill_s=0.1)
