"""A 64-bit checksum of a byte buffer that a CPU and a GPU both compute fast, and exactly alike.

The buffer is read as little-endian 64-bit words w(0), w(1), ..., the tail padded with zero bytes. With odd multipliers
a(i) = splitmix(2i) | 1 and b(i) = splitmix(2i + 1) | 1 and all arithmetic modulo 2**64,

    checksum = splitmix(splitmix(number of bytes) + sum of w(i) * a(i) + (w(i) >> 32) * b(i))

so that the lower half of a word is multiplied by a(i), the upper by the odd number 2**32 * a(i) + b(i). Every change
within one half is seen, a single flipped bit among them: the half changes by less than 2**32 in size, which 2**64
divides just as little after multiplication by an odd number; adding the same on both sides and splitmix, a bijection,
keep what differs apart. So does another length of the same words. Of changes in several halves, two words that change
places among them, at most the share 2**-32 goes unseen, as random multipliers of 32-bit numbers do in a sum of 64 bits
(of arbitrary changes 2**-64). Were whole words multiplied, two flips of bit 63 would cancel whatever the multipliers.

It finds accidents, not forgeries. Integer sums do not depend on their order, so a GPU may add in any.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): what the counter is
# multiplied by, and the multipliers and shifts that mix it.
GAMMA = 0x9E3779B97F4A7C15
MIX_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
MIX_SHIFTS = (30, 27, 31)

# Words whose multipliers are kept: a slot of 8 MiB.
_NUM_KEPT = 1 << 20
# What is worked on together stays in the processor's cache.
_NUM_AT_ONCE = 1 << 15
_MASK = (1 << 64) - 1

Words = NDArray[np.uint64]


def splitmix(number: int) -> int:
    """Return element `number` of the splitmix64 sequence of seed 0: a bijection of the 64-bit numbers."""
    z = (number + 1) * GAMMA & _MASK
    for shift, multiplier in zip(MIX_SHIFTS, MIX_MULTIPLIERS, strict=False):
        z = (z ^ (z >> shift)) * multiplier & _MASK
    return z ^ (z >> MIX_SHIFTS[2])


def checksum(data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> int:
    """Return the checksum of a contiguous buffer, in [0, 2**64)."""
    octets = np.frombuffer(data, np.uint8)
    num_words = octets.size // 8
    words = octets[: num_words * 8].view("<u8")
    total, room = 0, np.empty(min(num_words, _NUM_AT_ONCE), np.uint64)
    for start in range(0, num_words, _NUM_AT_ONCE):
        part = words[start : start + _NUM_AT_ONCE]
        upper = np.right_shift(part, np.uint64(32), out=room[: part.size])
        of_words, of_uppers = _multipliers(start, part.size, num_words)
        total += int(np.dot(part, of_words)) + int(np.dot(upper, of_uppers))
    if octets.size % 8:
        tail = int.from_bytes(octets[num_words * 8 :].tobytes(), "little")
        total += tail * (splitmix(2 * num_words) | 1) + (tail >> 32) * (splitmix(2 * num_words + 1) | 1)
    return splitmix((splitmix(octets.size) + total) & _MASK)


def _multipliers(start: int, num: int, num_words: int) -> tuple[Words, Words]:
    if num_words > _NUM_KEPT:
        return _sequence(2 * start, num), _sequence(2 * start + 1, num)
    of_words, of_uppers = _kept(1 << (num_words - 1).bit_length())
    return of_words[start : start + num], of_uppers[start : start + num]


@lru_cache(maxsize=4)
def _kept(num: int) -> tuple[Words, Words]:
    return _sequence(0, num), _sequence(1, num)


def _sequence(first: int, num: int) -> Words:
    """Return every second element of splitmix from `first` on, made odd."""
    z = np.arange(first + 1, first + 1 + 2 * num, 2, dtype=np.uint64) * np.uint64(GAMMA)
    for shift, multiplier in zip(MIX_SHIFTS, MIX_MULTIPLIERS, strict=False):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(multiplier)
    z ^= z >> np.uint64(MIX_SHIFTS[2])
    z |= np.uint64(1)
    return z
