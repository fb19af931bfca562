"""The hand-off of one sequence, as two pure state machines: events in, instructions out, no clock, no socket.

Prefill side (`Sending`):

    COMPUTING ──grant()──► PUSHING ──commit()──► COMMITTED ──landed()──► LANDED
        │ commit(): remembered, said as soon as the grant comes
        └──────── abort() from any state but LANDED ────────► ABORTED

Decode side (`Receiving`):

    RECEIVING ──commit() and every cell landed──► COMPLETE
        └──────────────── abort() ──────────────► ABORTED      (late pieces and commits are refused)

A piece that arrives damaged is asked for again, by either side's count each cell once; a second time ends the transfer.

A *cell* is one layer of one KV block. Blocks are counted by their position in the prompt, never by block id: neither
side learns the other's ids, and the receiver alone decides where a piece is written. Blocks below `num_cached_blocks`
are held by the receiver already and never sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from protocol.errors import ProtocolError


class HandoffState(Enum):
    """Where a hand-off stands."""

    COMPUTING = auto()
    PUSHING = auto()
    COMMITTED = auto()
    LANDED = auto()
    RECEIVING = auto()
    COMPLETE = auto()
    ABORTED = auto()


@dataclass(frozen=True, slots=True)
class SendRange:
    """Instruction: send these layers of these blocks (positions in the prompt)."""

    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class SendCommit:
    """Instruction: all ranges are on their way, say COMMIT."""


SendInstruction = SendRange | SendCommit


class Sending:
    """Prefill side of one hand-off.

    Args:
        num_blocks: blocks of the prompt, the partial last one included.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_cached_blocks = 0
        self.state = HandoffState.COMPUTING
        self._held: list[SendInstruction] = []
        self._sent_again: set[tuple[int, int]] = set()

    def grant(self, num_blocks: int, num_cached_blocks: int) -> list[SendInstruction]:
        """Take the receiver's grant and release what was computed before it came.

        Raises:
            ProtocolError: a second grant, or one that does not fit the prompt.
        """
        if self.state is HandoffState.ABORTED:
            return []
        if self.state is not HandoffState.COMPUTING:
            raise ProtocolError("second GRANT for one transfer")
        if num_blocks != self.num_blocks or not 0 <= num_cached_blocks <= num_blocks:
            raise ProtocolError(
                f"GRANT of {num_blocks} blocks ({num_cached_blocks} cached) for a prompt of {self.num_blocks}"
            )
        self.num_cached_blocks = num_cached_blocks
        self.state = HandoffState.PUSHING
        held, self._held = self._held, []
        return [clipped for i in held if (clipped := self._clip(i)) is not None]

    def ready(self, cells: SendRange) -> list[SendInstruction]:
        """Note that these cells are computed; return what may be sent now."""
        return self._when_granted(cells)

    def commit(self) -> list[SendInstruction]:
        """Note that the whole prompt is computed; nothing may become ready after it."""
        return self._when_granted(SendCommit())

    def resend(self, cells: SendRange) -> list[SendInstruction]:
        """Take the receiver's word that a piece arrived damaged; return what to send again.

        Raises:
            ProtocolError: cells outside the grant, or sent again before.
        """
        if self.state is HandoffState.ABORTED:
            return []
        last_block, last_layer = cells.first_block + cells.num_blocks, cells.first_layer + cells.num_layers
        wanted = {(b, n) for b in range(cells.first_block, last_block) for n in range(cells.first_layer, last_layer)}
        is_inside = self.num_cached_blocks <= cells.first_block < last_block <= self.num_blocks
        if self.state not in (HandoffState.PUSHING, HandoffState.COMMITTED) or not is_inside or not wanted:
            raise ProtocolError(f"RESEND of {cells}, which lies outside the grant")
        if wanted & self._sent_again:
            raise ProtocolError(f"RESEND of {cells} came twice")
        self._sent_again |= wanted
        return [cells]

    def landed(self) -> None:
        """Take the receiver's word that every cell stands in its memory.

        Raises:
            ProtocolError: said before COMMIT.
        """
        if self.state is HandoffState.ABORTED:
            return
        if self.state is not HandoffState.COMMITTED:
            raise ProtocolError("LANDED before COMMIT")
        self.state = HandoffState.LANDED

    def abort(self) -> bool:
        """End it early; idempotent. Return whether this call changed anything."""
        if self.state in (HandoffState.LANDED, HandoffState.ABORTED):
            return False
        self.state = HandoffState.ABORTED
        self._held.clear()
        return True

    @property
    def is_terminal(self) -> bool:
        """Whether nothing will be sent or awaited any more."""
        return self.state in (HandoffState.LANDED, HandoffState.ABORTED)

    def _when_granted(self, instruction: SendInstruction) -> list[SendInstruction]:
        if self.state is HandoffState.ABORTED:
            return []
        assert self.state in (HandoffState.COMPUTING, HandoffState.PUSHING), self.state
        if self.state is HandoffState.COMPUTING:
            self._held.append(instruction)
            return []
        clipped = self._clip(instruction)
        return [] if clipped is None else [clipped]

    def _clip(self, instruction: SendInstruction) -> SendInstruction | None:
        if isinstance(instruction, SendCommit):
            self.state = HandoffState.COMMITTED
            return instruction
        first = max(instruction.first_block, self.num_cached_blocks)
        last = instruction.first_block + instruction.num_blocks
        if first >= last:
            return None
        return SendRange(first, last - first, instruction.first_layer, instruction.num_layers)


