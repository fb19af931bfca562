"""Loads, KV memory and step inputs that the native and the torch cases share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Final

import torch
from torch import Tensor

from bench.kernels.shape import BLOCK_SIZE, Load, Shape
from bench.kernels.timing import Call
from kernels.cpu.step import StepInput

NUM_POSITIONS: Final = 8192
KV_NAMES: Final = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_POOL_LAYERS = 4
_MOST_PLACES = 1024
_MOST_ROWS = 1 << 16


def _loads(*sizes: tuple[int, int, int]) -> tuple[Load, ...]:
    return tuple(Load(*size) for size in sizes)


@dataclass(frozen=True, slots=True)
class Menu:
    """What is measured.

    Attributes:
        rows: numbers of rows of a product.
        head_rows: the same for the projection to the vocabulary, which sees one row a sequence.
        formats: of weights, for products and steps.
        kv_dtypes: for attention alone.
        each_matrix: products with each of a layer's matrices too, not only with all of them in turn.
    """

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256)
    head_rows: tuple[int, ...] = (1, 8, 16)
    formats: tuple[str, ...] = ("f32", "q8_0", "q4_0", "q4_1")
    kv_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    decodes: tuple[Load, ...] = _loads((1, 128, 1), (1, 2048, 1), (8, 128, 1), (8, 512, 1), (16, 2048, 1))
    prefills: tuple[Load, ...] = _loads((1, 256, 256), (1, 1024, 256), (1, 4096, 256))
    steps: tuple[Load, ...] = _loads(
        *((1, 128, 1), (1, 1024, 1), (4, 128, 1), (8, 128, 1), (8, 512, 1), (16, 512, 1)),
        *((1, 256, 256), (1, 512, 512)),
    )
    each_matrix: bool = False

    @property
    def attentions(self) -> tuple[Load, ...]:
        """Loads of attention alone."""
        return self.decodes + self.prefills


QUICK: Final = Menu(
    rows=(1, 8, 64),
    head_rows=(1,),
    formats=("q8_0", "q4_1"),
    kv_dtypes=(torch.float16,),
    decodes=_loads((1, 128, 1), (8, 512, 1)),
    prefills=_loads((1, 1024, 256)),
    steps=_loads((1, 128, 1), (8, 512, 1), (1, 256, 256)),
)


def rotating(calls: Sequence[Call]) -> Call:
    """Return a call that makes the given ones in turns."""
    turns = cycle(calls)
    return lambda: next(turns)()


def num_rows_in(num_bytes: int, row_bytes: float) -> int:
    """Return how many rows make up so many bytes, at least one."""
    return int(min(max(num_bytes // row_bytes, 1), _MOST_ROWS))


class KvPool:
    """KV memory of a few layers, filled with noise, as large as its users need and larger than the caches.

    Blocks of a sequence lie anywhere in it, and layers of a block apart, as in a worker's cache.
    """

    def __init__(self, shape: Shape, loads: Sequence[Load], dtype: torch.dtype, device: str, cold_bytes: int) -> None:
        piece = (_POOL_LAYERS, 2, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        block_bytes = torch.Size(piece).numel() * dtype.itemsize
        needed = max((load.batch * _num_blocks(load) for load in loads), default=1)
        self.num_blocks = max(needed, -(-cold_bytes // block_bytes))
        self.kv = torch.randn(self.num_blocks, *piece, device=device, dtype=torch.float32).to(dtype)
        self._order = torch.randperm(self.num_blocks)

    def places(self, load: Load) -> list[tuple[Tensor, Tensor]]:
        """Give (one layer of the cache, block tables) pairs, each over other memory than those before it."""
        blocks_each = _num_blocks(load)
        sets = self._order[: self.num_blocks // (load.batch * blocks_each) * load.batch * blocks_each]
        tables = sets.view(-1, load.batch, blocks_each).int().to(self.kv.device)
        found = [(self.kv[:, layer], table) for table in tables for layer in range(_POOL_LAYERS)]
        return found[:_MOST_PLACES]

    def slots(self, num_rows: int) -> list[tuple[Tensor, Tensor]]:
        """Give (one layer of the cache, a slot for each of some rows in blocks anywhere) pairs."""
        found = []
        for start in range(0, self.num_blocks, max(1, self.num_blocks // 16)):
            blocks = self._order.roll(start).repeat(-(-num_rows // self.num_blocks))[:num_rows]
            slots = blocks * BLOCK_SIZE + torch.arange(num_rows) // self.num_blocks % BLOCK_SIZE
            found += [(self.kv[:, layer], slots.to(self.kv.device)) for layer in range(_POOL_LAYERS)]
        return found


class Pools:
    """KV memory by dtype, built when first asked for and shared by all cases."""

    def __init__(self, shape: Shape, menu: Menu, device: str, cold_bytes: int) -> None:
        self._shape, self._menu, self._device, self._cold_bytes = shape, menu, device, cold_bytes
        self._pools: dict[torch.dtype, KvPool] = {}
        self._caches: dict[torch.dtype, Tensor] = {}

    def pool(self, dtype: torch.dtype) -> KvPool:
        """Return the memory for attention alone."""
        if dtype not in self._pools:
            self._pools[dtype] = KvPool(self._shape, self._menu.attentions, dtype, self._device, self._cold_bytes)
        return self._pools[dtype]

    def cache(self, dtype: torch.dtype) -> Tensor:
        """Return a whole model's KV cache, noise in every layer, for the largest step."""
        if dtype not in self._caches:
            shape = self._shape
            num_blocks = max(load.batch * _num_blocks(load) for load in self._menu.steps)
            piece = torch.randn(num_blocks, 1, 2, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim, device=self._device)
            cache = torch.empty(num_blocks, shape.num_layers, *piece.shape[2:], dtype=dtype, device=self._device)
            self._caches[dtype] = cache.copy_(piece.expand_as(cache))
        return self._caches[dtype]


def query_start(load: Load, device: str) -> Tensor:
    """Return where each sequence's rows begin, `[batch + 1]` int32."""
    return torch.arange(0, load.num_rows + 1, load.queries, dtype=torch.int32, device=device)


def seq_lens(load: Load, device: str) -> Tensor:
    """Return each sequence's length, `[batch]` int32."""
    return torch.full((load.batch,), load.context, dtype=torch.int32, device=device)


def step_input(shape: Shape, load: Load, device: str) -> StepInput:
    """Build a batch of random tokens over blocks that lie anywhere; logits of each sequence's last row."""
    tables = torch.randperm(load.batch * _num_blocks(load)).view(load.batch, -1)
    places = torch.arange(load.context - load.queries, load.context).repeat(load.batch)
    owner = torch.arange(load.batch).repeat_interleave(load.queries)
    return StepInput(
        token_ids=torch.randint(0, shape.vocab, (load.num_rows,)).to(device),
        positions=places.to(device),
        slot_mapping=(tables[owner, places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE).to(device),
        query_start=query_start(load, device),
        seq_lens=seq_lens(load, device),
        block_tables=tables.int().contiguous().to(device),
        logits_indices=(torch.arange(1, load.batch + 1) * load.queries - 1).to(device),
    )


def rotary_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, `[NUM_POSITIONS, head_dim / 2]` float32."""
    frequencies = 1e-5 ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = torch.outer(torch.arange(NUM_POSITIONS).float(), frequencies)
    return angles.cos(), angles.sin()


def _num_blocks(load: Load) -> int:
    return -(-load.context // BLOCK_SIZE)
