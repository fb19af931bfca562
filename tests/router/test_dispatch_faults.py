"""Dispatch under arbitrary events: one terminal record each, tokens once and in order, nothing left behind."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.readout import ReadLabels
from protocol.request import FinishReason, TokenRow
from protocol.wire import Abort, Declined, FirstToken, Preempted, Prefill, Readings, Reserve, TransferFailed
from router.dispatch import Dispatch
from router.instructions import Deliver, Finish, IdSource, Instruction, Placed, Read, Send, Terminal
from router.members import WorkerKey
from tests.router.cluster import add, beat, cluster, first_token, link_all, row, submission


class World:
    """Two prefill and two decode workers that do what they are told, mostly, and a client that checks everything."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fields = {"num_blocks": 24, "max_num_seqs": 4, "phases_agree": self.rng.random() < 0.5}
        self.registry = cluster(2, 2, **self.fields)
        self.dispatch = Dispatch(self.registry, 4, placement_wait_s=50.0, ids=IdSource(0))
        self.now_s = 0.0
        self.max_tokens: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ended: dict[int, Terminal] = {}
        self.read: set[int] = set()
        self.prefills: dict[int, tuple[WorkerKey, Prefill]] = {}
        self.reserved: dict[int, tuple[WorkerKey, Reserve]] = {}
        self.running: dict[int, int] = {}
        self.history: list[tuple[WorkerKey, FirstToken | TokenRow | Readings]] = []
        self.instances = dict.fromkeys(("p0", "p1", "d0", "d1"), 1)

    def do(self, out: list[Instruction]) -> None:
        """Carry out, as workers and client would."""
        for one in out:
            if isinstance(one, Send):
                self._receive(one.key, one.message)
            elif isinstance(one, Deliver):
                assert one.request_id not in self.ended, "a token after the end"
                seen = self.tokens[one.request_id]
                assert one.row.index == len(seen), "each index once, in order"
                assert one.row.token_id == 1000 * one.request_id + len(seen)
                seen.append(one.row.token_id)
            elif isinstance(one, Placed):
                assert one.request_id not in self.ended
            elif isinstance(one, Read):
                assert one.request_id not in self.ended and one.request_id not in self.read, "read once"
                self.read.add(one.request_id)
            else:
                assert one.request_id not in self.ended, "two terminal records"
                self.ended[one.request_id] = one

    def _receive(self, key: WorkerKey, message: object) -> None:
        assert self.registry.find(key) is not None, "sent to a worker that is gone"
        if isinstance(message, Prefill):
            self.prefills[message.transfer_id] = (key, message)
        elif isinstance(message, Reserve):
            assert message.emitted == tuple(self.tokens[message.request_id])
            self.reserved[message.transfer_id] = (key, message)
        elif isinstance(message, Abort):
            store = self.prefills if key.worker_id.startswith("p") else self.reserved
            store.pop(message.transfer_id, None)
            if store is self.reserved:
                self.running.pop(message.transfer_id, None)

    # --- what workers do ---

    def prefill_one(self) -> None:
        """Finish one prompt; its transfer lands at once if the reservation is still there."""
        if not self.prefills:
            return
        transfer_id = self.rng.choice(list(self.prefills))
        key, message = self.prefills[transfer_id]
        if message.readout is not None:
            self.prefills.pop(transfer_id)
            told = Readings(transfer_id=transfer_id, labels=(-0.5,), num_cached_tokens=0, queue_s=0.0, prefill_s=0.1)
            self.history.append((key, told))
            self.do(self.dispatch.readings(key, told, self.now_s))
            return
        index = len(message.emitted)
        finish = FinishReason.LENGTH if self.max_tokens[message.request_id] == index + 1 else None
        if finish is None and self.rng.random() < 0.05:
            finish = FinishReason.STOP
        first = first_token(transfer_id, row(message.request_id, message.epoch, index, finish))
        self.history.append((key, first))
        self.prefills.pop(transfer_id)
        overtakes = self.rng.random() < 0.3
        if transfer_id in self.reserved and finish is None:
            reserved = self.reserved[transfer_id][1]
            self.running[transfer_id] = max(1, len(reserved.emitted)) if reserved.is_replayed else index + 1
            if overtakes:
                self.decode_step(transfer_id)
        self.do(self.dispatch.first_token(key, first, self.now_s))

    def decode_step(self, only: int | None = None) -> None:
        """Emit one token of a running sequence."""
        if not self.running:
            return
        transfer_id = only if only is not None else self.rng.choice(list(self.running))
        key, message = self.reserved[transfer_id]
        index = self.running[transfer_id]
        is_last = index + 1 >= self.max_tokens[message.request_id]
        token = row(message.request_id, message.epoch, index, FinishReason.LENGTH if is_last else None)
        self.running[transfer_id] += 1
        if is_last:
            del self.running[transfer_id], self.reserved[transfer_id]
        self.history.append((key, token))
        self.do(self.dispatch.tokens(key, [token], self.now_s))

    def refuse(self) -> None:
        """Decline, give way or fail one placement."""
        held = [(t, *v) for t, v in [*self.prefills.items(), *self.reserved.items()]]
        if not held:
            return
        transfer_id, key, _ = self.rng.choice(held)
        was_running = transfer_id in self.running
        store = self.prefills if key.worker_id.startswith("p") else self.reserved
        store.pop(transfer_id)
        if store is self.reserved:
            self.running.pop(transfer_id, None)
        d = self.dispatch
        if store is self.reserved and was_running and self.rng.random() < 0.7:
            self.do(d.preempted(key, Preempted(transfer_id=transfer_id), self.now_s))
        elif self.rng.random() < 0.5:
            self.do(d.transfer_failed(key, TransferFailed(transfer_id=transfer_id, reason="x"), self.now_s))
        else:
            self.do(d.declined(key, Declined(transfer_id=transfer_id, reason="x"), self.now_s))

    def lose_worker(self, worker_id: str | None = None) -> None:
        """Kill one worker, and start it again."""
        worker_id = worker_id or self.rng.choice(list(self.instances))
        key = WorkerKey(worker_id, self.instances[worker_id])
        for store in (self.prefills, self.reserved):
            for transfer_id in [t for t, (k, _) in store.items() if k == key]:
                del store[transfer_id]
                if store is self.reserved:
                    self.running.pop(transfer_id, None)
        self.registry.remove(key)
        self.do(self.dispatch.worker_lost(key, self.now_s))
        self.instances[worker_id] += 1
        add(self.registry, worker_id, self.instances[worker_id], self.now_s, **self.fields)
        link_all(self.registry)
        self.do(self.dispatch.tick(self.now_s))

    def drain_worker(self) -> None:
        """Let a decode worker take nothing new."""
        worker = self.rng.choice(self.registry.decodes)
        self.registry.heartbeat(worker.key, beat(is_draining=True), self.now_s)
        self.do(self.dispatch.tick(self.now_s))

    def repeat(self) -> None:
        """Send something again that was sent before."""
        if not self.history:
            return
        key, message = self.rng.choice(self.history)
        if isinstance(message, FirstToken):
            assert self.dispatch.first_token(key, message, self.now_s) == []
        elif isinstance(message, Readings):
            assert self.dispatch.readings(key, message, self.now_s) == []
        else:
            assert self.dispatch.tokens(key, [message], self.now_s) == []

    # --- what clients do ---

    def submit(self) -> None:
        """Make a request."""
        request_id = len(self.tokens) + 1
        self.tokens[request_id] = []
        self.max_tokens[request_id] = self.rng.choice([1, 2, 5, 12])
        num_tokens = self.rng.choice([1, 4, 9, 20])
        asked = submission(request_id, num_tokens, self.max_tokens[request_id], first=self.rng.choice([0, 50]))
        if self.rng.random() < 0.2:
            asked = replace(asked, readout=ReadLabels(token_ids=(7,)))
        self.do(self.dispatch.submit(asked, self.now_s))

    def leave(self) -> None:
        """Cancel a request, or reach its stop string."""
        if not self.tokens:
            return
        request_id = self.rng.randint(1, len(self.tokens))
        leave = self.dispatch.cancel if self.rng.random() < 0.5 else self.dispatch.stop
        self.do(leave(request_id, self.now_s))

    def pause(self) -> None:
        """Stop reading."""
        if self.tokens:
            request_id = self.rng.randint(1, len(self.tokens))
            self.do(self.dispatch.pause(request_id, self.now_s))
            held = [m.request_id for _, m in self.prefills.values()]
            held += [m.request_id for _, m in self.reserved.values()]
            assert request_id not in held, "who is paused holds nothing anywhere"

    def read_on(self) -> None:
        """Read again."""
        if self.tokens:
            self.do(self.dispatch.go_on(self.rng.randint(1, len(self.tokens)), self.now_s))

    def wait(self) -> None:
        """Let time pass."""
        self.now_s += self.rng.choice([0.01, 0.3, 1.0])
        self.do(self.dispatch.tick(self.now_s))

    def settle(self) -> None:
        """Let everything finish without faults: every client reads, and workers that drain come back."""
        for request_id in self.tokens:
            self.do(self.dispatch.go_on(request_id, self.now_s))
        for worker in [w for w in self.registry.decodes if w.is_draining]:
            self.lose_worker(worker.key.worker_id)
        for _ in range(5000):
            if len(self.ended) == len(self.tokens):
                return
            self.wait()
            self.prefill_one()
            self.decode_step()
        raise AssertionError(f"unfinished: {set(self.tokens) - set(self.ended)}")


ACTIONS = ["submit"] * 4 + ["prefill_one"] * 6 + ["decode_step"] * 10 + ["wait"] * 3 + ["leave", "refuse", "repeat"] * 2
ACTIONS += ["lose_worker", "drain_worker", "pause", "read_on", "read_on"]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.sampled_from(ACTIONS), min_size=10, max_size=150))
def test_every_request_ends_once_with_its_tokens_in_order(seed: int, actions: list[str]) -> None:
    world = World(seed)
    for action in actions:
        getattr(world, action)()
    world.settle()
    assert set(world.ended) == set(world.tokens)
    for request_id in world.read:
        assert isinstance(world.ended[request_id], Finish) and not world.tokens[request_id]
    dispatch = world.dispatch
    assert dispatch.num_running == dispatch.num_waiting == 0
    for transfer_id, (key, _) in [*world.prefills.items(), *world.reserved.items()]:
        raise AssertionError(f"{key} still holds {transfer_id}")
    for load in dispatch.loads._loads.values():
        assert (
            not load.queued
            and load.queued_tokens == 0
            and not load.held
            and not load.readouts
            and load.ledger.num_blocks == 0
        )
