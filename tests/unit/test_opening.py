"""From a URI to a checkpoint: which files are used, what is read of them, and the messages if they do not fit."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import attrs
import pytest

from modelexpress_core import open_checkpoint
from modelexpress_core.checkpoint import Checkpoint, CheckpointFile, open_files
from modelexpress_core.checkpoint.index import MAX_INDEX_BYTES
from modelexpress_core.contracts.storage import ObjectInfo, Storage
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    CheckpointError,
    NotFoundError,
    SourceChangedError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.fetch import RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.storage.file import FileStorage
from modelexpress_core.storage.memory import MemoryStorage, store
from modelexpress_core.uri import ModelURI
from tests.support.checkpoints import (
    INDEX,
    Stored,
    framed,
    index_text,
    memory_storage,
    safetensors_file,
    shard_name,
    sharded,
    tensor,
    write_files,
)

#: What is read of a file at first; a header that fits takes one request.
FIRST_READ = 128 << 10

DIRECTORY = ModelURI("memory", "tests", "model")
SINGLE = "model.safetensors"
FIRST, SECOND, THIRD = (shard_name(n, 3) for n in (1, 2, 3))

#: Tensors by shard; the order of names is not that of shards.
SHARDS: Mapping[str, Mapping[str, Stored]] = {
    FIRST: {"z": tensor("F32", [2, 3], 1), "b": tensor("BF16", [4], 2)},
    SECOND: {"a": tensor("F4", [2, 2], 3), "empty": tensor("F32", [0], 4)},
    THIRD: {"c": tensor("I64", [], 5)},
}
WHOLE = sharded(SHARDS)
NO_INDEX = sharded(SHARDS, index=None)


class Wrapped:
    """A storage that passes everything on; what differs is written in subclasses."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        return self.inner.list(prefix)

    def stat(self, path: str) -> ObjectInfo:
        return self.inner.stat(path)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        return self.inner.read_into(path, offset, buffer, version=version)

    def close(self) -> None:
        self.inner.close()


