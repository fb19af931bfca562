"""The decode worker's side of block transfers.

    1. `set_peers` lists prefill workers; `kvtransfer.linking` keeps an endpoint to each.
    2. Every link posts its slots as receives under random tags and says CREDIT for them.
    3. BEGIN says that a prompt is about to be computed: `on_begin`. `open` names the blocks reserved for it and says
       GRANT.
    4. A piece is there once its PIECE header and its payload are, in either order, joined by the tag. One piece per
       turn of the loop: check the sum, ask `Receiving`, scatter into the blocks. The slot is posted again, new tag.
       A damaged piece is asked for once more (RESEND).
    5. COMMIT and every cell: LANDED is said, `on_complete`. Damage again, a lost peer or its word: `on_failed`.
    6. `abort` ends a transfer at once. It leaves a tombstone: late payload is received into its slot and dropped.

Only this side knows its block ids and only step 4 writes them, synchronously on the event loop: a transfer that left
the table is never written again, and one that is complete can be read by whatever is launched after `on_complete`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace

from kvtransfer.config import TransferConfig
from kvtransfer.linking import Linking
from kvtransfer.slots import Slots, SlotStore
from kvtransfer.stats import TransferStats
from kvtransfer.tombstones import Ending, Tombstones
from kvtransfer.transport import Buffer, Completion, Endpoint, Identity, Transport
from protocol.errors import ChecksumMismatch, PeerLost, ProtocolError, TransferError, TransferStalled
from protocol.handoff import Receiving, SendRange
from protocol.kv_layout import KVRegion
from protocol.wire import Begin, Commit, Credit, Grant, Landed, PeerAbort, PeerAddress, PeerMessage, Piece, Resend

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Posted:
    """One receive: a slot under a tag, then its header and its payload, in either order."""

    slot: Buffer
    header: Piece | None = None
    is_filled: bool = False


@dataclass(slots=True, eq=False)
class _Link:
    """One prefill worker's endpoint and the receives posted on it."""

    endpoint: Endpoint
    slots: Slots
    posted: dict[int, _Posted] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Incoming:
    """One open transfer."""

    transfer_id: int
    block_ids: tuple[int, ...]
    machine: Receiving
    link: _Link | None
    granted_s: float
    moved_s: float
    first_token_id: int | None = None


