"""Pieces: what fits one slot, taken off the ranges that are ready."""

from __future__ import annotations

from collections import deque

from protocol.errors import BatonError, ConfigError
from protocol.handoff import SendRange


def cut(ranges: deque[SendRange], max_cells: int) -> SendRange:
    """Take one piece of at most `max_cells` cells off the front: whole blocks if a block's layers fit, else layers."""
    whole = ranges.popleft()
    if whole.num_layers <= max_cells:
        num_blocks = min(whole.num_blocks, max_cells // whole.num_layers)
        piece = SendRange(whole.first_block, num_blocks, whole.first_layer, whole.num_layers)
        rest = [_from_block(whole, num_blocks)]
    else:
        piece = SendRange(whole.first_block, 1, whole.first_layer, max_cells)
        layers = SendRange(whole.first_block, 1, whole.first_layer + max_cells, whole.num_layers - max_cells)
        rest = [layers, _from_block(whole, 1)]
    ranges.extendleft(reversed([r for r in rest if r.num_blocks]))
    return piece


def require_slot_holds_layer(slot_bytes: int, layer_bytes: int, error: type[BatonError] = ConfigError) -> None:
    """Raise `error` unless one layer of one block, the smallest piece, fits a slot."""
    if slot_bytes < layer_bytes:
        raise error(f"slot_bytes {slot_bytes} does not hold one layer of one KV block ({layer_bytes} bytes)")


def _from_block(cells: SendRange, num_blocks: int) -> SendRange:
    return SendRange(cells.first_block + num_blocks, cells.num_blocks - num_blocks, cells.first_layer, cells.num_layers)