class Watched(Wrapped):
    """Keeps what it was asked."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.lock = threading.Lock()
        self.reads: list[tuple[str, int, int]] = []
        self.versions: dict[str, str | None] = {}
        self.stats: list[str] = []
        self.lists: list[str] = []

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        self.lists.append(prefix)
        return super().list(prefix)

    def stat(self, path: str) -> ObjectInfo:
        self.stats.append(path)
        return super().stat(path)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        with self.lock:
            self.reads.append((path, offset, len(buffer)))
            self.versions[path] = version
        return super().read_into(path, offset, buffer, version=version)


class ListingDenied(Wrapped):
    """Objects may be read, but not listed; what is absent is answered as S3 does without the right to list."""

    def __init__(self, inner: Storage, *, refusal: type[BackendError] = AccessDeniedError, hides: bool = False) -> None:
        super().__init__(inner)
        self.refusal = refusal
        self.hides = hides

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        raise self.refusal("not allowed", uri=f"memory://tests/{prefix}", operation="list the files")

    def stat(self, path: str) -> ObjectInfo:
        try:
            return super().stat(path)
        except NotFoundError as exc:
            if not self.hides:
                raise
            raise AccessDeniedError("forbidden", uri=f"memory://tests/{path}", operation="read the size") from exc


class WithoutVersions(Wrapped):
    """Knows nothing that pins an object."""

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        return [attrs.evolve(info, version=None) for info in super().list(prefix)]

    def stat(self, path: str) -> ObjectInfo:
        return attrs.evolve(super().stat(path), version=None)


class ChangedAfterListing(Wrapped):
    """Something happens between the listing and the first read."""

    def __init__(self, inner: Storage, change: Callable[[], object]) -> None:
        super().__init__(inner)
        self.change = change

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        found = list(super().list(prefix))
        self.change()
        return found


class ChangedAfterFirstRead(Wrapped):
    """Something happens between the first read and the next."""

    def __init__(self, inner: Storage, change: Callable[[], object]) -> None:
        super().__init__(inner)
        self.change: Callable[[], object] | None = change

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        count = super().read_into(path, offset, buffer, version=version)
        if self.change is not None:
            self.change()
            self.change = None
        return count


class InPieces(Wrapped):
    """Never gives more than a few bytes at a time."""

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        return super().read_into(path, offset, buffer[:7], version=version)


def retrying(storage: Storage) -> RetryingStorage:
    return RetryingStorage(storage, RetryPolicy(), RetryBudget(0.0))


def opened(files: Mapping[str, bytes], name: str = "") -> Checkpoint:
    """The checkpoint of ``files`` in memory, by the URI of their directory or of one of them."""
    return open_files(memory_storage(files), DIRECTORY.join(name) if name else DIRECTORY)


def refused(files: Mapping[str, bytes], name: str = "") -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        opened(files, name)
    assert str(caught.value).startswith(f"could not open {caught.value.uri}: ")
    assert "memory://tests/model" in caught.value.uri
    assert caught.value.file in str(caught.value)
    assert caught.value.hint
    return caught.value


def content(checkpoint: Checkpoint, files: Mapping[str, bytes]) -> dict[str, Stored]:
    """The tensors of a checkpoint with their bytes."""
    return {
        name: (info.dtype, info.shape, files[info.file.name][info.offset : info.offset + info.length])
        for name, info in checkpoint.tensors.items()
    }


def tensors_of(*shards: str) -> dict[str, Stored]:
    return {name: stored for shard in shards for name, stored in SHARDS[shard].items()}


def padded(header_bytes: int) -> bytes:
    """A file whose header, the length included, has ``header_bytes`` bytes."""
    stored = tensor("U8", [5])
    text = json.dumps({"a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}}).encode()
    return framed(text.ljust(header_bytes - 8), stored[2])


# -- which files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (WHOLE, ""),
        (WHOLE, INDEX),
        (NO_INDEX, ""),
        (sharded(SHARDS, index="other.safetensors.index.json"), ""),
        (sharded(SHARDS, index="other.safetensors.index.json"), "other.safetensors.index.json"),
        (WHOLE | {"README.md": b"", "config.json": b"{}", "tokenizer/vocab.txt": b""}, ""),
        (WHOLE | {"onnx/model.safetensors": b"rubbish", "original/consolidated.safetensors": b""}, ""),
        (NO_INDEX | {"onnx/model.safetensors": b"rubbish"}, ""),
    ],
    ids=[
        "index",
        "URI of the index",
        "no index",
        "index of another name",
        "URI of an index of another name",
        "other files",
        "other directories",
        "other directories and no index",
    ],
)
def test_sharded_checkpoint(files: Mapping[str, bytes], name: str) -> None:
    """All shards are taken, and nothing else: in order of file names, and of bytes in each file."""
    checkpoint = opened(files, name)

    assert [FIRST, SECOND, THIRD] == [file.name for file in checkpoint.files]
    assert ["z", "b", "a", "empty", "c"] == list(checkpoint.tensors)
    assert tensors_of(FIRST, SECOND, THIRD) == content(checkpoint, files)
    assert sum(len(data) for _, _, data in tensors_of(FIRST, SECOND, THIRD).values()) == checkpoint.tensor_bytes


@pytest.mark.parametrize("name", ["", SINGLE])
def test_single_file(name: str) -> None:
    """A directory with one file, and that file itself, are the same checkpoint."""
    files = {SINGLE: safetensors_file(SHARDS[FIRST], metadata={"format": "pt"})}

    checkpoint = opened(files, name)

    assert tensors_of(FIRST) == content(checkpoint, files)
    assert [(SINGLE, f"model/{SINGLE}", len(files[SINGLE]))] == [(f.name, f.path, f.size) for f in checkpoint.files]
    assert {"format": "pt"} == checkpoint.files[0].metadata


def test_uri_of_one_shard() -> None:
    """The URI of a shard means that file alone, even next to others."""
    checkpoint = opened(WHOLE, SECOND)

    assert tensors_of(SECOND) == content(checkpoint, WHOLE)


def test_uri_of_a_file_lists_nothing() -> None:
    """One file is opened without the right to list, and without a listing."""
    storage = Watched(ListingDenied(memory_storage(WHOLE)))

    open_files(storage, DIRECTORY.join(FIRST))

    assert ([], [f"model/{FIRST}"], 1) == (storage.lists, storage.stats, len(storage.reads))


def test_file_without_tensors() -> None:
    """A valid file with nothing in it is a checkpoint with nothing in it."""
    checkpoint = opened({SINGLE: safetensors_file({})})

    assert {} == checkpoint.tensors
    assert 0 == checkpoint.tensor_bytes


def test_files_beside_an_index_are_ignored() -> None:
    """The same weights in another layout, beside the shards of the index, are not read."""
    files = WHOLE | {"consolidated.safetensors": b"not even a header", "extra.safetensors": b""}

    assert [FIRST, SECOND, THIRD] == [file.name for file in opened(files).files]


def test_extra_tensors_in_listed_shards_are_included() -> None:
    """Tensors of listed shards that the index does not name are there all the same."""
    weight_map = {"z": FIRST, "a": SECOND, "c": THIRD}
    files = sharded(SHARDS, weight_map=weight_map)

    assert tensors_of(FIRST, SECOND, THIRD) == content(opened(files), files)


def test_index_of_fewer_shards() -> None:
    """The index decides which shards belong, even where names of files promise more."""
    files = sharded(SHARDS, weight_map={"z": FIRST})

    assert tensors_of(FIRST) == content(opened(files), files)


def test_index_with_a_directory() -> None:
    """An index may name files in directories below its own."""
    files = sharded({"part one/a%2e.safetensors": SHARDS[FIRST], "é/b.safetensors": SHARDS[SECOND]})

    assert tensors_of(FIRST, SECOND) == content(opened(files), files)


def test_preferred_index() -> None:
    """Of several indexes, the one with the usual name is taken."""
    files = WHOLE | {"model.fp16.safetensors.index.json": index_text({"x": "gone.safetensors"})}

    assert tensors_of(FIRST, SECOND, THIRD) == content(opened(files), files)


def test_two_indexes() -> None:
    """Of two indexes with unusual names neither is guessed: both are named, and either can be asked for."""
    one, two = "a.safetensors.index.json", "b.safetensors.index.json"
    files = WHOLE | {one: index_text({"z": FIRST}), two: index_text({"c": THIRD})}
    del files[INDEX]

    error = refused(files)

    assert f"{one}, {two}" in str(error)
    assert tensors_of(FIRST) == content(opened(files, one), files)
    assert tensors_of(THIRD) == content(opened(files, two), files)


def test_index_in_a_directory_below_is_not_taken() -> None:
    """An index in a subdirectory says nothing of this directory."""
    files = {SINGLE: safetensors_file(SHARDS[FIRST]), f"sub/{INDEX}": b"rubbish"}

    assert tensors_of(FIRST) == content(opened(files), files)


def test_at_the_root_of_a_storage() -> None:
    """A checkpoint may be directly below the authority."""
    storage = memory_storage(WHOLE, below="")
    root = ModelURI("memory", "tests")

    for uri in (root, root.join(INDEX)):
        assert tensors_of(FIRST, SECOND, THIRD) == content(open_files(storage, uri), WHOLE)


def test_neighbour_whose_name_begins_alike() -> None:
    """A directory ``model-2`` does not belong to ``model``."""
    storage = memory_storage(WHOLE)
    storage.put("model-2/other.safetensors", b"rubbish")
    storage.put("model.safetensors", b"rubbish")

    assert 3 == len(open_files(storage, DIRECTORY).files)


# -- what is missing or does not fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard(index: bool) -> None:
    """A shard that the index or the names of the others promise, and that is not there, is named."""
    files = {name: data for name, data in (WHOLE if index else NO_INDEX).items() if name != SECOND}

    error = refused(files)

    assert f"1 of 3 shards missing: {SECOND}" in str(error)
    assert SECOND == error.file


def test_many_missing_shards() -> None:
    """Of many missing shards the message has the number and the first few."""
    error = refused({shard_name(1, 500): safetensors_file({})})

    assert f"499 of 500 shards missing: {shard_name(2, 500)}, {shard_name(3, 500)}" in str(error)
    assert len(str(error)) < 1000


def test_missing_index() -> None:
    """The URI of an index that is not there names it."""
    with pytest.raises(NotFoundError, match=r"memory://tests/model/model\.safetensors\.index\.json"):
        opened(NO_INDEX, INDEX)


def test_missing_file() -> None:
    """The URI of a file that is not there names it."""
    with pytest.raises(NotFoundError, match=r"memory://tests/model/other\.safetensors"):
        opened(WHOLE, "other.safetensors")


def test_index_names_a_tensor_that_no_shard_has() -> None:
    """The index promised a tensor that its shard does not hold: tensor and file are named."""
    error = refused(sharded(SHARDS, weight_map={"z": FIRST, "lost": SECOND}))

    assert f"the index has the tensor 'lost' in {SECOND}, but no file has it" in str(error)
    assert SECOND == error.file


def test_index_names_the_wrong_shard() -> None:
    """The tensor is in another shard than the index says: both are named."""
    error = refused(sharded(SHARDS, weight_map={"z": SECOND, "b": FIRST}))

    assert f"the index has the tensor 'z' in {SECOND}, but it is in {FIRST}" in str(error)


def test_index_that_is_none() -> None:
    """A broken index is named, not worked around."""
    assert f"{INDEX} is no valid index" in str(refused(WHOLE | {INDEX: b""}))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/model/secret.safetensors", "a\0.safetensors"])
def test_index_that_leads_elsewhere(name: str, tmp_path: Path) -> None:
    """A file outside the checkpoint is never opened, however an index spells its name."""
    write_files(tmp_path, {"secret.safetensors": WHOLE[FIRST], f"model/{INDEX}": index_text({"z": name})})
    storage = Watched(FileStorage())

    with pytest.raises(CheckpointError, match=INDEX):
        open_files(storage, ModelURI("file", path=f"{tmp_path}/model"))

    assert {f"{tmp_path}/model/{INDEX}"} == {path for path, _, _ in storage.reads}
    assert [] == storage.stats


def test_huge_index_is_not_read() -> None:
    """An index of more bytes than any has is refused by its size, before it is read."""

    class Huge(Watched):
        def list(self, prefix: str) -> Iterable[ObjectInfo]:
            for info in super().list(prefix):
                yield attrs.evolve(info, size=MAX_INDEX_BYTES + 1) if info.path.endswith(INDEX) else info

    storage = Huge(memory_storage(WHOLE))

    with pytest.raises(CheckpointError, match=f"the index {INDEX} has {MAX_INDEX_BYTES + 1} bytes"):
        open_files(storage, DIRECTORY)

    assert [] == storage.reads


@pytest.mark.parametrize("index", [True, False])
def test_tensor_in_two_files(index: bool) -> None:
    """A tensor that is in two files is an error that names it and both of them."""
    shards = {
        "a.safetensors": {"w": tensor("U8", [1])},
        "b.safetensors": {"w": tensor("U8", [1]), "x": SHARDS[THIRD]["c"]},
    }
    weight_map = {"w": "a.safetensors", "x": "b.safetensors"}

    error = refused(sharded(shards, index=INDEX if index else None, weight_map=weight_map))

    assert "the tensor 'w' is in two files: a.safetensors and b.safetensors" in str(error)


def test_two_layouts_without_an_index() -> None:
    """One checkpoint in two layouts and no index to choose one is refused with a hint."""
    error = refused(NO_INDEX | {"consolidated.safetensors": safetensors_file(tensors_of(FIRST))})

    assert f"is in two files: consolidated.safetensors and {FIRST}" in str(error)
    assert "add an index" in str(error)


def test_subdirectory_is_suggested() -> None:
    """If the files are one directory further down, the message says so."""
    error = refused({"README.md": b"", "fp16/model.safetensors": b"", "fp32/model.safetensors": b""})

    assert "in directories below it" in str(error)
    assert "add one to the URI: fp16, fp32" in str(error)


def test_other_format() -> None:
    """A directory without safetensors files says what is there instead."""
    error = refused({"config.json": b"{}", "pytorch_model.bin": b""})

    assert "no .safetensors files among the 2 files: config.json, pytorch_model.bin" in str(error)


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_nothing_there(name: str, tmp_path: Path) -> None:
    """A directory that is empty, or is not there, is not found."""
    (tmp_path / "empty").mkdir()

    for storage, uri in (
        (FileStorage(), ModelURI("file", path=str(tmp_path / name))),
        (MemoryStorage("tests"), ModelURI("memory", "tests", name)),
    ):
        with pytest.raises(NotFoundError) as caught:
            open_files(storage, uri)
        assert str(uri) in str(caught.value)


def test_directory_that_is_called_like_a_file(tmp_path: Path) -> None:
    """A directory with the name of a file is no file, and the message names it."""
    (tmp_path / SINGLE).mkdir()

    with pytest.raises(UnsupportedError, match=rf"{SINGLE}.*directory"):
        open_files(FileStorage(), ModelURI("file", path=str(tmp_path / SINGLE)))


def test_too_many_objects() -> None:
    """A directory with more than 10,000 objects is no model's own, and is not read to its end."""
    files = {f"logs/{n}": b"" for n in range(9_998)} | {SINGLE: safetensors_file(SHARDS[FIRST])}
    storage = memory_storage(files)
    storage.put("model/logs/x", b"")
    most = open_files(storage, DIRECTORY)

    storage.put("model/logs/y", b"")
    with pytest.raises(CheckpointError) as caught:
        open_files(storage, DIRECTORY)

    assert 2 == len(most.tensors)
    assert "memory://tests/model: more than 10000 objects" in str(caught.value)