class Receiving:
    """Decode side of one hand-off.

    Args:
        num_blocks: blocks of the prompt.
        num_cached_blocks: leading blocks that are here already.
        num_layers: layers of the model.
    """

    def __init__(self, num_blocks: int, num_cached_blocks: int, num_layers: int) -> None:
        assert 0 <= num_cached_blocks <= num_blocks
        self.num_blocks = num_blocks
        self.num_cached_blocks = num_cached_blocks
        self.num_layers = num_layers
        self.state = HandoffState.RECEIVING
        self._committed = False
        self._cells = bytearray(b"\1" * (num_cached_blocks * num_layers)).ljust(num_blocks * num_layers, b"\0")
        self._num_missing = (num_blocks - num_cached_blocks) * num_layers
        self._damaged = bytearray(num_blocks * num_layers)

    def accepts(self, cells: SendRange) -> bool:
        """Tell whether a piece may be written: False for a late one.

        Raises:
            ProtocolError: outside the grant, or cells that landed before.
        """
        if self.state is not HandoffState.RECEIVING:
            return False
        last_block = cells.first_block + cells.num_blocks
        last_layer = cells.first_layer + cells.num_layers
        inside = self.num_cached_blocks <= cells.first_block < last_block <= self.num_blocks
        if not inside or not 0 <= cells.first_layer < last_layer <= self.num_layers:
            raise ProtocolError(f"piece {cells} lies outside the grant")
        if any(self._cells.count(1, start, end) for start, end in self._rows(cells)):
            raise ProtocolError(f"piece {cells} was sent twice")
        return True

    def damaged(self, cells: SendRange) -> bool:
        """Note that cells arrived damaged; return whether to ask for them again: the first time, each."""
        if any(self._damaged.count(1, start, end) for start, end in self._rows(cells)):
            return False
        for start, end in self._rows(cells):
            self._damaged[start:end] = b"\1" * (end - start)
        return True

    def landed(self, cells: SendRange) -> bool:
        """Mark cells as written; return whether the hand-off just became complete."""
        for start, end in self._rows(cells):
            self._num_missing -= self._cells.count(0, start, end)
            self._cells[start:end] = b"\1" * (end - start)
        return self._check_complete()

    def commit(self, num_blocks: int) -> bool:
        """Take COMMIT; return whether the hand-off just became complete.

        Raises:
            ProtocolError: a second COMMIT, or one for another number of blocks.
        """
        if self.state is not HandoffState.RECEIVING:
            return False
        if self._committed or num_blocks != self.num_blocks:
            raise ProtocolError(f"COMMIT of {num_blocks} blocks for a grant of {self.num_blocks}, or a second one")
        self._committed = True
        return self._check_complete()

    def abort(self) -> bool:
        """End it early; idempotent. Return whether this call changed anything."""
        if self.state is not HandoffState.RECEIVING:
            return False
        self.state = HandoffState.ABORTED
        return True

    def _rows(self, cells: SendRange) -> list[tuple[int, int]]:
        first = cells.first_layer
        return [
            (b * self.num_layers + first, b * self.num_layers + first + cells.num_layers)
            for b in range(cells.first_block, cells.first_block + cells.num_blocks)
        ]

    def _check_complete(self) -> bool:
        if self.state is not HandoffState.RECEIVING or not self._committed or self._num_missing:
            return False
        self.state = HandoffState.COMPLETE
        return True
