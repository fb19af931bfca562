"""The prefill worker's side of block transfers.

    1. `serve` takes an endpoint of a decode worker; its reader collects CREDIT (posted receives) and GRANT.
    2. `open` names a transfer's blocks and says BEGIN to its receiver, which answers with the GRANT; a GRANT that comes
       before it is kept for it.
    3. `ready` hands over computed cells; with the grant they queue, cut into pieces of one slot.
    4. One task sends, round robin over the transfers: gather into a slot, checksum, PIECE header, payload. A piece
       needs a credit of the receiver and a free slot here; lacking either is backpressure.
    5. `commit` ends the prompt; COMMIT is said once the last piece is posted.
    RESEND at any time: a piece arrived damaged and is gathered and sent once more.
    6. LANDED, a PEER-ABORT, a lost peer, a spent budget or `abort` ends it: `on_ended`, once.

Gathering is synchronous on the event loop, so a transfer that left the table reads its blocks no more: they may be
freed as soon as `on_ended` is called. What is still on the wire then is in slots. On a GPU this needs the other half of
the bargain: cells are `ready` when the kernel that computed them is done, not when it is launched.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from kvtransfer.config import TransferConfig
from kvtransfer.pieces import cut, require_slot_holds_layer
from kvtransfer.slots import Slots, SlotStore
from kvtransfer.stats import TransferStats
from kvtransfer.tombstones import Ending, Tombstones
from kvtransfer.transport import Buffer, Completion, Endpoint
from protocol.errors import PeerLost, ProtocolError, TransferError
from protocol.handoff import Sending, SendInstruction, SendRange
from protocol.kv_layout import KVRegion
from protocol.wire import Begin, Commit, Credit, Grant, Landed, PeerAbort, PeerMessage, Piece, Resend

log = logging.getLogger(__name__)

MAX_EARLY_GRANTS = 4096
MAX_CREDITS = 4096


@dataclass(slots=True, eq=False)
class _Peer:
    """One decode worker's endpoint and what may be sent on it."""

    endpoint: Endpoint
    slots: Slots
    moved_s: float
    slot_bytes: int = 0
    credits: deque[int] = field(default_factory=deque)
    queue: deque[_Outgoing] = field(default_factory=deque)
    num_slots_held: int = 0


@dataclass(slots=True, eq=False)
class _Outgoing:
    """One open transfer."""

    transfer_id: int
    receiver_id: str
    block_ids: tuple[int, ...]
    machine: Sending
    moved_s: float
    granted_s: float = 0.0
    peer: _Peer | None = None
    ranges: deque[SendRange] = field(default_factory=deque)
    num_in_flight: int = 0
    first_token_id: int | None = None
    is_commit_due: bool = False
    is_commit_said: bool = False