# -- broken files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda _: b"", "has 0 bytes, too few"),
        (lambda data: data[:7], "has 7 bytes, too few"),
        (lambda data: data[:20], "but the file has only 20 bytes"),
        (lambda data: data[:-1], "cut short"),
        (lambda data: data + b"\0", "goes on after the last tensor"),
        (lambda data: data[:10] + b"\0" + data[11:], "not JSON"),
        (lambda data: bytes(len(data)), "does not start with {"),
    ],
    ids=[
        "empty",
        "7 bytes",
        "cut in the header",
        "cut at the end",
        "too long",
        "damaged",
        "zeros",
    ],
)
@pytest.mark.parametrize("which", [FIRST, THIRD])
def test_broken_shard(damage: Callable[[bytes], bytes], words: str, which: str) -> None:
    """Of many shards the message names the one that is broken, and how."""
    error = refused(WHOLE | {which: damage(WHOLE[which])})

    assert f"{which} is no valid safetensors file: " in str(error)
    assert words in str(error)
    assert which == error.file


def test_first_broken_shard_is_named() -> None:
    """Whatever the threads do, it is the first broken file in order of names that is reported."""
    for _ in range(20):
        assert FIRST == refused(WHOLE | {FIRST: b"", SECOND: b"", THIRD: b""}).file


