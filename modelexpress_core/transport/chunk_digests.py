"""Digests of tensors: the CRC-64/NVME of each chunk of 4 MiB, taken where the tensor lies.

Tensors in host memory are digested by a library in C. Those on a device are digested there, by torch operations, so
that what is digested is the device's memory, and only digests leave it. Both give the same digests.

A CRC is linear. Let Z(n) be what n bytes of zeros make of the register. The register after two blocks is
Z(length of the second)(register after the first) XOR (register after the second, begun with zero). So blocks of one
word are combined in pairs, then pairs of them, and so on: each step halves the number of values, and applies one Z to
half of them. Z is a linear map of 64 bits; it is applied with eight tables of 256 values, one for each byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from modelexpress_core.transport.tensor_bytes import host_memory

__all__ = ["CHUNK_BYTES", "RunningDigest", "chunk_count", "chunk_digests"]

#: Bytes that one digest covers; the last chunk of a tensor may be shorter.
CHUNK_BYTES = 4 << 20

#: Chunks that are digested at once on a device: each takes several times its size while it is.
_BATCH_CHUNKS = 4

#: CRC-64/NVME, https://reveng.sourceforge.io/crc-catalogue/17plus.htm#crc.cat.crc-64-nvme: the polynomial with its bits
#: reversed, and what the register begins with and is changed by at the end.
_POLYNOMIAL = 0x9A6C9329AC4BC9B5
_ALL_ONES = (1 << 64) - 1

_WORD_BYTES = 8


def chunk_count(nbytes: int) -> int:
    """How many chunks ``nbytes`` bytes have."""
    return -(-nbytes // CHUNK_BYTES)


def chunk_digests(content: torch.Tensor) -> list[int]:
    """The digest of each chunk, as numbers from 0 to 2^64 - 1.

    Args:
        content: The bytes, on any device: one dimension of uint8, without gaps.
    """
    if content.device.type == "cpu":
        return [_by_library(content[start : start + CHUNK_BYTES]) for start in range(0, len(content), CHUNK_BYTES)]
    return list(_on_device(content))


class RunningDigest:
    """The digest of one chunk in host memory, taken while its bytes arrive. For one thread at a time.

    Args:
        content: The memory: one dimension of uint8, of at most ``CHUNK_BYTES``.

    Attributes:
        nbytes: How many bytes are digested.
        digest: Their digest.
    """

    def __init__(self, content: torch.Tensor) -> None:
        from awscrt import checksums

        self._memory = host_memory(content)
        self._crc = checksums.crc64nvme
        self.nbytes = 0
        self.digest = 0

    def landed(self, nbytes: int) -> None:
        """Digest the bytes up to ``nbytes``, which have arrived."""
        if nbytes > self.nbytes:
            self.digest = self._crc(self._memory[self.nbytes : nbytes], self.digest)
            self.nbytes = nbytes


def _by_library(content: torch.Tensor) -> int:
    from awscrt import checksums

    digest: int = checksums.crc64nvme(host_memory(content), 0)
    return digest


def _on_device(content: torch.Tensor) -> Iterator[int]:
    whole = len(content) // CHUNK_BYTES * CHUNK_BYTES
    step = _BATCH_CHUNKS * CHUNK_BYTES
    with torch.no_grad():
        for start in range(0, whole, step):
            rows = content[start : min(start + step, whole)].view(-1, CHUNK_BYTES)
            yield from _digests_of_rows(rows)
        if whole < len(content):
            rest = content[whole:].view(1, -1)
            if rest.shape[1] < _WORD_BYTES:  # the register's first value reaches beyond it
                yield _by_library(rest[0].cpu())
            else:
                yield from _digests_of_rows(rest)


def _digests_of_rows(rows: torch.Tensor) -> list[int]:
    """The CRC of each row of bytes; a row has at least a word."""
    length = rows.shape[1]
    words = 1 << max(0, (-(-length // _WORD_BYTES) - 1).bit_length())
    # Zeros in front change nothing as long as the register is zero, so its first value is put into the data.
    padded = torch.zeros((len(rows), words * _WORD_BYTES), dtype=torch.uint8, device=rows.device)
    begin = padded.shape[1] - length
    padded[:, begin:] = rows
    padded[:, begin : begin + _WORD_BYTES] ^= 0xFF
    values = padded.view(torch.int64)
    block = _WORD_BYTES
    while values.shape[1] > 1:
        values = _after_zeros(values[:, 0::2], block) ^ values[:, 1::2]
        block *= 2
    ended = _after_zeros(values, _WORD_BYTES)[:, 0]
    return [(value ^ _ALL_ONES) & _ALL_ONES for value in ended.tolist()]


def _after_zeros(registers: torch.Tensor, nbytes: int) -> torch.Tensor:
    """What each register becomes after ``nbytes`` bytes of zeros."""
    tables = _tables(nbytes, registers.device)
    result = tables[0][registers & 0xFF]
    for number in range(1, _WORD_BYTES):
        result ^= tables[number][(registers >> 8 * number) & 0xFF]
    return result


@cache
def _tables(nbytes: int, device: torch.device) -> torch.Tensor:
    """For each byte of the register and each of its values, the register after ``nbytes`` bytes of zeros."""
    columns = _map_of_zeros(nbytes)
    table = [[_signed(_applied(columns, value << 8 * number)) for value in range(256)] for number in range(_WORD_BYTES)]
    return torch.tensor(table, dtype=torch.int64, device=device)


@cache
def _map_of_zeros(nbytes: int) -> tuple[int, ...]:
    """The linear map of ``nbytes`` bytes of zeros, a power of two: what each single bit becomes."""
    if nbytes == 1:
        columns = []
        for bit in range(64):
            register = 1 << bit
            for _ in range(8):
                register = register >> 1 ^ (_POLYNOMIAL if register & 1 else 0)
            columns.append(register)
        return tuple(columns)
    half = _map_of_zeros(nbytes // 2)
    return tuple(_applied(half, column) for column in half)


def _applied(columns: tuple[int, ...], register: int) -> int:
    result = 0
    while register:
        lowest = register & -register
        result ^= columns[lowest.bit_length() - 1]
        register ^= lowest
    return result


def _signed(value: int) -> int:
    """The number with the same 64 bits in torch's int64, which has a sign."""
    return value - (1 << 64) if value >> 63 else value
