"""Files as a storage: ranges, pinned versions, links, and what goes wrong with files."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelexpress_core.contracts.storage import ObjectInfo, Storage
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    NotFoundError,
    SourceChangedError,
    UnsupportedError,
)
from modelexpress_core.plugins import STORAGE, PluginManager
from modelexpress_core.storage.file import FileStorage
from modelexpress_core.uri import ModelURI

_CONTENT = random.Random(7).randbytes(100_000)


@pytest.fixture
def storage() -> Iterator[FileStorage]:
    made = FileStorage()
    yield made
    made.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(_CONTENT)
    return path


def read(storage: FileStorage, path: Path, offset: int = 0, length: int = 100_000, version: str | None = None) -> bytes:
    buffer = bytearray(length)
    count = storage.read_into(str(path), offset, memoryview(buffer), version=version)
    return bytes(buffer[:count])


def version_of(storage: FileStorage, path: Path) -> str:
    version = storage.stat(str(path)).version
    assert version is not None
    return version


def later(path: Path) -> None:
    """Move the modification time on, which within one tick of the file system's clock would stand still."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))


# -- reading -----------------------------------------------------------------------------------------------------------


def test_it_is_a_storage_and_comes_from_a_record(file: Path) -> None:
    """The scheme ``file`` leads here, by the same path as any plugin's."""
    manager = PluginManager.discover({"MX_PLUGINS": "modelexpress-core"})

    registered, storage = manager.open(STORAGE, ModelURI.parse(file), {})

    assert isinstance(storage, Storage)
    assert "modelexpress-core" == registered.plugin.name
    assert len(_CONTENT) == storage.stat(str(file)).size
    storage.close()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 110_000), st.integers(1, 110_000), st.booleans())
def test_any_range_is_read_as_slicing_would(
    file: Path, storage: FileStorage, offset: int, length: int, pinned: bool
) -> None:
    """Short at the end, nothing behind it, with and without a pinned version."""
    version = version_of(storage, file) if pinned else None

    assert _CONTENT[offset : offset + length] == read(storage, file, offset, length, version)


def test_only_the_buffer_is_written(file: Path, storage: FileStorage) -> None:
    """A short read leaves the rest of the buffer as it was, and nothing around a slice is touched."""
    memory = bytearray(b"x" * 30)

    count = storage.read_into(str(file), len(_CONTENT) - 4, memoryview(memory)[10:20], version=None)

    assert 4 == count
    assert b"x" * 10 + _CONTENT[-4:] + b"x" * 16 == bytes(memory)


def test_an_empty_file_has_nothing_to_read(tmp_path: Path, storage: FileStorage) -> None:
    """Size 0, and 0 bytes read."""
    path = tmp_path / "empty"
    path.touch()

    assert 0 == storage.stat(str(path)).size
    assert b"" == read(storage, path, 0, 10, version_of(storage, path))


def test_stat_and_list_agree_on_the_version(file: Path, storage: FileStorage) -> None:
    """What is listed can be read with the version that the listing gave."""
    (listed,) = storage.list(str(file.parent))

    assert storage.stat(str(file)) == listed
    assert _CONTENT[:10] == read(storage, file, 0, 10, listed.version)


def test_what_a_storage_tells_of_an_object_can_be_pickled() -> None:
    """Listings are handed to worker processes."""
    info = ObjectInfo("a", 1, "v", {"md5": "00"})

    assert info == pickle.loads(pickle.dumps(info))


# -- versions ----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_rewritten_in_place_is_noticed(file: Path, storage: FileStorage) -> None:
    """The pinned version is gone, so reading it fails, before and after the file was first read."""
    version = version_of(storage, file)
    assert _CONTENT[:10] == read(storage, file, 0, 10, version)

    with file.open("r+b") as stream:
        stream.write(b"other bytes")
    later(file)

    for each in (storage, FileStorage()):
        with pytest.raises(SourceChangedError) as caught:
            read(each, file, 0, 10, version)
        assert str(file) in str(caught.value)
        assert "start the load again" in str(caught.value)
        each.close()