# -- what is read ------------------------------------------------------------------------------------------------------


def test_one_read_per_small_header() -> None:
    """Each file takes one request, and nothing is asked twice."""
    storage = Watched(memory_storage(WHOLE))

    open_files(storage, DIRECTORY)

    assert sorted(f"model/{name}" for name in WHOLE) == sorted(path for path, _, _ in storage.reads)
    assert (["model"], []) == (storage.lists, storage.stats)


@pytest.mark.parametrize(
    ("header_bytes", "reads"),
    [
        (FIRST_READ - 1, [(0, FIRST_READ)]),
        (FIRST_READ, [(0, FIRST_READ)]),
        (FIRST_READ + 1, [(0, FIRST_READ), (FIRST_READ, 1)]),
        (FIRST_READ + 8, [(0, FIRST_READ), (FIRST_READ, 8)]),
        (3 * FIRST_READ, [(0, FIRST_READ), (FIRST_READ, 2 * FIRST_READ)]),
    ],
)
def test_long_header(header_bytes: int, reads: list[tuple[int, int]]) -> None:
    """A header that is longer than the first read takes one more, from where that ended to its own end."""
    storage = Watched(memory_storage({SINGLE: padded(header_bytes)}))

    checkpoint = open_files(storage, DIRECTORY)

    assert [(f"model/{SINGLE}", offset, length) for offset, length in reads] == storage.reads
    assert (header_bytes, header_bytes) == (checkpoint.files[0].header_bytes, checkpoint.tensors["a"].offset)


