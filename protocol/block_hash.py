"""Names of full KV blocks: a chained, seeded SHA-256 over token ids.

Two blocks share a name only if model, tenant salt and every token up to their end are equal, so a prefix found by
name is a prefix in fact, and no tenant can guess another's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

BlockHash = bytes


def root_hash(model_hash: str, cache_salt: str = "") -> BlockHash:
    """Return the parent of every first block of one model and tenant."""
    digest = hashlib.sha256(b"baton kv root\0")
    digest.update(len(model_hash).to_bytes(4, "little") + model_hash.encode())
    digest.update(cache_salt.encode())
    return digest.digest()


def block_hashes(token_ids: Sequence[int], block_size: int, root: BlockHash) -> list[BlockHash]:
    """Name each full block of a prompt, in order; a partial last block has no name."""
    num_full = len(token_ids) // block_size
    data = np.asarray(token_ids[: num_full * block_size], dtype="<u4").tobytes()
    stride, parent, names = block_size * 4, root, []
    for start in range(0, len(data), stride):
        parent = hashlib.sha256(parent + data[start : start + stride]).digest()
        names.append(parent)
    return names


def next_block_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Name the full block holding `token_ids` whose predecessor is named `parent` (or the root)."""
    return hashlib.sha256(parent + np.asarray(token_ids, dtype="<u4").tobytes()).digest()
