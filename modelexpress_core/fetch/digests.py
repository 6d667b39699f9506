"""The digests that storages publish: which of them we compute, how, and in what order of preference.

Libraries in C do the work. CRCs come first: they are ten times as fast as the others, and can be computed over the
parts of a file in any order. They detect damage in transfer, and so does any digest from the same storage; none of them
proves who made the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Protocol

from attrs import frozen

__all__ = ["CRC", "CRCS", "Hasher", "best_digest", "new_hasher"]


@frozen
class CRC:
    """A cyclic redundancy check.

    Attributes:
        compute: The CRC of data appended to bytes whose CRC is ``before``: ``compute(data, before)``.
        combine: The CRC of two parts, from their CRCs and the length of the second: ``combine(first, second, length)``.
        digits: Length of its value in hex.
    """

    compute: Callable[[memoryview, int], int]
    combine: Callable[[int, int, int], int]
    digits: int


def _crc32() -> CRC:
    from awscrt import checksums

    return CRC(checksums.crc32, checksums.combine_crc32, 8)


def _crc32c() -> CRC:
    from awscrt import checksums

    return CRC(checksums.crc32c, checksums.combine_crc32c, 8)


def _crc64nvme() -> CRC:
    from awscrt import checksums

    return CRC(checksums.crc64nvme, checksums.combine_crc64nvme, 16)


#: Name -> makes the CRC; imports the library at first use.
CRCS: Mapping[str, Callable[[], CRC]] = {"crc64nvme": _crc64nvme, "crc32c": _crc32c, "crc32": _crc32}

#: Digests of bytes in order, as hashlib names them.
_HASHES = ("sha256", "md5", "sha1")


def best_digest(digests: Mapping[str, str]) -> tuple[str, str] | None:
    """Algorithm and value of the published digest that is compared; None if we can compute none of them."""
    for algorithm in (*CRCS, *_HASHES):
        if algorithm in digests:
            return algorithm, digests[algorithm].lower()
    return None


class Hasher(Protocol):
    """Digests bytes that come in order."""

    def update(self, data: memoryview, /) -> None:
        """The next bytes."""
        ...

    def hexdigest(self) -> str:
        """The digest of all bytes so far, in lower-case hex."""
        ...


class _CRCHasher:
    """A CRC with the interface of hashlib."""

    def __init__(self, crc: CRC) -> None:
        self._crc = crc
        self._value = 0

    def update(self, data: memoryview, /) -> None:
        self._value = self._crc.compute(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:0{self._crc.digits}x}"


def new_hasher(algorithm: str) -> Hasher:
    """A hasher for ``algorithm``, one that ``best_digest`` returns."""
    if algorithm in CRCS:
        return _CRCHasher(CRCS[algorithm]())
    return hashlib.new(algorithm, usedforsecurity=False)
