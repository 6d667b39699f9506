"""The chunk manifest of one version of a model: digests of each chunk of each file (docs/manifest.md, format 1).

It has an index, in JSON, and two tables of digests: a CRC-64/NVME of each chunk, which finds damage, and a BLAKE3,
which finds changes on purpose too. The tables are objects of their own, so that a reader fetches only the rows of the
chunks that it reads. The index has the digest of each table, and its own digest stands for all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import attrs
from attrs import field, frozen

from modelexpress_core.checkpoint.chunks import FileChunks
from modelexpress_core.checkpoint.strict_json import shown
from modelexpress_core.errors import CheckpointError
from modelexpress_core.immutable import unmodifiable
from modelexpress_core.messages import printable

__all__ = ["FORMAT", "TABLES", "ChunkDigests", "Manifest", "ManifestFile"]

#: The number of the format: it changes when chunks are cut in another way, or tables have other rows.
FORMAT = 1

#: The tables, and the bytes of a row of each.
TABLES: Mapping[str, int] = {"blake3": 32, "crc64nvme": 8}

_MAX_INDEX_BYTES = 64 << 20
_MAX_FILES = 200_000
_MAX_INT64 = (1 << 63) - 1

#: What a digest is called in messages.
_HEX_DIGITS = frozenset("0123456789abcdef")


@frozen
class ManifestFile:
    """One file of a model.

    Attributes:
        path: Path below the model.
        size: Length in bytes.
        version: Version in the storage that it came from; empty if that has none.
        digests: Digests that the storage publishes, by algorithm, in hex.
        header_bytes: Bytes before those of the tensors; 0 for a file that is no safetensors file.
        first: Row of its first chunk in each table.
        chunks: How many chunks it has.
    """

    path: str
    size: int
    version: str = ""
    digests: Mapping[str, str] = field(factory=dict, converter=unmodifiable, hash=False)
    header_bytes: int = 0
    first: int = 0
    chunks: int = 0


class ChunkDigests:
    """The digests of the chunks of one file, as its bytes come. Thread-safe for different chunks.

    Args:
        chunks: The chunks.

    Attributes:
        chunks: The chunks.
    """

    def __init__(self, chunks: FileChunks) -> None:
        self.chunks = chunks
        self._rows = {name: bytearray(chunks.count * width) for name, width in TABLES.items()}
        self._known = bytearray(chunks.count)

    def add(self, offset: int, content: memoryview) -> None:
        """Take the digest of each chunk that lies within ``content``.

        Args:
            offset: Position of its first byte in the file.
            content: Bytes of the file.
        """
        for number in self.chunks.within(offset, offset + len(content)):
            start, end = self.chunks.bounds(number)
            chunk = content[start - offset : end - offset]
            for name, width in TABLES.items():
                self._rows[name][number * width : (number + 1) * width] = chunk_digest(name, chunk)
            self._known[number] = 1

    def missing(self) -> Iterator[tuple[int, int]]:
        """First byte and end of each chunk without digests."""
        at = self._known.find(0)
        while at >= 0:
            yield self.chunks.bounds(at)
            at = self._known.find(0, at + 1)

    def rows(self, table: str) -> bytes:
        """The rows of the file in a table.

        Raises:
            ValueError: The digest of a chunk is missing.
        """
        if 0 in self._known:
            message = f"{self._known.count(0)} of {len(self._known)} chunks have no digest yet"
            raise ValueError(message)
        return bytes(self._rows[table])


def chunk_digest(table: str, chunk: bytes | memoryview) -> bytes:
    """The row of a chunk in a table."""
    if table == "blake3":
        from blake3 import blake3

        return blake3(chunk).digest()
    from awscrt import checksums

    return int(checksums.crc64nvme(chunk, 0)).to_bytes(TABLES["crc64nvme"], "big")


@frozen
class Manifest:
    """The index of a manifest.

    Attributes:
        files: In the order of their paths.
        tables: SHA-256 of each table, in hex, by its name.
        text: The canonical bytes of the index.
    """

    files: Sequence[ManifestFile]
    tables: Mapping[str, str] = field(converter=unmodifiable, hash=False)
    text: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        """The digest of the index, and with it of all tables: SHA-256, in hex."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def rows(self) -> int:
        """How many rows each table has."""
        return sum(file.chunks for file in self.files)

    @classmethod
    def of_files(cls, files: Iterable[tuple[ManifestFile, ChunkDigests]]) -> tuple[Manifest, Mapping[str, bytes]]:
        """A manifest and its tables.

        Args:
            files: Files and their digests; ``first`` and ``chunks`` of the files are set here.

        Raises:
            ValueError: Two files have one path, or a digest is missing.
        """
        placed: list[ManifestFile] = []
        parts: dict[str, list[bytes]] = {name: [] for name in TABLES}
        first = 0
        for file, digests in sorted(files, key=lambda each: each[0].path.encode()):
            if placed and placed[-1].path == file.path:
                message = f"two files have the path {file.path}"
                raise ValueError(message)
            count = digests.chunks.count
            placed.append(attrs.evolve(file, first=first, chunks=count))
            first += count
            for name, rows in parts.items():
                rows.append(digests.rows(name))
        tables = {name: b"".join(rows) for name, rows in parts.items()}
        digests_of_tables = {name: hashlib.sha256(table).hexdigest() for name, table in tables.items()}
        return cls(tuple(placed), digests_of_tables, _index(placed, digests_of_tables)), tables

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """The manifest whose index ``text`` is.

        Raises:
            CheckpointError: It is no index of this format, or not in its canonical form.
        """
        try:
            return _parsed(text)
        except _Fault as exc:
            message = f"the chunk manifest cannot be used: {exc}"
            raise CheckpointError(
                message, cause="another program made it, or it was damaged", hint="have the server make it again"
            ) from exc


