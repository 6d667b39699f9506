"""Digests of the chunks of files on disk, for manifests and for validation."""

from __future__ import annotations

import os
from collections.abc import Iterator

from modelexpress_core.checkpoint.chunks import FileChunks
from modelexpress_core.checkpoint.header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    HeaderTensor,
    header_length,
    parse_header,
)
from modelexpress_core.checkpoint.manifest import ChunkDigests, ManifestFile
from modelexpress_core.errors import CheckpointError

__all__ = ["chunks_of", "digests_of", "pieces"]

#: Bytes that are read at once; more than any chunk has.
_PIECE_BYTES = 16 << 20


def chunks_of(descriptor: int, path: str, size: int) -> tuple[FileChunks, int]:
    """The chunks of an open file, and the length of its header; 0 for a file that is no readable safetensors file."""
    tensors: tuple[HeaderTensor, ...] = ()
    header_bytes = 0
    if path.endswith(".safetensors"):
        try:
            length = header_length(os.pread(descriptor, LENGTH_BYTES, 0), size)
            text = os.pread(descriptor, min(length, MAX_HEADER_BYTES), LENGTH_BYTES)
            header = parse_header(text, size - LENGTH_BYTES - length, file=path)
        except (CheckpointError, ValueError):  # whoever loads it gets the error; here it is a file like any other
            return FileChunks.of_file(size), 0
        tensors, header_bytes = tuple(header.tensors), LENGTH_BYTES + length
    return FileChunks.of_file(size, header_bytes, tensors), header_bytes


def pieces(descriptor: int, chunks: FileChunks) -> Iterator[tuple[int, memoryview]]:
    """The bytes of an open file in pieces of whole chunks: position and bytes. A piece is valid until the next one.

    Raises:
        OSError: It cannot be read, or is shorter than its chunks.
    """
    buffer = memoryview(bytearray(_PIECE_BYTES))
    start = end = 0

    def read() -> tuple[int, memoryview]:
        done = 0
        while done < end - start:
            count = os.preadv(descriptor, [buffer[done : end - start]], start + done)
            if not count:
                message = f"it ends after {start + done} bytes"
                raise OSError(0, message)
            done += count
        return start, buffer[:done]

    for _, stop in chunks:
        if stop - start > _PIECE_BYTES:
            yield read()
            start = end
        end = stop
    if end > start:
        yield read()


def digests_of(descriptor: int, path: str, size: int) -> tuple[ManifestFile, ChunkDigests]:
    """The digests of all chunks of an open file.

    Raises:
        OSError: It cannot be read, or is shorter than ``size``.
    """
    chunks, header_bytes = chunks_of(descriptor, path, size)
    digests = ChunkDigests(chunks)
    for offset, content in pieces(descriptor, chunks):
        digests.add(offset, content)
    return ManifestFile(path, size, header_bytes=header_bytes), digests
