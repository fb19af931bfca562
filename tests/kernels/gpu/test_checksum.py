"""The checksum of numpy against its definition, and the one in Triton against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.checksum import checksum, splitmix

pytest.importorskip("triton")

from kernels.gpu import checksum as on_device  # noqa: E402


def _octets(num: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, num, dtype=np.uint8)


def _defined(data: bytes) -> int:
    padded, total = data + bytes(-len(data) % 8), splitmix(len(data))
    for i in range(len(padded) // 8):
        word = int.from_bytes(padded[i * 8 : i * 8 + 8], "little")
        total += word * (splitmix(2 * i) | 1) + (word >> 32) * (splitmix(2 * i + 1) | 1)
    return splitmix(total % (1 << 64))


def test_splitmix_gives_the_published_numbers() -> None:
    # The first outputs of splitmix64 seeded with 0.
    assert [splitmix(i) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 9, 63, 4096, 20_001])
def test_both_give_what_the_definition_says(num_bytes: int, device: torch.device) -> None:
    data = _octets(num_bytes, num_bytes)
    expected = _defined(data.tobytes())
    assert checksum(data) == checksum(data.tobytes()) == checksum(memoryview(bytearray(data))) == expected
    result = on_device.checksum(torch.from_numpy(data).to(device))
    assert result.shape == (1,) and int(result) % (1 << 64) == expected


def test_many_tiles_and_parts_give_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _octets(300_003, 1)
    expected = checksum(data)
    assert int(on_device.checksum(torch.from_numpy(data).to(device))) % (1 << 64) == expected
    monkeypatch.setattr("kernels.checksum._NUM_AT_ONCE", 1000)
    monkeypatch.setattr("kernels.checksum._NUM_KEPT", 20_000)
    assert checksum(data) == expected
    monkeypatch.setattr(on_device, "TILE_WORDS", 1024)
    monkeypatch.setattr(on_device, "SUMS_AT_ONCE", 16)
    assert int(on_device.checksum(torch.from_numpy(data).to(device))) % (1 << 64) == expected


def test_any_dtype_is_read_as_bytes(device: torch.device) -> None:
    values = torch.randn(33, 8).to(torch.bfloat16)
    expected = checksum(values.view(torch.uint8).numpy().reshape(-1))
    assert int(on_device.checksum(values.to(device))) % (1 << 64) == expected
    with pytest.raises(ValueError, match="contiguous"):
        on_device.checksum(values.to(device)[:, ::2])
    with pytest.raises(ValueError, match="divisible"):
        on_device.checksum(values.to(device).view(-1)[1:])


def test_every_flipped_bit_shows() -> None:
    data = _octets(101, 2)
    seen = {checksum(data)}
    for bit in range(101 * 8):
        data[bit // 8] ^= 1 << (bit % 8)
        seen.add(checksum(data))
        data[bit // 8] ^= 1 << (bit % 8)
    assert len(seen) == 101 * 8 + 1


def test_two_flipped_bits_show() -> None:
    data, seen = np.zeros(32, np.uint8), set()
    for first in range(32 * 8):
        for second in range(first):
            data[first // 8] ^= 1 << (first % 8)
            data[second // 8] ^= 1 << (second % 8)
            seen.add(checksum(data))
            data[:] = 0
    assert len(seen) == 256 * 255 // 2


def test_flipped_signs_of_many_numbers_show() -> None:
    """Patterns that sums of products forget most easily: the uppermost bits of words, in many words at once."""
    words, seen = np.zeros(64, np.uint64), set()
    for flip in (1 << 63, 1 << 31, 1 << 63 | 1 << 31, 0x8000800080008000):
        for chosen in np.random.default_rng(4).random((500, 64)) < 0.5:
            seen.add(checksum((words ^ (chosen * np.uint64(flip))).view(np.uint8)))
    assert len(seen) == 4 * 500


def test_swapped_words_and_other_lengths_show() -> None:
    words = _octets(8 * 200, 3).view(np.uint64)
    seen = {checksum(words.view(np.uint8))}
    for other in range(1, 200):
        words[[0, other]] = words[[other, 0]]
        seen.add(checksum(words.view(np.uint8)))
        words[[0, other]] = words[[other, 0]]
    assert len(seen) == 200
    assert len({checksum(bytes(n)) for n in range(100)}) == 100