def _index(files: Iterable[ManifestFile], tables: Mapping[str, str]) -> bytes:
    listed = [
        {
            "chunks": file.chunks,
            "digests": dict(file.digests),
            "first": file.first,
            "header_bytes": file.header_bytes,
            "path": file.path,
            "size": file.size,
            "version": file.version,
        }
        for file in files
    ]
    index = {"files": listed, "format": FORMAT, "tables": {name: {"sha256": tables[name]} for name in TABLES}}
    return json.dumps(index, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


class _Fault(Exception):  # noqa: N818 - never leaves this module
    """What is wrong with an index."""


def _parsed(text: bytes) -> Manifest:
    if len(text) > _MAX_INDEX_BYTES:
        reason = f"it has {len(text)} bytes"
        raise _Fault(reason)
    try:
        index: Any = json.loads(text.decode())
    except (ValueError, RecursionError) as exc:
        reason = "it is no JSON"
        raise _Fault(reason) from exc
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        reason = f"it has another format than {FORMAT}"
        raise _Fault(reason)
    listed = index.get("files")
    if not isinstance(listed, list) or len(listed) > _MAX_FILES:
        reason = "it has no list of files, or too many files"
        raise _Fault(reason)
    tables = {name: _digest_of(index.get("tables"), name) for name in TABLES}
    files: list[ManifestFile] = []
    first = 0
    for entry in listed:
        file = _file_of(entry)
        if file.first != first:
            reason = f"the rows of {printable(file.path)} do not follow those before it"
            raise _Fault(reason)
        first += file.chunks
        files.append(file)
    if text != _index(files, tables):  # also the order, other members, repeated keys, other spellings
        reason = "it is not in its canonical form"
        raise _Fault(reason)
    if any(one.path.encode() >= other.path.encode() for one, other in pairwise(files)):
        reason = "its files are not in the order of their paths"
        raise _Fault(reason)
    return Manifest(tuple(files), tables, text)


def _digest_of(tables: Any, name: str) -> str:  # noqa: ANN401 - JSON
    entry = tables.get(name) if isinstance(tables, dict) else None
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= _HEX_DIGITS:
        reason = f"it has no digest of the table {name}"
        raise _Fault(reason)
    return digest


def _file_of(entry: Any) -> ManifestFile:  # noqa: ANN401 - JSON
    numbers, texts = ("size", "header_bytes", "first", "chunks"), ("path", "version")
    right = (
        isinstance(entry, dict)
        and all(type(entry.get(name)) is int and 0 <= entry[name] <= _MAX_INT64 for name in numbers)
        and all(isinstance(entry.get(name), str) for name in texts)
        and isinstance(entry.get("digests"), dict)
        and all(isinstance(value, str) for value in entry["digests"].values())
    )
    if not right:
        reason = f"it has the file {shown(entry)}"
        raise _Fault(reason)
    file = ManifestFile(**{name: entry[name] for name in (*numbers, *texts, "digests")})
    parts = file.path.split("/")
    if not file.path or any(part in {"", ".", ".."} for part in parts) or "\0" in file.path or "\\" in file.path:
        reason = f"it has the path {shown(file.path)}"
        raise _Fault(reason)
    # Each chunk has a byte, so that rows cannot outnumber them.
    if file.header_bytes > file.size or file.chunks > file.size or (file.size and not file.chunks):
        reason = f"it has {file.chunks} chunks of the {file.size} bytes of {printable(file.path)}"
        raise _Fault(reason)
    return file
