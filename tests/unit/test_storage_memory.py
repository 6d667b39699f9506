"""Objects in memory as a storage: the same contract as any, without a disk."""

from __future__ import annotations

import array
import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelexpress_core.contracts.storage import Storage
from modelexpress_core.errors import NotFoundError, SourceChangedError
from modelexpress_core.plugins import STORAGE, PluginManager
from modelexpress_core.storage.memory import MemoryStorage, store
from modelexpress_core.uri import ModelURI

_CONTENT = bytes(range(256)) * 4


def read(storage: MemoryStorage, path: str, offset: int = 0, length: int = 2048, version: str | None = None) -> bytes:
    buffer = bytearray(length)
    count = storage.read_into(path, offset, memoryview(buffer), version=version)
    return bytes(buffer[:count])


def test_a_name_stands_for_the_same_objects_in_the_whole_process() -> None:
    """What is stored under a name is found by the scheme ``memory``, and other names do not see it."""
    store("here").put("model/a", b"abc")
    manager = PluginManager.discover({"MX_PLUGINS": "modelexpress-core"})

    _, here = manager.open(STORAGE, ModelURI.parse("memory://here/model"), {})
    _, there = manager.open(STORAGE, ModelURI.parse("memory://there/model"), {})

    assert isinstance(here, Storage)
    assert ["model/a"] == [info.path for info in here.list("model")]
    assert [] == list(there.list(""))
    store("here").delete("model/a")


@settings(deadline=None)
@given(st.integers(0, 1100), st.integers(1, 1100), st.booleans())
def test_any_range_is_read_as_slicing_would(offset: int, length: int, pinned: bool) -> None:
    """Short at the end, nothing behind it, with and without a pinned version."""
    storage = MemoryStorage()
    info = storage.put("a", _CONTENT)

    got = read(storage, "a", offset, length, info.version if pinned else None)

    assert _CONTENT[offset : offset + length] == got


def test_only_the_buffer_is_written() -> None:
    """A short read leaves the rest as it was."""
    storage = MemoryStorage()
    storage.put("a", b"abc")
    memory = bytearray(b"x" * 10)

    count = storage.read_into("a", 1, memoryview(memory)[2:8], version=None)

    assert (2, b"xxbcxxxxxx") == (count, bytes(memory))


@pytest.mark.parametrize("content", [b"", b"abc", bytearray(b"abc"), memoryview(b"xabc")[1:], array.array("i", [1])])
def test_anything_that_holds_bytes_can_be_put(content: bytes) -> None:
    """Its size is counted in bytes, whatever its items are."""
    storage = MemoryStorage()

    info = storage.put("a", content)

    assert info == storage.stat("a")
    assert memoryview(content).nbytes == info.size
    assert memoryview(content).tobytes() == read(storage, "a", version=info.version)


def test_a_replaced_object_is_a_new_version() -> None:
    """The old version cannot be read any more, also where the bytes are the same; the new one can."""
    storage = MemoryStorage("name")
    old = storage.put("a", b"abc")
    new = storage.put("a", b"abc")

    with pytest.raises(SourceChangedError) as caught:
        read(storage, "a", version=old.version)

    assert "memory://name/a" in str(caught.value)
    assert b"abc" == read(storage, "a", version=new.version)


def test_an_object_that_comes_back_is_a_new_version() -> None:
    """Deleting and putting again does not bring an old version back."""
    storage = MemoryStorage()
    old = storage.put("a", b"abc")
    storage.delete("a")
    storage.delete("a")
    storage.put("a", b"xyz")

    with pytest.raises(SourceChangedError):
        read(storage, "a", version=old.version)


def test_a_missing_object_is_not_found() -> None:
    """With its URI, and how to put it there."""
    storage = MemoryStorage("name")

    for action in (lambda: storage.stat("a/b"), lambda: read(storage, "a/b")):
        with pytest.raises(NotFoundError) as caught:
            action()
        assert "memory://name/a/b" == caught.value.uri
        assert not caught.value.retryable
        assert "put" in str(caught.value)


def test_listing_takes_a_directory_and_not_the_start_of_a_name() -> None:
    """At any depth below it, everything for the empty prefix; slashes at the ends do not matter."""
    storage = MemoryStorage()
    for path in ("model/a", "model/b/c", "model-2/a", "/model/d/"):
        storage.put(path, b"x")

    assert ["model/a", "model/b/c", "model/d"] == sorted(info.path for info in storage.list("model/"))
    assert ["/model/a", "/model/b/c", "/model/d"] == sorted(info.path for info in storage.list("/model/"))
    assert 4 == len(list(storage.list("")))
    assert [] == list(storage.list("mod"))
    assert [] == list(storage.list("model/a"))


def test_what_is_listed_can_be_read() -> None:
    """Path, size and version of a listing are those of the object."""
    storage = MemoryStorage()
    storage.put("model/a", b"abc")

    (info,) = storage.list("model")

    assert storage.stat("model/a") == info
    assert b"abc" == read(storage, info.path, version=info.version)


def test_a_listing_is_not_disturbed_by_changes() -> None:
    """Objects may come and go while somebody lists."""
    storage = MemoryStorage()
    for number in range(10):
        storage.put(f"m/{number}", b"x")

    listing = iter(storage.list("m"))
    first = next(listing)
    storage.delete("m/5")
    storage.put("m/99", b"x")

    assert 9 == len(list(listing))
    assert "m/0" == first.path


def test_closing_keeps_the_objects() -> None:
    """They belong to the process, not to one load."""
    storage = MemoryStorage()
    storage.put("a", b"abc")

    storage.close()

    assert b"abc" == read(storage, "a")


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Threads take turns as often as they can, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless_threads")
def test_what_put_returns_is_what_was_put() -> None:
    """Also while others put and delete the same path: versions are unique, sizes belong to them."""
    storage = MemoryStorage()

    def writer(number: int) -> list[tuple[int, str | None]]:
        made = []
        for _ in range(500):
            info = storage.put("a", bytes(number))
            storage.delete("a")
            made.append((info.size, info.version))
        return made

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(writer, range(8)))

    assert [[number] * 500 for number in range(8)] == [[size for size, _ in each] for each in made]
    assert 4000 == len({version for each in made for _, version in each})


@pytest.mark.usefixtures("restless_threads")
def test_readers_never_see_two_versions() -> None:
    """While one thread replaces the object, every read is of one version, and of the one that was asked for."""
    storage = MemoryStorage()
    contents = [bytes([number]) * 4096 for number in range(1, 100)]
    by_version = {storage.put("a", contents[0]).version: contents[0]}

    def reader(_: int) -> list[tuple[str | None, bytes]]:
        got = []
        for _ in itertools.repeat(None, 200):
            version = storage.stat("a").version
            try:
                got.append((version, read(storage, "a", 0, 4096, version)))
            except SourceChangedError:
                continue
        return got

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(reader, number) for number in range(4)]
        for content in contents[1:]:
            by_version[storage.put("a", content).version] = content
        results = [pair for each in readers for pair in each.result()]

    assert results
    assert [] == [version for version, content in results if by_version[version] != content]
