"""Counter-based random numbers: the same (seed, index) gives the same number on any worker, in any batch.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the generator that GPU kernels
carry too, with the request's seed as key and the token's index as counter. `kernels.sampling.random_bits` is the same
for tensors.
"""

from __future__ import annotations

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox_4x32(seed: int, index: int) -> tuple[int, int, int, int]:
    """Return the four 32-bit words of block `index` under the 64-bit key `seed`."""
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = index & _MASK, (index >> 32) & _MASK, 0, 0
    for _ in range(10):
        product0, product1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ key0,
            product1 & _MASK,
            (product0 >> 32) ^ c3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = (key0 + _W0) & _MASK, (key1 + _W1) & _MASK
    return c0, c1, c2, c3


def random_bits(seed: int, index: int) -> int:
    """Return 64 random bits as a number in [0, 2**64)."""
    high, low, _, _ = philox_4x32(seed, index)
    return (high << 32) | low