@pytest.mark.parametrize("files", [WHOLE, NO_INDEX, {SINGLE: padded(2 * FIRST_READ)}], ids=["index", "none", "long"])
def test_opened_bytes(files: Mapping[str, bytes]) -> None:
    """What opening costs is counted as it was read, the index included."""
    storage = Watched(memory_storage(files))

    checkpoint = open_files(storage, DIRECTORY)

    assert sum(length for _, _, length in storage.reads) == checkpoint.opened_bytes


def test_bytes_in_pieces() -> None:
    """A storage that gives a few bytes at a time gives the same checkpoint."""
    storage = InPieces(memory_storage(WHOLE))

    for reading in (storage, retrying(storage)):
        assert tensors_of(FIRST, SECOND, THIRD) == content(open_files(reading, DIRECTORY), WHOLE)


def test_headers_are_fetched_in_parallel() -> None:
    """As many headers as the limit allows are in flight at once, and never more."""
    shards = {f"{n}.safetensors": {f"t{n}": tensor("U8", [1])} for n in range(9)}
    together = threading.Barrier(3, timeout=30)
    lock = threading.Lock()
    in_flight = most = 0

    class Together(Wrapped):
        def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
            nonlocal in_flight, most
            with lock:
                in_flight += 1
                most = max(most, in_flight)
            together.wait()  # breaks where fewer than three ever come
            with lock:
                in_flight -= 1
            return super().read_into(path, offset, buffer, version=version)

    checkpoint = open_files(Together(memory_storage(sharded(shards, index=None))), DIRECTORY, concurrency=3)

    assert [f"t{n}" for n in range(9)] == list(checkpoint.tensors)
    assert 3 == most