@pytest.mark.parametrize("size", [0, 50_000, 150_000])
def test_a_file_that_is_truncated_or_grows_is_noticed(file: Path, storage: FileStorage, size: int) -> None:
    """Not taken for the end of the stream, although the modification time may be the same."""
    version = version_of(storage, file)
    before = file.stat()

    os.truncate(file, size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(SourceChangedError):
        read(storage, file, 0, 100_000, version)


def overwrite(path: Path, content: bytes, offset: int = 0) -> None:
    """Write into the file, and set its times back to what they were."""
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert before.st_mtime_ns == path.stat().st_mtime_ns


def test_a_file_changed_in_place_with_its_times_restored_is_noticed(file: Path, storage: FileStorage) -> None:
    """As tools do that copy times along; no program can set the change time."""
    version = version_of(storage, file)
    assert _CONTENT[:10] == read(storage, file, 0, 10, version)

    overwrite(file, b"other bytes")

    with pytest.raises(SourceChangedError, match="chmod"):
        read(storage, file, 10, 10, version)
    with pytest.raises(SourceChangedError):
        storage.check_unchanged(str(file), version=version)


def test_an_unchanged_file_passes_the_last_check(file: Path, storage: FileStorage) -> None:
    """Also after it was replaced: what was read is the old file. After ``close`` nothing can be said."""
    version = version_of(storage, file)
    read(storage, file, 0, 10, version)

    storage.check_unchanged(str(file), version=version)
    other = file.with_name("other")
    other.write_bytes(bytes(len(_CONTENT)))
    os.replace(other, file)
    storage.check_unchanged(str(file), version=version)

    storage.close()
    with pytest.raises(BackendError):
        storage.check_unchanged(str(file), version=version)


def test_a_file_that_lost_names_goes_on_being_read_until_it_changes(file: Path, storage: FileStorage) -> None:
    """Each name that goes moves the change time. A change of the content moves it too, and is told apart."""
    second, third = file.with_name("second"), file.with_name("third")
    os.link(file, second)
    os.link(file, third)
    version = version_of(storage, file)
    assert _CONTENT[:10] == read(storage, file, 0, 10, version)

    for name in (file, second):
        name.unlink()
        assert _CONTENT == read(storage, file, 0, len(_CONTENT), version)

    overwrite(third, b"other bytes")
    with pytest.raises(SourceChangedError):
        read(storage, file, 10, 10, version)


def test_a_file_is_first_read_when_it_has_settled(file: Path, storage: FileStorage) -> None:
    """A second change within a tick of the kernel's clock has the times of the first, so that tick has to be over."""
    overwrite(file, b"just now")
    version = version_of(storage, file)
    read(storage, file, 0, 10, version)

    assert time.time_ns() - file.stat().st_ctime_ns >= 20_000_000


def test_a_change_soon_after_another_is_noticed(file: Path, storage: FileStorage) -> None:
    """Where the kernel counts time in ticks, both would fall into one."""
    for number in range(20):
        overwrite(file, bytes([number]) * 2000)
        with contextlib.closing(FileStorage()) as fresh:
            version = version_of(fresh, file)
            assert bytes([number]) * 1000 == read(fresh, file, 0, 1000, version)
            overwrite(file, bytes([100 + number]) * 2000)
            with pytest.raises(SourceChangedError):
                read(fresh, file, 1000, 1000, version)


def test_a_file_replaced_by_renaming_goes_on_being_read(file: Path, storage: FileStorage) -> None:
    """After the first read the load keeps its version to the end: all of the old file, nothing of the new."""
    version = version_of(storage, file)
    first = read(storage, file, 0, 10, version)

    other = file.with_name("other")
    other.write_bytes(bytes(len(_CONTENT)))
    os.replace(other, file)

    assert _CONTENT == first + read(storage, file, 10, 100_000, version)


def test_a_file_replaced_before_the_first_read_is_noticed(file: Path, storage: FileStorage) -> None:
    """Between listing and reading there is nothing to hold on to, so it must fail."""
    version = version_of(storage, file)

    other = file.with_name("other")
    other.write_bytes(bytes(len(_CONTENT)))
    os.replace(other, file)

    with pytest.raises(SourceChangedError):
        read(storage, file, 0, 10, version)


def test_a_storage_serves_both_versions_of_a_replaced_file(file: Path, storage: FileStorage) -> None:
    """A load that begins after the replacement reads the new file, while the old load goes on with the old."""
    old = version_of(storage, file)
    read(storage, file, 0, 10, old)
    other = file.with_name("other")
    other.write_bytes(bytes(len(_CONTENT)))
    os.replace(other, file)

    new = version_of(storage, file)

    assert old != new
    assert bytes(10) == read(storage, file, 0, 10, new)
    assert _CONTENT[:10] == read(storage, file, 0, 10, old)


def test_a_file_that_is_deleted_goes_on_being_read(file: Path, storage: FileStorage) -> None:
    """The open descriptor holds it; a new storage finds nothing."""
    version = version_of(storage, file)
    read(storage, file, 0, 10, version)
    file.unlink()

    assert _CONTENT[:20] == read(storage, file, 0, 20, version)
    with pytest.raises(NotFoundError):
        read(FileStorage(), file, 0, 20, version)


def test_versions_are_never_mixed_while_a_file_is_being_replaced(file: Path) -> None:
    """Readers see all-old or all-new or an error, in whatever order writes and reads fall."""
    contents = [bytes([number]) * 4096 for number in range(20)]
    file.write_bytes(contents[0])
    stop = threading.Event()
    mixed: list[set[int]] = []

    def reader() -> None:
        while not stop.is_set():
            storage = FileStorage()
            try:
                version = version_of(storage, file)
                halves = read(storage, file, 0, 2048, version) + read(storage, file, 2048, 2048, version)
            except SourceChangedError:
                continue
            finally:
                storage.close()
            if len(halves) != 4096 or len(set(halves)) != 1:
                mixed.append(set(halves))

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(reader) for _ in range(3)]
        for content in contents * 5:
            other = file.with_name("other")
            other.write_bytes(content)
            os.replace(other, file)
        stop.set()
    for each in readers:
        each.result()

    assert [] == mixed


