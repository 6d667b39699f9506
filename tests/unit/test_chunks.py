"""Chunks of files, and the digests of them in a manifest."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelexpress_core.checkpoint.chunks import (
    LARGEST_CHUNK_BYTES,
    PLAIN_CHUNK_BYTES,
    SMALLEST_CHUNK_BYTES,
    FileChunks,
    block_bytes,
)
from modelexpress_core.checkpoint.header import HeaderTensor
from modelexpress_core.checkpoint.manifest import TABLES, ChunkDigests, Manifest, ManifestFile, chunk_digest
from modelexpress_core.errors import CheckpointError

VECTORS = json.loads((Path(__file__).parents[2] / "docs" / "manifest-vectors.json").read_text())

MIB = 1 << 20


# -- how a tensor is cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "bits", "expected"),
    [
        ((512, 512), 16, 512 << 10),  # small enough
        ((512, 514), 16, 257 << 10 << 1),  # one row would be too little, and half is less than 512 KiB
        ((4096, 4096), 16, 512 << 10),
        ((14336, 4096), 16, 14336 * 8192 >> 7),
        ((2048, 7168), 8, 2048 * 7168 >> 4),
        ((256, 2048, 7168), 8, 2048 * 7168 >> 4),  # experts are cut as one of them would be
        ((8, 64, 64), 32, 8 * 64 * 64 * 4),
        ((4096, 3, 14, 14), 16, 4096 * 3 * 14 * 14 * 2 >> 3),  # a few values for each index: cut along that
        ((151_643, 4096), 16, PLAIN_CHUNK_BYTES),  # a prime number of rows
        ((3, 5 * MIB), 8, PLAIN_CHUNK_BYTES),  # long rows
        ((8 * MIB,), 8, 512 << 10),
        ((8 * MIB + 1,), 8, PLAIN_CHUNK_BYTES),
        ((3 * MIB + 1,), 8, 3 * MIB + 1),
        ((), 64, 8),
        ((1, 8 * MIB), 8, PLAIN_CHUNK_BYTES),
        ((4096, 4096), 4, 512 << 10),
    ],
)
def test_tensors_are_cut_along_their_rows(shape: tuple[int, ...], bits: int, expected: int) -> None:
    """Into halves of halves, as long as these are not too small."""
    assert expected == block_bytes(shape, math.prod(shape) * bits // 8)


_SIZES = st.one_of(st.integers(1, 9), st.sampled_from([64, 96, 127, 1000, 1024, 4096, 7168, 151_643]))


@given(st.lists(_SIZES, max_size=4), st.sampled_from([4, 6, 8, 16, 32, 64]))
def test_every_shape_has_chunks(sizes: list[int], bits: int) -> None:
    """Of bounded size, and not too small; halves of the rows begin on borders of chunks."""
    nbytes = math.prod(sizes) * bits // 8
    if nbytes == 0 or math.prod(sizes) * bits % 8:
        return

    block = block_bytes(sizes, nbytes)

    assert 1 <= block <= max(LARGEST_CHUNK_BYTES, SMALLEST_CHUNK_BYTES)
    assert block >= min(nbytes, SMALLEST_CHUNK_BYTES)
    if len(sizes) == 2 and sizes[0] % 8 == 0 and block != PLAIN_CHUNK_BYTES and nbytes // 8 >= SMALLEST_CHUNK_BYTES:
        assert [] == [rank for rank in range(8) if rank * (nbytes // 8) % block]


# -- the chunks of a file ----------------------------------------------------------------------------------------------


@st.composite
def files(draw: st.DrawFn) -> tuple[int, int, list[HeaderTensor]]:
    """Length, bytes of the header, and tensors."""
    header_bytes = draw(st.integers(8, 3 * MIB))
    tensors, at = [], 0
    for number in range(draw(st.integers(0, 6))):
        shape = tuple(draw(st.lists(st.sampled_from([0, 1, 3, 5, 64, 1024, 1500]), min_size=0, max_size=3)))
        nbytes = math.prod(shape)
        if nbytes <= 4 * MIB:
            tensors.append(HeaderTensor(str(number), "U8", shape, at, at + nbytes))
            at += nbytes
    return header_bytes + at + draw(st.integers(0, 10)), header_bytes, tensors


@given(files(), st.data())
def test_chunks_cover_a_file(file: tuple[int, int, list[HeaderTensor]], data: st.DataObject) -> None:
    """Without a gap, in order, none across a border; and each is found by its number and by its bytes."""
    size, header_bytes, tensors = file
    chunks = FileChunks.of_file(size, header_bytes, tensors)

    found = list(chunks)
    assert [0, *[end for _, end in found]] == [*[start for start, _ in found], size]
    assert len(found) == chunks.count
    assert all(start < end for start, end in found)
    borders = {start for start, _ in found} | {size}
    ends = {header_bytes + at for each in tensors if each.end > each.begin for at in (each.begin, each.end)}
    assert ends <= borders
    assert found == [chunks.bounds(number) for number in range(chunks.count)]
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    touching = [number for number, (low, high) in enumerate(found) if low < end and high > start and start < end]
    assert touching == list(chunks.touching(start, end))
    assert [each for each in touching if found[each][0] >= start and found[each][1] <= end] == list(
        chunks.within(start, end)
    )
    for number in (-1, chunks.count):
        with pytest.raises(IndexError):
            chunks.bounds(number)


@given(files(), st.integers(0, 1000))
def test_digests_come_in_any_order(file: tuple[int, int, list[HeaderTensor]], seed: int) -> None:
    """Chunks that came in two parts are missing until they come whole."""
    size, header_bytes, tensors = file
    random = Random(seed)
    content = memoryview((bytes(range(251)) * (size // 251 + 1))[:size])
    digests = ChunkDigests(FileChunks.of_file(size, header_bytes, tensors))
    cuts = sorted({0, size, *(random.randrange(size + 1) for _ in range(4))})
    parts = list(pairwise(cuts))
    random.shuffle(parts)
    for start, end in parts:
        digests.add(start, content[start:end])
    cut = [each for each in digests.chunks if any(each[0] < at < each[1] for at in cuts)]

    assert cut == list(digests.missing())
    if cut:
        with pytest.raises(ValueError, match="have no digest yet"):
            digests.rows("crc64nvme")
    for start, end in cut:
        digests.add(start, content[start:end])
    for name in TABLES:
        assert b"".join(chunk_digest(name, content[start:end]) for start, end in digests.chunks) == digests.rows(name)


# -- the manifest ------------------------------------------------------------------------------------------------------


def content_of(length: int) -> bytes:
    """As docs/manifest.md has it for the vectors."""
    return bytes(at * 131 % 251 for at in range(length))


def made(vector: Any) -> tuple[Manifest, Any]:
    found = []
    for file in vector["files"]:
        tensors = [HeaderTensor("", "", tuple(shape), begin, end) for shape, begin, end in file["tensors"]]
        digests = ChunkDigests(FileChunks.of_file(file["size"], file["header_bytes"], tensors))
        digests.add(0, memoryview(content_of(file["size"])))
        entry = ManifestFile(file["path"], file["size"], file["version"], file["digests"], file["header_bytes"])
        found.append((entry, digests))
    return Manifest.of_files(found)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_vectors(vector: Any) -> None:
    """The bytes of an index and its tables, for other implementations too."""
    manifest, tables = made(vector)

    assert vector["index"] == manifest.text.decode()
    assert vector["digest"] == manifest.digest
    assert vector["crc64nvme"] == tables["crc64nvme"].hex()
    assert len(tables["blake3"]) == 32 * manifest.rows
    assert manifest == Manifest.parse(manifest.text)


_INDEX = VECTORS[-1]["index"]


def _changed(**changes: Any) -> bytes:
    """The last vector's index with other members of its first file."""
    index = json.loads(_INDEX)
    index["files"][0].update(changes)
    return json.dumps(index, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        _INDEX.encode() + b" ",
        _INDEX.replace('"format":1', '"format":2').encode(),
        _INDEX.replace('"format":1', '"format":1,"more":2').encode(),
        _INDEX.replace('"blake3":{"sha256":"', '"blake3":{"sha256":"G').encode(),
        _changed(path="../x"),
        _changed(path="/x"),
        _changed(path="a//b"),
        _changed(path="a\\b"),
        _changed(path="~~~"),
        _changed(size=-1),
        _changed(size=True),
        _changed(size=1 << 63),
        _changed(size=1.0),
        _changed(chunks=10**9),
        _changed(first=1),
        _changed(digests=[]),
        _changed(digests={"sha256": 1}),
        _changed(header_bytes=10**9),
        json.dumps(json.loads(_INDEX)).encode(),
    ],
)
def test_other_texts_are_no_manifest(text: bytes) -> None:
    """One error for all."""
    with pytest.raises(CheckpointError, match="chunk manifest cannot be used"):
        Manifest.parse(text)


def test_two_files_of_one_path_are_refused() -> None:
    """A reader could not tell them apart."""
    file, digests = ManifestFile("a", 0), ChunkDigests(FileChunks.of_file(0))
    with pytest.raises(ValueError, match="two files"):
        Manifest.of_files([(file, digests), (attrs.evolve(file, version="2"), digests)])