class SendSide:
    """Sends blocks of one region to any number of decode workers. All methods are called on one event loop.

    Args:
        region: the KV memory; read only between `open` and `on_ended`, only cells that were `ready`. Its slots are made
            here, on the calling thread: on a GPU that thread has a CUDA context before UCX is told of the memory.
        config: budgets and slot sizes.
        on_ended: called exactly once per opened transfer, never from inside a method: (transfer_id, None) when it
            landed, else (transfer_id, ending). Its blocks are not read any more.
        on_broken: called with the error of a task of ours that should never end: nothing is sent any more.

    Raises:
        ConfigError: one layer of one block does not fit a slot, or there is no device memory where it is insisted on.
    """

    def __init__(
        self,
        region: KVRegion,
        config: TransferConfig,
        on_ended: Callable[[int, Ending | None], None],
        on_broken: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self._layer_bytes = region.fingerprint.layer_bytes
        self._num_layers = region.fingerprint.num_layers
        self._region = region
        self._config = config
        self._on_ended = on_ended
        self._on_broken = on_broken
        self._store = SlotStore(region, config, config.num_slots, self._layer_bytes)
        self._stats = TransferStats()
        self._peers: dict[str, _Peer] = {}
        self._transfers: dict[int, _Outgoing] = {}
        self._early: OrderedDict[int, tuple[_Peer, Grant, float]] = OrderedDict()
        self._gone = Tombstones(config.tombstone_s)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_running = False
        self._is_closed = False

    @property
    def stats(self) -> TransferStats:
        """Counters as of now."""
        return self._stats.copy()

    @property
    def slots(self) -> tuple[int, int]:
        """Free and total send slots."""
        return self._store.counts

    @property
    def slot_store(self) -> SlotStore:
        """The send slots, for the Identity that this side listens under."""
        return self._store

    @property
    def num_open(self) -> int:
        """Transfers that have not ended."""
        return len(self._transfers)

    def serve(self, endpoint: Endpoint) -> None:
        """Talk to a decode worker until its endpoint is lost; replaces an earlier endpoint of the same worker."""
        if self._is_closed:
            endpoint.abort("sender closed")
            return
        if (previous := self._peers.get(endpoint.peer_id)) is not None:
            previous.endpoint.abort(f"replaced by a new connection of instance {endpoint.peer_instance}")
            self._lose(previous, "its worker connected anew")
        slots = self._store.pool(endpoint.agreement.kind)
        try:
            slots.resize(self._config.num_slots)  # makes those of another memory, drops what self-tests borrowed
        except TransferError as error:
            log.error("no slots for decode worker %s: %s", endpoint.peer_id, error)
            endpoint.abort(f"no slots: {error}")
            return
        peer = self._peers[endpoint.peer_id] = _Peer(endpoint, slots, _now())
        log.info("decode worker %s: from slots in %s memory", endpoint.peer_id, endpoint.agreement.kind)
        for transfer in self._transfers.values():
            if transfer.receiver_id == endpoint.peer_id:
                self._say_begin(transfer)  # on the connection before it may have been lost
        self._spawn(self._read(peer))
        if not self._is_running:
            self._is_running = True
            self._spawn(self._push())
            self._spawn(self._watch())

    def open(self, transfer_id: int, receiver_id: str, block_ids: Sequence[int]) -> None:
        """Begin a transfer of the prompt held in `block_ids`, in order, the partial last block included.

        The blocks stay leased until `on_ended`. An id is never used twice.
        """
        assert transfer_id not in self._transfers, f"transfer {transfer_id} is open"
        blocks = tuple(block_ids)
        transfer = _Outgoing(transfer_id, receiver_id, blocks, Sending(len(blocks)), _now())
        self._transfers[transfer_id] = transfer
        if (over := self._gone.ending(transfer_id)) is not None:
            self._end(transfer, Ending(f"was over before it began: {over.reason}", over.is_failure))
        elif (early := self._early.pop(transfer_id, None)) is not None:
            peer, grant, _ = early
            try:
                self._take_grant(peer, grant)
            except ProtocolError as error:
                peer.endpoint.abort(str(error))
        else:
            self._say_begin(transfer)

    def ready(self, transfer_id: int, cells: SendRange) -> None:
        """Hand over cells that are computed, each cell once; ignored if the transfer is over.

        On a GPU the caller has waited for an event behind the kernel that wrote them (see `KVRegion`).
        """
        if (transfer := self._transfers.get(transfer_id)) is not None:
            self._obey(transfer, transfer.machine.ready(cells))

    def commit(self, transfer_id: int, first_token_id: int) -> None:
        """Say that every cell was handed over, and token 0; ignored if the transfer is over."""
        if (transfer := self._transfers.get(transfer_id)) is not None:
            transfer.first_token_id = first_token_id
            transfer.moved_s = _now()
            self._obey(transfer, transfer.machine.commit())

    def abort(self, transfer_id: int, reason: str) -> None:
        """Call a transfer off and tell its receiver; idempotent. No gather happens after it returns."""
        self._abort(transfer_id, Ending(reason, is_failure=False))

    async def close(self) -> None:
        """End every transfer and endpoint; returns after the last `on_ended`."""
        self._is_closed = True
        for transfer in list(self._transfers.values()):
            self._abort(transfer.transfer_id, Ending("sender closed"))
        for peer in list(self._peers.values()):
            await peer.endpoint.close()
            self._lose(peer, "sender closed")
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.sleep(0)

    # --- what peers say ----------------------------------------------------------------------------------------------

    async def _read(self, peer: _Peer) -> None:
        try:
            while True:
                self._take(peer, await peer.endpoint.receive())
        except PeerLost as error:
            self._lose(peer, str(error))
        except ProtocolError as error:
            log.error("decode worker %s: %s", peer.endpoint.peer_id, error)
            peer.endpoint.abort(str(error))
            self._lose(peer, str(error))

    def _take(self, peer: _Peer, message: PeerMessage) -> None:
        match message:
            case Credit():
                self._take_credit(peer, message)
            case Grant():
                self._take_grant(peer, message)
            case Landed():
                self._take_landed(peer, message.transfer_id)
            case Resend():
                self._take_resend(peer, message)
            case PeerAbort():
                self._take_abort(peer, message)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for a sender")

    def _take_credit(self, peer: _Peer, credit: Credit) -> None:
        require_slot_holds_layer(credit.slot_bytes, self._layer_bytes, ProtocolError)
        if len(peer.credits) + len(credit.tags) > MAX_CREDITS:
            raise ProtocolError(f"more than {MAX_CREDITS} credits")
        peer.slot_bytes = credit.slot_bytes
        peer.credits.extend(credit.tags)
        peer.moved_s = _now()
        self._wake.set()

    def _take_grant(self, peer: _Peer, grant: Grant) -> None:
        transfer = self._transfers.get(grant.transfer_id)
        if transfer is None and grant.transfer_id not in self._gone:
            self._early[grant.transfer_id] = (peer, grant, _now())
            if len(self._early) > MAX_EARLY_GRANTS:
                self._drop_early(next(iter(self._early)), "too many grants wait for their prefill")
        elif transfer is None or transfer.receiver_id != peer.endpoint.peer_id:
            self._stats.num_late_messages += 1
            ending = self._gone.ending(grant.transfer_id) or Ending("meant for another receiver")
            self._tell_abort(peer, grant.transfer_id, ending)
        else:
            instructions = transfer.machine.grant(grant.num_blocks, grant.num_cached_blocks)
            transfer.peer = peer
            transfer.granted_s = transfer.moved_s = _now()
            self._obey(transfer, instructions)

    def _take_landed(self, peer: _Peer, transfer_id: int) -> None:
        transfer = self._own(peer, transfer_id)
        if transfer is None:
            return
        if not transfer.is_commit_said:
            raise ProtocolError("LANDED before COMMIT")
        transfer.machine.landed()
        self._end(transfer, None)

    def _take_resend(self, peer: _Peer, message: Resend) -> None:
        transfer = self._own(peer, message.transfer_id)
        if transfer is None:
            return
        cells = SendRange(message.first_block, message.num_blocks, message.first_layer, message.num_layers)
        if cells.first_layer + cells.num_layers > self._num_layers:
            raise ProtocolError(f"RESEND of {cells}, a model of {self._num_layers} layers")
        where = (message.transfer_id, cells, peer.endpoint.peer_id)
        log.warning("transfer %d: %s arrived damaged at decode worker %s and is sent again", *where)
        self._obey(transfer, list(transfer.machine.resend(cells)))

    def _take_abort(self, peer: _Peer, message: PeerAbort) -> None:
        self._early.pop(message.transfer_id, None)
        transfer = self._transfers.get(message.transfer_id)
        ending = Ending(f"receiver: {message.reason}", message.is_failure)
        if transfer is not None and transfer.receiver_id == peer.endpoint.peer_id:
            self._end(transfer, ending)
        elif transfer is None and message.transfer_id not in self._gone:
            self._gone.add(message.transfer_id, ending)
        else:
            self._stats.num_late_messages += 1

    def _own(self, peer: _Peer, transfer_id: int) -> _Outgoing | None:
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.peer is not peer:
            self._stats.num_late_messages += 1
            return None
        return transfer

    # --- sending -----------------------------------------------------------------------------------------------------

    def _obey(self, transfer: _Outgoing, instructions: list[SendInstruction]) -> None:
        was_queued = bool(transfer.ranges)
        for instruction in instructions:
            if isinstance(instruction, SendRange):
                transfer.ranges.append(instruction)
            else:
                transfer.is_commit_due = True
        if transfer.ranges and not was_queued:
            assert transfer.peer is not None
            transfer.peer.queue.append(transfer)
            transfer.moved_s = _now()
            self._wake.set()
        self._say_commit_if_due(transfer)

    async def _push(self) -> None:
        while True:
            work = self._next()
            if work is None:
                self._wake.clear()
                await self._wake.wait()
            else:
                self._send_piece(*work)
                await asyncio.sleep(0)  # messages and completions go between two pieces

    def _next(self) -> tuple[_Peer, _Outgoing] | None:
        """Choose the next transfer to send a piece of, its peers in turn; None if all lack credit, slot or work."""
        for peer_id, peer in list(self._peers.items()):
            # One stuck peer must not hold every slot until its budget is spent.
            share = peer.slots.num_total if len(self._peers) == 1 else max(1, peer.slots.num_total // 2)
            while peer.queue and not peer.queue[0].ranges:
                peer.queue.popleft()  # it ended while queued
            if peer.queue and peer.credits and peer.slots.num_free and peer.num_slots_held < share:
                self._peers[peer_id] = self._peers.pop(peer_id)  # to the end of the turn
                return peer, peer.queue.popleft()
        return None

    def _send_piece(self, peer: _Peer, transfer: _Outgoing) -> None:
        cells = cut(transfer.ranges, min(peer.slot_bytes, self._store.slot_bytes) // self._layer_bytes)
        slot, tag = peer.slots.take(), peer.credits.popleft()
        assert slot is not None
        payload = slot[: cells.num_blocks * cells.num_layers * self._layer_bytes]
        try:
            header = self._fill(payload, peer, transfer, cells, tag)
        except TransferError as error:
            log.error("transfer %d: %s", transfer.transfer_id, error)
            peer.slots.give(slot)
            peer.credits.append(tag)
            self._abort(transfer.transfer_id, Ending(str(error)))
            return
        peer.endpoint.post(header)
        self._stats.num_bytes += payload.nbytes
        self._stats.num_pieces += 1
        transfer.num_in_flight += 1
        peer.num_slots_held += 1
        done = peer.endpoint.send(payload, tag)
        done.add_done_callback(lambda _: self._sent(peer, transfer, slot, done))
        if transfer.ranges:
            peer.queue.append(transfer)
        self._say_commit_if_due(transfer)

    def _fill(self, payload: Buffer, peer: _Peer, transfer: _Outgoing, cells: SendRange, tag: int) -> Piece:
        """Gather cells into a slot and return their header."""
        block_ids = transfer.block_ids[cells.first_block : cells.first_block + cells.num_blocks]
        self._region.gather(block_ids, cells.first_layer, cells.num_layers, payload)
        return Piece(
            transfer_id=transfer.transfer_id,
            tag=tag,
            first_block=cells.first_block,
            num_blocks=cells.num_blocks,
            first_layer=cells.first_layer,
            num_layers=cells.num_layers,
            num_bytes=payload.nbytes,
            checksum=self._region.checksum(payload, peer.endpoint.agreement.checksum),
        )

    def _sent(self, peer: _Peer, transfer: _Outgoing, slot: Buffer, done: Completion) -> None:
        peer.slots.give(slot)
        peer.num_slots_held -= 1
        transfer.num_in_flight -= 1
        self._wake.set()
        error = done.exception()
        if error is None:
            peer.moved_s = transfer.moved_s = _now()
        else:
            peer.endpoint.abort(f"payload could not be sent: {error}")

    def _say_commit_if_due(self, transfer: _Outgoing) -> None:
        if not transfer.is_commit_due or transfer.is_commit_said or transfer.ranges:
            return
        assert transfer.peer is not None and transfer.first_token_id is not None
        transfer.is_commit_said = True
        transfer.moved_s = _now()
        transfer.peer.endpoint.post(
            Commit(
                transfer_id=transfer.transfer_id,
                num_blocks=transfer.machine.num_blocks,
                first_token_id=transfer.first_token_id,
            )
        )

    # --- ends --------------------------------------------------------------------------------------------------------

    def _abort(self, transfer_id: int, ending: Ending) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            self._gone.add(transfer_id, ending)
            return
        self._tell_abort(transfer.peer or self._peers.get(transfer.receiver_id), transfer_id, ending)
        self._end(transfer, ending)

    def _end(self, transfer: _Outgoing, ending: Ending | None) -> None:
        del self._transfers[transfer.transfer_id]
        transfer.machine.abort()
        transfer.ranges.clear()
        self._gone.add(transfer.transfer_id, ending or Ending("landed", is_failure=False))
        if ending is None:
            self._stats.num_transfers += 1
            self._stats.num_blocks += transfer.machine.num_blocks - transfer.machine.num_cached_blocks
            self._stats.num_blocks_skipped += transfer.machine.num_cached_blocks
            self._stats.transfer_s += _now() - transfer.granted_s
        else:
            self._stats.ended(ending)
        asyncio.get_running_loop().call_soon(self._on_ended, transfer.transfer_id, ending)

    def _lose(self, peer: _Peer, reason: str) -> None:
        if self._peers.get(peer.endpoint.peer_id) is not peer:
            return
        del self._peers[peer.endpoint.peer_id]
        peer.credits.clear()
        peer.queue.clear()
        for transfer_id in [i for i, (early_peer, _, _) in self._early.items() if early_peer is peer]:
            del self._early[transfer_id]
            self._gone.add(transfer_id, Ending("its receiver was lost"))
        for transfer in [t for t in self._transfers.values() if t.receiver_id == peer.endpoint.peer_id]:
            self._end(transfer, Ending(f"decode worker {peer.endpoint.peer_id} lost: {reason}"))

    def _say_begin(self, transfer: _Outgoing) -> None:
        peer = self._peers.get(transfer.receiver_id)
        if peer is not None and transfer.peer is None:
            peer.endpoint.post(Begin(transfer_id=transfer.transfer_id))

    def _tell_abort(self, peer: _Peer | None, transfer_id: int, ending: Ending) -> None:
        if peer is not None:
            peer.endpoint.post(
                PeerAbort(transfer_id=transfer_id, reason=ending.reason[:4096], is_failure=ending.is_failure)
            )

    def _drop_early(self, transfer_id: int, reason: str) -> None:
        (peer, _, _), ending = self._early.pop(transfer_id), Ending(reason)
        self._gone.add(transfer_id, ending)
        self._tell_abort(peer, transfer_id, ending)

    async def _watch(self) -> None:
        interval_s = min(self._config.progress_s, self._config.grant_wait_s, self._config.tombstone_s) / 5
        while True:
            await asyncio.sleep(interval_s)
            now_s = _now()
            self._gone.expire()
            late = [i for i, (_, _, since_s) in self._early.items() if now_s - since_s > self._config.grant_wait_s]
            for transfer_id in late:
                self._drop_early(transfer_id, f"no prefill within {self._config.grant_wait_s} s of the grant")
            for transfer in list(self._transfers.values()):
                self._check_budget(transfer, now_s)

    def _check_budget(self, transfer: _Outgoing, now_s: float) -> None:
        waited_s, peer = now_s - transfer.moved_s, transfer.peer
        if transfer.transfer_id not in self._transfers:
            return  # it ended with its peer earlier in this round
        if peer is None:
            if transfer.first_token_id is not None and waited_s > self._config.grant_wait_s:
                self._abort(
                    transfer.transfer_id, Ending(f"no grant within {self._config.grant_wait_s} s of the commit")
                )
        elif waited_s <= self._config.progress_s:
            return
        elif transfer.num_in_flight:
            self._give_up(peer, f"a piece made no progress for {waited_s:.1f} s")
        elif transfer.ranges and now_s - peer.moved_s > self._config.progress_s:
            lacking = "free slot" if peer.credits else "credit"  # aborted transfers may hold the slots
            self._give_up(peer, f"no {lacking} for {now_s - peer.moved_s:.1f} s")
        elif transfer.is_commit_said:
            self._abort(transfer.transfer_id, Ending(f"not landed {waited_s:.1f} s after its last piece"))

    def _give_up(self, peer: _Peer, reason: str) -> None:
        """A payload connection that stalls is of no use to anyone: end it, which also frees its slots."""
        log.error("decode worker %s: %s", peer.endpoint.peer_id, reason)
        peer.endpoint.abort(reason)
        self._lose(peer, reason)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("sending failed by our own fault", exc_info=error)
            for peer in list(self._peers.values()):
                peer.endpoint.abort(f"internal error: {error!r}")
            self._on_broken(error)


def _now() -> float:
    return asyncio.get_running_loop().time()