# -- what is not there -------------------------------------------------------------------------------------------------


_ACTIONS: dict[str, Callable[[FileStorage, Path], object]] = {
    "stat": lambda storage, path: storage.stat(str(path)),
    "read": read,
}


@pytest.mark.parametrize("action", _ACTIONS.values(), ids=_ACTIONS)
@pytest.mark.parametrize("name", ["missing", "missing/deeper", "model.safetensors/deeper"])
def test_a_missing_file_is_not_found(
    file: Path, storage: FileStorage, name: str, action: Callable[..., object]
) -> None:
    """Also where a directory on the way is missing, or is a file; the message has path, cause and next step."""
    with pytest.raises(NotFoundError) as caught:
        action(storage, file.parent / name)

    assert name in caught.value.uri
    assert not caught.value.retryable
    assert "modelexpress-core" == caught.value.provider
    assert caught.value.operation
    assert caught.value.cause
    assert caught.value.hint


@pytest.mark.parametrize("action", _ACTIONS.values(), ids=_ACTIONS)
def test_a_directory_is_no_file(tmp_path: Path, storage: FileStorage, action: Callable[..., object]) -> None:
    """Said as such, not as a missing file."""
    with pytest.raises(UnsupportedError, match="directory"):
        action(storage, tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_pipe_or_socket_is_no_file_and_blocks_nobody(
    tmp_path: Path, storage: FileStorage, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a pipe that nobody writes to would hang the load; it is not listed either."""
    path = tmp_path / "odd"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as made:
            monkeypatch.chdir(tmp_path)  # since the address of a socket must be short
            made.bind("odd")

    failures: list[BaseException] = []

    def reader() -> None:
        try:
            read(storage, path, 0, 10)
        except BaseException as exc:  # noqa: BLE001 - judged below
            failures.append(exc)

    thread = threading.Thread(target=reader, daemon=True)
    thread.start()
    thread.join(20)
    if thread.is_alive():
        with path.open("wb"):  # let it go before the storage is closed
            thread.join(20)
        pytest.fail("opening it blocks")

    assert [] == [exc for exc in failures if not isinstance(exc, BackendError)]
    with pytest.raises(UnsupportedError, match="not a regular file"):
        storage.stat(str(path))
    assert [] == list(storage.list(str(tmp_path)))


@pytest.fixture
def as_somebody() -> Iterator[None]:
    """Without root's leave to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A file in a directory that everybody may enter, readable by nobody."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        path = Path(name) / "model.safetensors"
        path.write_bytes(_CONTENT)
        path.chmod(0)
        (Path(name) / "closed").mkdir(mode=0)
        yield path


@pytest.mark.usefixtures("as_somebody")
def test_a_file_that_may_not_be_read_is_access_denied(forbidden: Path, storage: FileStorage) -> None:
    """Not retried, and the message says where to look."""
    with pytest.raises(AccessDeniedError) as caught:
        read(storage, forbidden)

    assert not caught.value.retryable
    assert "ls -l" in str(caught.value)
    with pytest.raises(AccessDeniedError):
        storage.stat(str(forbidden.parent / "closed" / "x"))
    with pytest.raises(AccessDeniedError):
        list(storage.list(str(forbidden.parent)))


def test_a_path_that_is_not_utf8_can_be_read_and_named(tmp_path: Path, storage: FileStorage) -> None:
    """File names are bytes; messages must not fail over them."""
    path = tmp_path / os.fsdecode(b"mod\xe8le")
    path.write_bytes(b"abc")

    assert b"abc" == read(storage, path, 0, 10, version_of(storage, path))
    path.unlink()
    with pytest.raises(NotFoundError) as caught:
        storage.stat(str(path))
    assert "mod%E8le" in str(caught.value)


# -- listing -----------------------------------------------------------------------------------------------------------


def test_listing_goes_to_any_depth_and_passes_over_hidden_directories(tmp_path: Path, storage: FileStorage) -> None:
    """Every regular file below the directory, with its path as it is read."""
    for name in ("b/c/deep", "a", "b/x", ".cache/lock", ".hidden-file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())

    listed = {os.path.relpath(info.path, tmp_path): info.size for info in storage.list(str(tmp_path))}

    assert {"a": 1, "b/c/deep": 8, "b/x": 3, ".hidden-file": 12} == listed


@pytest.mark.parametrize("name", ["missing", "model.safetensors", "empty"])
def test_listing_what_holds_no_files_gives_none(file: Path, storage: FileStorage, name: str) -> None:
    """A missing directory, a file and an empty directory hold nothing."""
    (file.parent / "empty").mkdir()

    assert [] == list(storage.list(str(file.parent / name)))


def test_a_prefix_is_a_directory_and_not_the_start_of_a_name(tmp_path: Path, storage: FileStorage) -> None:
    """``model`` does not list ``model-2``."""
    for name in ("model/a", "model-2/b"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()

    assert ["a"] == [os.path.basename(info.path) for info in storage.list(str(tmp_path / "model"))]


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """The layout of a Hugging Face cache: a snapshot of relative links into a directory of blobs."""
    blobs = tmp_path / "models--acme--tiny" / "blobs"
    made = tmp_path / "models--acme--tiny" / "snapshots" / "abc123"
    blobs.mkdir(parents=True)
    made.mkdir(parents=True)
    for name, blob in (("model.safetensors", "f00d"), ("config.json", "beef")):
        (blobs / blob).write_bytes(_CONTENT if name.startswith("model") else b"{}")
        (made / name).symlink_to(Path("../../blobs") / blob)
    return made


def test_a_snapshot_of_links_reads_like_files(snapshot: Path, storage: FileStorage) -> None:
    """Links are followed: paths are those of the snapshot, sizes and bytes those of the blobs."""
    listed = {os.path.basename(info.path): info for info in storage.list(str(snapshot))}

    assert {"config.json": 2, "model.safetensors": len(_CONTENT)} == {k: info.size for k, info in listed.items()}
    assert str(snapshot / "model.safetensors") == listed["model.safetensors"].path
    version = listed["model.safetensors"].version
    assert _CONTENT == read(storage, snapshot / "model.safetensors", 0, 100_000, version)
    assert listed["model.safetensors"] == storage.stat(str(snapshot / "model.safetensors"))


def test_a_snapshot_that_is_itself_a_link_is_listed(snapshot: Path, storage: FileStorage) -> None:
    """People link ``/models/tiny`` to a snapshot."""
    link = snapshot.parent / "latest"
    link.symlink_to(snapshot)

    assert {"config.json", "model.safetensors"} == {os.path.basename(i.path) for i in storage.list(str(link))}


def test_a_link_that_is_turned_to_another_blob_is_noticed(snapshot: Path, storage: FileStorage) -> None:
    """An update of the cache turns the link; the pinned version is the old blob."""
    path = snapshot / "model.safetensors"
    version = version_of(storage, path)
    (snapshot.parent.parent / "blobs" / "cafe").write_bytes(bytes(len(_CONTENT)))
    path.unlink()
    path.symlink_to("../../blobs/cafe")

    with pytest.raises(SourceChangedError):
        read(storage, path, 0, 10, version)


def test_a_link_that_leads_nowhere_matters_to_whoever_needs_it(snapshot: Path, storage: FileStorage) -> None:
    """It does not spoil a listing, is not hidden by it either, and the message says where it leads."""
    (snapshot / "model-2.safetensors").symlink_to("../../blobs/gone")

    listed = {os.path.basename(info.path): info.size for info in storage.list(str(snapshot))}

    assert {"config.json", "model.safetensors", "model-2.safetensors"} == listed.keys()
    assert 0 == listed["model-2.safetensors"]
    with pytest.raises(NotFoundError, match=r"a link to \.\./\.\./blobs/gone"):
        storage.stat(str(snapshot / "model-2.safetensors"))


def test_links_in_a_circle_end(tmp_path: Path, storage: FileStorage) -> None:
    """A link to a parent directory is not followed; one to itself leads nowhere, and says so to whoever asks."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").touch()
    (tmp_path / "model" / "up").symlink_to("..")

    assert ["a"] == [os.path.basename(info.path) for info in storage.list(str(tmp_path))]

    (tmp_path / "model" / "self").symlink_to("self")
    with pytest.raises(NotFoundError, match="circle"):
        storage.stat(str(tmp_path / "model" / "self"))


# -- threads and closing -----------------------------------------------------------------------------------------------


def test_many_threads_read_at_once(file: Path, storage: FileStorage) -> None:
    """One storage serves all threads of a load; every range is right."""
    version = version_of(storage, file)
    ranges = [(random.Random(i).randrange(90_000), 1 + random.Random(-i).randrange(10_000)) for i in range(400)]

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda part: read(storage, file, *part, version), ranges))

    assert [_CONTENT[offset : offset + length] for offset, length in ranges] == results


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_closing_gives_the_files_back(tmp_path: Path) -> None:
    """One descriptor for each file while it is open, none after; closing twice does no harm."""
    before = open_descriptors()
    storage = FileStorage()
    for number in range(20):
        path = tmp_path / str(number)
        path.write_bytes(b"abc")
        for _ in range(3):
            read(storage, path, 0, 3, version_of(storage, path))
    held = open_descriptors() - before

    storage.close()
    storage.close()

    assert 20 == held
    assert before == open_descriptors()
    with pytest.raises(BackendError, match="closed"):
        read(storage, tmp_path / "0")


def test_closing_while_others_read(file: Path) -> None:
    """Reads under way end well or with an error, later ones fail, nobody reads another file's bytes, none leaks."""
    before = open_descriptors()
    for _ in range(20):
        storage = FileStorage()
        version = version_of(storage, file)
        started = threading.Barrier(5)
        wrong: list[object] = []

        def reader(
            storage: FileStorage = storage,
            version: str = version,
            started: threading.Barrier = started,
            wrong: list[object] = wrong,
        ) -> None:
            started.wait()
            for offset in range(0, 90_000, 500):
                try:
                    got = read(storage, file, offset, 500, version)
                except BackendError as exc:
                    if "closed" not in str(exc):
                        wrong.append(exc)
                    return
                if got != _CONTENT[offset : offset + 500]:
                    wrong.append(offset)

        with ThreadPoolExecutor(4) as pool:
            readers = [pool.submit(reader) for _ in range(4)]
            started.wait()
            read(storage, file, 0, 1000, version)
            storage.close()
            for each in readers:
                each.result()

        assert [] == wrong

    assert before == open_descriptors()
