"""Counters of one side of block transfers, growing from its start."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvtransfer.tombstones import Ending


@dataclass(slots=True)
class TransferStats:
    """What moved. Of complete transfers alone, `num_bytes` equals `num_blocks` times the bytes of a block.

    Attributes:
        num_transfers: complete ones.
        num_transfers_failed: broken ones.
        num_transfers_cancelled: called off by either side before they were complete, with nothing broken.
        num_bytes: payload accepted (receiver) or posted (sender), aborted transfers included.
        num_pieces: pieces behind `num_bytes`.
        num_blocks: blocks moved by complete transfers, each once.
        num_blocks_skipped: blocks of complete transfers that the receiver held already.
        transfer_s: summed time from grant to complete.
        num_late_pieces: payload dropped because its transfer was over.
        num_late_messages: messages dropped because their transfer was over or unknown.
        num_corrupt_pieces: payload whose checksum was wrong.
    """

    num_transfers: int = 0
    num_transfers_failed: int = 0
    num_transfers_cancelled: int = 0
    num_bytes: int = 0
    num_pieces: int = 0
    num_blocks: int = 0
    num_blocks_skipped: int = 0
    transfer_s: float = 0.0
    num_late_pieces: int = 0
    num_late_messages: int = 0
    num_corrupt_pieces: int = 0

    def ended(self, ending: Ending) -> None:
        """Count a transfer that did not land."""
        if ending.is_failure:
            self.num_transfers_failed += 1
        else:
            self.num_transfers_cancelled += 1

    def copy(self) -> TransferStats:
        """Return these numbers as of now."""
        return replace(self)