def test_concurrency_of_one() -> None:
    """With a limit of one, the headers are read one after another."""
    storage = Watched(memory_storage(NO_INDEX))

    open_files(storage, DIRECTORY, concurrency=1)

    assert [f"model/{name}" for name in (FIRST, SECOND, THIRD)] == [path for path, _, _ in storage.reads]


# -- versions ----------------------------------------------------------------------------------------------------------


def test_versions_are_pinned() -> None:
    """Each file is read in the version that was listed, and carries it, and the store's digests, from then on."""
    storage = Watched(memory_storage(WHOLE))
    listed = {info.path: info for info in storage.list("model")}

    checkpoint = open_files(storage, DIRECTORY)

    assert {path: info.version for path, info in listed.items()} == storage.versions
    assert [listed[file.path].version for file in checkpoint.files] == [file.version for file in checkpoint.files]
    assert None not in storage.versions.values()


def test_digests_are_kept() -> None:
    """Digests that the storage publishes are handed on."""

    class Digested(Wrapped):
        def list(self, prefix: str) -> Iterable[ObjectInfo]:
            return [attrs.evolve(info, digests={"md5": info.path}) for info in super().list(prefix)]

    checkpoint = open_files(Digested(memory_storage(NO_INDEX)), DIRECTORY)

    assert [{"md5": f"model/{name}"} for name in (FIRST, SECOND, THIRD)] == [dict(f.digests) for f in checkpoint.files]


@pytest.mark.parametrize("wrap", [lambda storage: storage, retrying], ids=["bare", "retrying"])
@pytest.mark.parametrize("replacement", [WHOLE[SECOND], WHOLE[FIRST][:-1], b""], ids=["other", "shorter", "empty"])
@pytest.mark.parametrize("which", [FIRST, INDEX])
def test_object_replaced_after_listing(wrap: Callable[[Storage], Storage], replacement: bytes, which: str) -> None:
    """An object that is replaced between the listing and the read is no longer what was listed."""
    inner = memory_storage(WHOLE)
    storage = wrap(ChangedAfterListing(inner, lambda: inner.put(f"model/{which}", replacement)))

    with pytest.raises(SourceChangedError, match=f"memory://tests/model/{which}"):
        open_files(storage, DIRECTORY)


@pytest.mark.parametrize("wrap", [lambda storage: storage, retrying], ids=["bare", "retrying"])
@pytest.mark.parametrize("how", ["cut", "grown", "replaced", "rewritten"])
def test_file_changed_after_listing(wrap: Callable[[Storage], Storage], how: str, tmp_path: Path) -> None:
    """A file that is cut, goes on growing, or is replaced or rewritten meanwhile is noticed, and named."""
    file = write_files(tmp_path, {SINGLE: WHOLE[FIRST]}) / SINGLE

    def change() -> None:
        before = file.stat().st_mtime_ns
        if how == "cut":
            os.truncate(file, 20)
        elif how == "grown":
            file.write_bytes(WHOLE[FIRST] + b"\0")
        elif how == "replaced":
            (tmp_path / "new").write_bytes(WHOLE[FIRST])
            (tmp_path / "new").rename(file)
            os.utime(file, ns=(before, before))
        else:
            file.write_bytes(WHOLE[FIRST])
            os.utime(file, ns=(before + 1_000_000_000, before + 1_000_000_000))

    storage = wrap(ChangedAfterListing(FileStorage(), change))

    with pytest.raises(SourceChangedError, match=SINGLE):
        open_files(storage, ModelURI("file", path=str(tmp_path)))


def test_object_replaced_between_two_reads_of_its_header() -> None:
    """A long header is never put together from two versions."""
    inner = memory_storage({SINGLE: padded(2 * FIRST_READ)})
    storage = ChangedAfterFirstRead(inner, lambda: inner.put(f"model/{SINGLE}", padded(2 * FIRST_READ)))

    with pytest.raises(SourceChangedError, match=f"memory://tests/model/{SINGLE}"):
        open_files(storage, DIRECTORY)