class ReceiveSide:
    """Receives blocks into one region from any number of prefill workers. All methods are called on one event loop.

    Args:
        region: the KV memory; only the blocks of open transfers are written.
        config: budgets and slot sizes.
        transport: how to reach prefill workers; the caller closes it, after this.
        identity: who we are to them; its slots are replaced by those of this side.
        on_complete: called once with (transfer_id, first_token_id) when every cell stands in its block.
        on_failed: called once with (transfer_id, ending) when an open transfer broke, or its sender called it off; its
            blocks are not written any more. Neither is called for a transfer that was aborted here, nor from inside a
            method.
        on_links: called when `links` changed.
        on_broken: called with the error of a task of ours that should never end: not everything is received any more.

    Attributes:
        on_begin: called with (sender's worker id, transfer_id) when a prompt begins, perhaps more than once. Nobody is,
            until the owner sets it, before its first peers.

    Raises:
        ConfigError: one layer of one block does not fit a slot, or there is no device memory where it is insisted on.
    """

    def __init__(
        self,
        region: KVRegion,
        config: TransferConfig,
        transport: Transport,
        identity: Identity,
        on_complete: Callable[[int, int], None],
        on_failed: Callable[[int, Ending], None],
        on_links: Callable[[], None],
        on_broken: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self._layer_bytes = region.fingerprint.layer_bytes
        self._num_layers = region.fingerprint.num_layers
        self._region = region
        self._config = config
        self._on_complete = on_complete
        self._on_failed = on_failed
        self._on_links = on_links
        self._on_broken = on_broken
        self.on_begin: Callable[[str, int], None] = lambda _sender_id, _transfer_id: None
        self._store = SlotStore(region, config, layer_bytes=self._layer_bytes)
        self._linking = Linking(transport, replace(identity, slots=self._store), self._attach, on_broken)
        self._stats = TransferStats()
        self._links: dict[str, _Link] = {}
        self._transfers: dict[int, _Incoming] = {}
        self._gone = Tombstones(config.tombstone_s)
        self._landed: deque[tuple[_Link, int]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def stats(self) -> TransferStats:
        """Counters as of now."""
        return self._stats.copy()

    @property
    def slots(self) -> tuple[int, int]:
        """Free and total receive slots; those of a live link are all posted, none free."""
        return self._store.counts

    @property
    def links(self) -> tuple[tuple[str, int], ...]:
        """Prefill workers (worker_id, instance) that can send here now."""
        return tuple((link.endpoint.peer_id, link.endpoint.peer_instance) for link in self._links.values())

    @property
    def num_open(self) -> int:
        """Transfers that have not ended."""
        return len(self._transfers)

    def set_peers(self, addresses: Iterable[PeerAddress]) -> None:
        """Replace the list of prefill workers to be linked with."""
        self._linking.set_peers(addresses)

    def open(self, transfer_id: int, sender_id: str, block_ids: Sequence[int], num_cached_blocks: int) -> None:
        """Grant blocks to a transfer: `block_ids` of the whole prompt, in order, the leading ones perhaps cached here.

        The blocks stay leased until `on_complete`, `on_failed` or `abort`. An id is never used twice.
        """
        assert transfer_id not in self._transfers, f"transfer {transfer_id} is open"
        link, now_s = self._links.get(sender_id), _now()
        machine = Receiving(len(block_ids), num_cached_blocks, self._num_layers)
        transfer = _Incoming(transfer_id, tuple(block_ids), machine, link, now_s, now_s)
        self._transfers[transfer_id] = transfer
        over = self._gone.ending(transfer_id)
        if link is None or over is not None:
            ending = Ending(f"no link with prefill worker {sender_id}")
            if over is not None:
                ending = Ending(f"over before: {over.reason}", over.is_failure)
            asyncio.get_running_loop().call_soon(self._fail, transfer, ending)
            return
        link.endpoint.post(
            Grant(transfer_id=transfer_id, num_blocks=len(block_ids), num_cached_blocks=num_cached_blocks)
        )

    def abort(self, transfer_id: int, reason: str) -> None:
        """Call a transfer off and tell its sender; idempotent. Nothing is written into its blocks after it returns."""
        transfer, ending = self._transfers.get(transfer_id), Ending(reason, is_failure=False)
        if transfer is None:
            self._gone.add(transfer_id, ending)
            return
        self._end(transfer, ending)
        self._tell_abort(transfer, ending)

    async def close(self) -> None:
        """Drop every link; open transfers fail. Slots are free again once the transport is closed."""
        await self._linking.close()
        for link in list(self._links.values()):
            self._detach(link, "receiver closed")
        for transfer in list(self._transfers.values()):
            self._fail(transfer, Ending("receiver closed"))
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # --- links -------------------------------------------------------------------------------------------------------

    def _attach(self, endpoint: Endpoint) -> None:
        if not self._tasks:
            self._spawn(self._watch())
        if (previous := self._links.get(endpoint.peer_id)) is not None:
            previous.endpoint.abort("replaced by a new connection")
            self._detach(previous, "replaced by a new connection")
        slots = self._store.pool(endpoint.agreement.kind)
        try:
            slots.resize(slots.num_total - slots.num_free + self._config.num_slots)
        except TransferError as error:
            log.error("no slots for prefill worker %s: %s", endpoint.peer_id, error)
            endpoint.abort(f"no slots: {error}")
            return
        link = self._links[endpoint.peer_id] = _Link(endpoint, slots)
        log.info("prefill worker %s: into slots in %s memory", endpoint.peer_id, endpoint.agreement.kind)
        tags = tuple(self._post_receive(link, slot) for slot in slots.borrow(self._config.num_slots))
        endpoint.post(Credit(tags=tags, slot_bytes=self._store.slot_bytes))
        self._spawn(self._read(link))
        self._on_links()

    def _detach(self, link: _Link, reason: str) -> None:
        name = link.endpoint.peer_id
        if self._links.get(name) is not link:
            return
        del self._links[name]
        for tag in [t for t, posted in link.posted.items() if posted.is_filled and posted.header is None]:
            link.slots.give(link.posted.pop(tag).slot)  # its header will not come any more
        for transfer in [t for t in self._transfers.values() if t.link is link]:
            self._fail(transfer, Ending(f"prefill worker {name} lost: {reason}"))
        self._on_links()

    def _post_receive(self, link: _Link, slot: Buffer) -> int:
        tag = secrets.randbits(63)
        link.posted[tag] = _Posted(slot)
        done = link.endpoint.post_receive(slot, tag)
        done.add_done_callback(lambda _: self._filled(link, tag, done))
        return tag

    def _filled(self, link: _Link, tag: int, done: Completion) -> None:
        posted, error = link.posted[tag], done.exception()
        if error is not None or (link.endpoint.lost.done() and posted.header is None):
            del link.posted[tag]
            link.slots.give(posted.slot)
            link.endpoint.abort(f"payload could not be received: {error}")
            return
        posted.is_filled = True
        if posted.header is not None:
            self._queue(link, tag)

    # --- what peers say ----------------------------------------------------------------------------------------------

    async def _read(self, link: _Link) -> None:
        try:
            while True:
                self._take(link, await link.endpoint.receive())
        except PeerLost as error:
            self._detach(link, str(error))
        except ProtocolError as error:
            self._refuse(link, error)

    def _refuse(self, link: _Link, error: ProtocolError) -> None:
        log.error("prefill worker %s: %s", link.endpoint.peer_id, error)
        link.endpoint.abort(str(error))
        self._detach(link, str(error))

    def _take(self, link: _Link, message: PeerMessage) -> None:
        match message:
            case Begin():
                self.on_begin(link.endpoint.peer_id, message.transfer_id)
            case Piece():
                self._take_header(link, message)
            case Commit():
                self._take_commit(link, message)
            case PeerAbort():
                self._take_abort(link, message)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for a receiver")

    def _take_header(self, link: _Link, piece: Piece) -> None:
        posted = link.posted.get(piece.tag)
        if posted is None and link.endpoint.lost.done():
            return  # the payload connection ended first
        if posted is None or posted.header is not None:
            raise ProtocolError("PIECE under a tag that awaits none")
        num_bytes = piece.num_blocks * piece.num_layers * self._layer_bytes
        if piece.num_bytes != num_bytes or not 0 < num_bytes <= self._store.slot_bytes:
            raise ProtocolError(f"PIECE of {piece.num_bytes} bytes, {num_bytes} by its shape")
        posted.header = piece
        if posted.is_filled:
            self._queue(link, piece.tag)

    def _take_commit(self, link: _Link, commit: Commit) -> None:
        transfer = self._own(link, commit.transfer_id)
        if transfer is None:
            self._stats.num_late_messages += 1
            return
        transfer.first_token_id = commit.first_token_id
        transfer.moved_s = _now()
        if transfer.machine.commit(commit.num_blocks):
            self._complete(transfer)

    def _take_abort(self, link: _Link, message: PeerAbort) -> None:
        transfer = self._own(link, message.transfer_id)
        ending = Ending(f"sender: {message.reason}", message.is_failure)
        if transfer is not None:
            self._fail(transfer, ending)
            return
        self._stats.num_late_messages += 1
        if message.transfer_id not in self._transfers:
            self._gone.add(message.transfer_id, ending)

    def _own(self, link: _Link, transfer_id: int) -> _Incoming | None:
        transfer = self._transfers.get(transfer_id)
        return transfer if transfer is not None and transfer.link is link else None

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _queue(self, link: _Link, tag: int) -> None:
        self._landed.append((link, tag))
        if len(self._landed) == 1:
            asyncio.get_running_loop().call_soon(self._write_next)

    def _write_next(self) -> None:
        """Write one piece; the next one in the next turn, so that the loop is held up by one slot at most."""
        link, tag = self._landed.popleft()
        posted = link.posted.pop(tag)
        try:
            assert posted.header is not None
            self._write(link, posted.header, posted.slot)
        except ProtocolError as error:
            self._refuse(link, error)
        finally:
            if self._landed:
                asyncio.get_running_loop().call_soon(self._write_next)
            self._recycle(link, posted.slot)

    def _recycle(self, link: _Link, slot: Buffer) -> None:
        if link.endpoint.lost.done():
            link.slots.give(slot)
        else:
            tag = self._post_receive(link, slot)
            link.endpoint.post(Credit(tags=(tag,), slot_bytes=self._store.slot_bytes))

    def _write(self, link: _Link, piece: Piece, slot: Buffer) -> None:
        transfer = self._own(link, piece.transfer_id)
        cells = SendRange(piece.first_block, piece.num_blocks, piece.first_layer, piece.num_layers)
        if transfer is None or not transfer.machine.accepts(cells):
            self._stats.num_late_pieces += 1
            return
        block_ids = transfer.block_ids[cells.first_block : cells.first_block + cells.num_blocks]
        try:
            self._scatter(link, piece, slot[: piece.num_bytes], block_ids)
        except TransferError as error:
            log.error("%s (from %s)", error, link.endpoint.peer_id)
            if isinstance(error, ChecksumMismatch) and self._ask_again(transfer, link, piece):
                return
            self._break(transfer, f"{type(error).__name__}: {error}")
            return
        self._stats.num_bytes += piece.num_bytes
        self._stats.num_pieces += 1
        transfer.moved_s = _now()
        if transfer.machine.landed(cells):
            self._complete(transfer)

    def _ask_again(self, transfer: _Incoming, link: _Link, piece: Piece) -> bool:
        """Count a damaged piece; ask for it once more, or return False if that was the second time."""
        self._stats.num_corrupt_pieces += 1
        cells = SendRange(piece.first_block, piece.num_blocks, piece.first_layer, piece.num_layers)
        if not transfer.machine.damaged(cells):
            return False
        transfer.moved_s = _now()
        link.endpoint.post(
            Resend(
                transfer_id=piece.transfer_id,
                first_block=piece.first_block,
                num_blocks=piece.num_blocks,
                first_layer=piece.first_layer,
                num_layers=piece.num_layers,
            )
        )
        return True

    def _scatter(self, link: _Link, piece: Piece, payload: Buffer, block_ids: tuple[int, ...]) -> None:
        if self._region.checksum(payload, link.endpoint.agreement.checksum) != piece.checksum:
            raise ChecksumMismatch(f"a piece of transfer {piece.transfer_id} arrived damaged")
        self._region.scatter(block_ids, piece.first_layer, piece.num_layers, payload)

    # --- ends --------------------------------------------------------------------------------------------------------

    def _complete(self, transfer: _Incoming) -> None:
        assert transfer.link is not None and transfer.first_token_id is not None
        del self._transfers[transfer.transfer_id]
        self._gone.add(transfer.transfer_id, Ending("complete", is_failure=False))
        self._stats.num_transfers += 1
        self._stats.num_blocks += transfer.machine.num_blocks - transfer.machine.num_cached_blocks
        self._stats.num_blocks_skipped += transfer.machine.num_cached_blocks
        self._stats.transfer_s += _now() - transfer.granted_s
        transfer.link.endpoint.post(Landed(transfer_id=transfer.transfer_id))
        self._on_complete(transfer.transfer_id, transfer.first_token_id)

    def _end(self, transfer: _Incoming, ending: Ending) -> None:
        del self._transfers[transfer.transfer_id]
        transfer.machine.abort()
        self._gone.add(transfer.transfer_id, ending)
        self._stats.ended(ending)

    def _fail(self, transfer: _Incoming, ending: Ending) -> None:
        if self._transfers.get(transfer.transfer_id) is transfer:  # not if aborted since this was scheduled
            self._end(transfer, ending)
            self._on_failed(transfer.transfer_id, ending)

    def _break(self, transfer: _Incoming, reason: str) -> None:
        ending = Ending(reason)
        self._tell_abort(transfer, ending)
        self._fail(transfer, ending)

    def _tell_abort(self, transfer: _Incoming, ending: Ending) -> None:
        if transfer.link is not None:
            transfer.link.endpoint.post(
                PeerAbort(transfer_id=transfer.transfer_id, reason=ending.reason[:4096], is_failure=ending.is_failure)
            )

    async def _watch(self) -> None:
        """Between GRANT and COMMIT the sender computes, for as long as its lease lasts; after it bytes must flow."""
        interval_s = min(self._config.progress_s, self._config.tombstone_s) / 5
        while True:
            await asyncio.sleep(interval_s)
            self._gone.expire()
            for transfer in list(self._transfers.values()):
                waited_s = _now() - transfer.moved_s
                if transfer.first_token_id is not None and waited_s > self._config.progress_s:
                    error = TransferStalled(f"no piece for {waited_s:.1f} s after COMMIT")
                    self._break(transfer, f"{type(error).__name__}: {error}")

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("receiving failed by our own fault", exc_info=error)
            for link in list(self._links.values()):
                link.endpoint.abort(f"internal error: {error!r}")
            self._on_broken(error)


def _now() -> float:
    return asyncio.get_running_loop().time()
