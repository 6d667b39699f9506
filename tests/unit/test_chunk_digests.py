"""Digests of tensors: the same from the library and from torch's operations, and another for each flipped bit."""

from __future__ import annotations

import pytest
import torch
from awscrt import checksums

from modelexpress_core.transport import chunk_digests as under_test
from modelexpress_core.transport.chunk_digests import CHUNK_BYTES, RunningDigest, chunk_count, chunk_digests


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, so that the torch operations, which are slow on a CPU, have several to digest."""
    monkeypatch.setattr(under_test, "CHUNK_BYTES", 64 << 10)


def content_of(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def on_a_device(content: torch.Tensor) -> list[int]:
    return list(under_test._on_device(content))


@pytest.mark.parametrize(
    "nbytes", [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 4095, 65_535, 65_536, 65_537, 5 * 65_536, 5 * 65_536 + 3]
)
@pytest.mark.usefixtures("as_on_a_device")
def test_both_ways_give_the_same(nbytes: int) -> None:
    """For any length: the CRC of each chunk."""
    content = content_of(nbytes)
    chunks = [content[start : start + (64 << 10)] for start in range(0, nbytes, 64 << 10)]

    expected = [checksums.crc64nvme(bytes(chunk.tolist()), 0) for chunk in chunks]

    assert expected == chunk_digests(content)
    assert expected == on_a_device(content)


@pytest.mark.usefixtures("as_on_a_device")
def test_both_ways_give_the_same_of_memory_that_begins_anywhere() -> None:
    """A tensor need not begin at a multiple of eight bytes."""
    memory = content_of(70_000)
    for begin in range(9):
        assert chunk_digests(memory[begin:]) == on_a_device(memory[begin:])


def test_the_check_value_of_the_catalogue() -> None:
    """The CRC of the digits from 1 to 9, as the catalogue of CRCs gives it."""
    digits = torch.tensor(list(b"123456789"), dtype=torch.uint8)

    assert [0xAE8B14860A799888] == chunk_digests(digits) == on_a_device(digits)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("nbytes", [1, 8, 13, 1001])
def test_every_flipped_bit_changes_the_digest(nbytes: int) -> None:
    """Wherever it is, the ends included."""
    content = content_of(nbytes)
    expected = chunk_digests(content)
    for position in {0, 1, nbytes // 2, nbytes - 2, nbytes - 1} & set(range(nbytes)):
        for bit in range(8):
            flipped = content.clone()
            flipped[position] ^= 1 << bit
            assert expected != chunk_digests(flipped)
            assert expected != on_a_device(flipped)


def test_chunks_have_four_mebibytes() -> None:
    """The last may be shorter; nothing has none."""
    assert [0, 1, 1, 2] == [chunk_count(nbytes) for nbytes in (0, 1, CHUNK_BYTES, CHUNK_BYTES + 1)]
    assert 2 == len(chunk_digests(torch.zeros(CHUNK_BYTES + 1, dtype=torch.uint8)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_device_gives_the_same() -> None:
    """With whole chunks, several batches and a rest."""
    content = content_of(9 * CHUNK_BYTES + 12_345)

    assert chunk_digests(content) == chunk_digests(content.cuda())


@pytest.mark.parametrize("steps", [[0, 1, 1, 7, 1000], [1000], [3, 2, 1000]])
def test_a_running_digest_is_that_of_the_whole(steps: list[int]) -> None:
    """In whatever pieces the bytes arrive."""
    content = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    running = RunningDigest(content)

    for nbytes in steps:
        running.landed(nbytes)

    assert (1000, chunk_digests(content)) == (running.nbytes, [running.digest])