@pytest.mark.parametrize("wrap", [lambda storage: storage, retrying], ids=["bare", "retrying"])
@pytest.mark.parametrize("length", [0, 4, 30])
def test_file_that_shrinks_without_versions(wrap: Callable[[Storage], Storage], length: int) -> None:
    """Where nothing pins a file, one that ends too early is still seen, and reading it ends."""
    inner = memory_storage(NO_INDEX)
    storage = wrap(WithoutVersions(ChangedAfterListing(inner, lambda: inner.put(f"model/{FIRST}", bytes(length)))))

    with pytest.raises(SourceChangedError, match=f"model/{FIRST}"):
        open_files(storage, DIRECTORY)


def test_without_versions() -> None:
    """A storage without versions is opened all the same, and the files say that nothing pins them."""
    checkpoint = open_files(WithoutVersions(memory_storage(WHOLE)), DIRECTORY)

    assert tensors_of(FIRST, SECOND, THIRD) == content(checkpoint, WHOLE)
    assert {None} == {file.version for file in checkpoint.files}


def test_object_deleted_after_listing() -> None:
    """A file that is deleted meanwhile is not found, and named."""
    inner = memory_storage(NO_INDEX)
    storage = ChangedAfterListing(inner, lambda: inner.delete(f"model/{SECOND}"))

    with pytest.raises(NotFoundError, match=f"memory://tests/model/{SECOND}"):
        open_files(storage, DIRECTORY)


# -- rights and failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [AccessDeniedError, UnsupportedError])
@pytest.mark.parametrize("hides", [False, True])
def test_listing_denied_but_stat_allowed(refusal: type[BackendError], hides: bool) -> None:
    """Without the right to list, the usual names are tried: the index first, then the one file."""
    single = {SINGLE: safetensors_file(SHARDS[THIRD])}

    for files, expected in (
        (WHOLE, (FIRST, SECOND, THIRD)),
        (single, (THIRD,)),
        (WHOLE | single, (FIRST, SECOND, THIRD)),
    ):
        checkpoint = open_files(ListingDenied(memory_storage(files), refusal=refusal, hides=hides), DIRECTORY)
        assert tensors_of(*expected) == content(checkpoint, files)


@pytest.mark.parametrize("name", [INDEX, "other.safetensors.index.json"])
def test_listing_denied_but_stat_allowed_and_the_index_is_named(name: str) -> None:
    """The URI of an index needs no listing, whatever it is called."""
    files = sharded(SHARDS, index=name)

    checkpoint = open_files(ListingDenied(memory_storage(files)), DIRECTORY.join(name))

    assert tensors_of(FIRST, SECOND, THIRD) == content(checkpoint, files)


@pytest.mark.parametrize("hides", [False, True])
def test_listing_denied_and_nothing_usual_there(hides: bool) -> None:
    """Where none of the usual names is there, the refusal to list is what is reported."""
    with pytest.raises(AccessDeniedError, match="list the files of memory://tests/model"):
        open_files(ListingDenied(memory_storage(NO_INDEX), hides=hides), DIRECTORY)


@pytest.mark.parametrize(("failure", "retryable"), [(BackendError, False), (UnavailableError, True)])
def test_listing_denied_and_stat_fails_otherwise(failure: type[BackendError], retryable: bool) -> None:
    """The refusal to list says more than what an answer without a body lets guess; a passing fault is tried again."""

    class Failing(ListingDenied):
        def stat(self, path: str) -> ObjectInfo:
            raise failure("HTTP 400", uri=f"memory://tests/{path}", operation="read the size")

    with pytest.raises(failure if retryable else AccessDeniedError) as caught:
        open_files(Failing(memory_storage(WHOLE)), DIRECTORY)

    assert retryable is caught.value.retryable


def test_listing_denied_but_stat_allowed_and_a_shard_is_missing() -> None:
    """A missing shard is named without a listing too."""
    files = {name: data for name, data in WHOLE.items() if name != SECOND}

    with pytest.raises(CheckpointError, match=f"1 of 3 shards missing: {SECOND}"):
        open_files(ListingDenied(memory_storage(files)), DIRECTORY)


@pytest.mark.parametrize("error", [UnavailableError, AccessDeniedError, NotFoundError])
def test_failing_read_is_passed_on(error: type[BackendError]) -> None:
    """A failure of the storage stays what the storage called it; it is not called a broken checkpoint."""

    class Failing(Wrapped):
        def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
            if path.endswith(SECOND):
                raise error("no", uri=f"memory://tests/{path}", operation="read")
            return super().read_into(path, offset, buffer, version=version)

    with pytest.raises(error, match=f"memory://tests/model/{SECOND}"):
        open_files(Failing(memory_storage(WHOLE)), DIRECTORY)


# -- the same from every storage ---------------------------------------------------------------------------------------


def test_file_and_memory_are_the_same(tmp_path: Path) -> None:
    """The same files give the same checkpoint, in every storage, except for versions and paths."""
    environ = {"MX_PLUGINS": "modelexpress-core"}
    write_files(tmp_path, WHOLE)
    for name, data in WHOLE.items():
        store("test_opening").put(f"model/{name}", data)

    def facts(checkpoint: Checkpoint) -> object:
        def known(file: CheckpointFile) -> CheckpointFile:
            return attrs.evolve(file, path="", version=None)

        described = [(t.name, t.dtype, t.shape, t.offset, t.length, t.file.name) for t in checkpoint.tensors.values()]
        return described, [known(file) for file in checkpoint.files], checkpoint.opened_bytes

    for name in ("", f"/{INDEX}", f"/{SECOND}"):
        from_memory = open_checkpoint(f"memory://test_opening/model{name}", environ=environ)
        for uri in (f"{tmp_path}{name}", f"file://{tmp_path}{name}", tmp_path / name.strip("/")):
            assert facts(from_memory) == facts(open_checkpoint(uri, environ=environ))


@pytest.mark.parametrize("spelling", ["{}/", "{}//", "{}/.", "file://{}/", "file://{}/sub/.."])
def test_spellings_of_a_directory(spelling: str, tmp_path: Path) -> None:
    """Slashes and dots at the end of a directory change nothing."""
    write_files(tmp_path, {**WHOLE, "sub/x": b""})

    checkpoint = open_checkpoint(spelling.format(tmp_path), environ={"MX_PLUGINS": "modelexpress-core"})

    assert tensors_of(FIRST, SECOND, THIRD) == content(checkpoint, WHOLE)


def test_links(tmp_path: Path) -> None:
    """A directory of links to files, as the Hugging Face cache has them, is a checkpoint, and a circle does no harm."""
    write_files(tmp_path / "blobs", {str(n): data for n, data in enumerate(WHOLE.values())})
    (tmp_path / "model").mkdir()
    for n, name in enumerate(WHOLE):
        (tmp_path / "model" / name).symlink_to(f"../blobs/{n}")
    (tmp_path / "model" / "circle").symlink_to(".")

    checkpoint = open_files(FileStorage(), ModelURI("file", path=str(tmp_path / "model")))

    assert tensors_of(FIRST, SECOND, THIRD) == content(checkpoint, WHOLE)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    """A clone without its large files is a common slip; the message says what to run."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee\nsize 9\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)

    with pytest.raises(CheckpointError, match="Git LFS pointer") as caught:
        open_checkpoint(tmp_path, environ={})

    assert caught.value.hint is not None
    assert "git lfs pull" in caught.value.hint


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_file_of_another_format_is_not_called_missing(scheme: str, tmp_path: Path) -> None:
    """It is there, and the message says what it is not."""
    (tmp_path / "model.bin").write_bytes(b"PK")
    store("another-format").put("model.bin", b"PK")
    uri = {"file": str(tmp_path / "model.bin"), "memory": "memory://another-format/model.bin"}[scheme]

    with pytest.raises(CheckpointError, match=r"not a \.safetensors file"):
        open_checkpoint(uri, environ={})


def test_a_memory_uri_without_a_name_is_a_directory_too() -> None:
    """memory:///model is a place like memory://name/model."""
    store("").put("nameless/model.safetensors", safetensors_file({"a": tensor("F32", (3,))}))

    assert list(open_checkpoint("memory:///nameless", environ={}).tensors) == ["a"]


def test_a_shard_that_is_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    """A cache that was cleaned in part is no whole model; other links that lead nowhere do not matter."""
    (tmp_path / "a.safetensors").write_bytes(safetensors_file({"a": tensor("F32", (3,))}))
    (tmp_path / "notes.txt").symlink_to("gone")

    assert list(open_checkpoint(tmp_path, environ={}).tensors) == ["a"]

    (tmp_path / "b.safetensors").symlink_to("gone")
    with pytest.raises(NotFoundError, match=r"b\.safetensors.*\n.*a link to gone"):
        open_checkpoint(tmp_path, environ={})
