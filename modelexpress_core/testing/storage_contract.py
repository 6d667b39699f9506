"""The contract of storages: the rules that core relies on, as tests that run against a real storage.

Each test states one rule of ``modelexpress_core.contracts.storage.Storage`` in its docstring. A failure message names
the call, its arguments and result, and often the usual mistake.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, cast
from uuid import uuid4

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelexpress_core.contracts.storage import BatchStorage, ObjectInfo, RunStorage, Storage
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    NotFoundError,
    SourceChangedError,
    UnavailableError,
)
from modelexpress_core.testing.calling import CallingContract
from modelexpress_core.testing.checks import (
    BatchBuffers,
    Runs,
    calls_of,
    check_bytes,
    check_class,
    check_digest,
    check_endpoint,
    check_error,
    check_final,
    check_hidden,
    check_patience,
    check_runs,
    check_waiting,
    checked_batch,
    checked_read,
    checked_runs,
    listed_paths,
    random_content,
    same,
    watched_sockets,
    with_batches,
    with_diagnosis,
    with_patience,
    with_runs,
)
from modelexpress_core.testing.contract import violated

__all__ = ["UNUSUAL_NAMES", "StorageContract"]

#: Object names that occur in practice and need care in a URL. Some pairs become one name if decoded twice.
UNUSUAL_NAMES: tuple[str, ...] = (
    "with space",
    "plus+plus",
    "plus plus",
    "percent%41",
    "percentA",
    "hash#tag",
    "question?mark=1&more",
    "at@colon:equals=",
    "quotes'and\"",
    "brackets[0]{1}(2)",
    "tilde~dollar$comma,semicolon;",
    "ünïcödé-模型-🙂",
)


_OBJECT_BYTES = 100_003
_LARGE_BYTES = (16 << 20) + 7
_RUNS_BYTES = (2 << 20) + 3

#: How long reads continue in tests in which another thread acts during them.
_MEANWHILE_SECONDS = 0.2


class StorageContract(CallingContract, contract=True):
    """The rules for every storage, checked on the storage of the fixtures.

    Override ``storage`` and ``put``; the other fixtures have a default, or enable tests. A rule that does not apply,
    because of a fixture, an attribute, or a feature that the storage does not have, is a skipped test with a reason.

    Example:
        >>> import pytest
        >>> from modelexpress_core.storage.memory import MemoryStorage
        >>> class TestMemoryStorage(StorageContract):
        ...     @pytest.fixture
        ...     def storage(self):
        ...         return MemoryStorage()
        ...
        ...     @pytest.fixture
        ...     def put(self, storage):
        ...         return storage.put

    Attributes:
        versions: Whether the storage has versions. If not, ``version`` is always None.
        root_is_listable: Whether ``list("")`` lists the whole authority, and a test may do so.
        page_size: Objects in one page of a listing; a test puts one more. 0 if listings have no pages.
        unsupported_names: Names in ``UNUSUAL_NAMES`` that the backend cannot store, with the reason.
        hang_seconds: How long one call may take before it counts as hanging.
        close_seconds: How long a stalled read may go on after ``close``.
    """

    versions: ClassVar[bool] = True
    root_is_listable: ClassVar[bool] = True
    page_size: ClassVar[int] = 0
    unsupported_names: ClassVar[Mapping[str, str]] = {}
    hang_seconds: ClassVar[float] = 30.0
    close_seconds: ClassVar[float] = 2.0

    # -- fixtures to override -----------------------------------------------------------------------------------------

    @pytest.fixture
    def storage(self) -> Storage:
        """The storage under test: a new one for each test, since some tests close it. Close it afterwards, too."""
        violated(f"{type(self).__name__} needs a fixture `storage` that returns (or yields) a new storage")

    @pytest.fixture
    def put(self) -> Callable[[str, bytes], object]:
        """A function ``put(path, content)`` that stores an object where ``storage`` finds it, in one step."""
        violated(f"{type(self).__name__} needs a fixture `put`: a function that stores content at a path")

    @pytest.fixture
    def directory(self) -> str:
        """Prefix of an empty directory, as ``list`` takes it; a new one for each test."""
        return f"contract-{uuid4().hex}"

    @pytest.fixture
    def secrets(self) -> Sequence[str]:
        """The credentials of the storage, which must not appear in errors or logs."""
        return ()

    @pytest.fixture
    def missing_authority(self) -> Storage | None:
        """A storage of a bucket, account or share that does not exist; None if the storage has no such concept."""
        return None

    @pytest.fixture
    def unreachable(self) -> Storage | None:
        """A storage of a server that refuses connections; None if there is no server."""
        return None

    @pytest.fixture
    def denied(self) -> Storage | None:
        """A storage whose credentials are refused; None if there are no credentials."""
        return None

    @pytest.fixture
    def without_credentials(self) -> Storage | None:
        """A storage that finds no credentials; None if it needs none, or always finds some."""
        return None

    @pytest.fixture
    def stalled(self) -> tuple[Storage, str] | None:
        """A storage, and the path of an object that never sends a byte; None if reads cannot stall."""
        return None

    # -- the protocol -------------------------------------------------------------------------------------------------

    def test_it_is_a_storage(self, storage: Storage) -> None:
        """The storage has the methods of the protocol."""
        if not isinstance(storage, Storage):
            violated(f"{type(storage).__name__} has not all methods of modelexpress_core.contracts.storage.Storage")

    # -- list ---------------------------------------------------------------------------------------------------------

    def test_list_finds_objects_at_any_depth(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """``list`` finds objects in the directory and in all directories below it, each once."""
        names = ("a", "b/c", "b/d/e/f/g")
        for name in names:
            put(f"{directory}/{name}", b"x")

        same(
            sorted(f"{directory}/{name}" for name in names),
            sorted(listed_paths(storage, directory)),
            f"list({directory!r}) returned paths",
        )

    def test_list_takes_its_prefix_for_a_directory(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """A prefix is a directory name, not the start of a string: ``model-2`` is not in ``model``."""
        for name in ("model/inside", "model-2/a", "model.safetensors", "model2", "mode/l"):
            put(f"{directory}/{name}", b"x")

        same(
            [f"{directory}/model/inside"],
            sorted(listed_paths(storage, f"{directory}/model")),
            f"beside {directory}/model are model-2/, model2 and model.safetensors; "
            f"list({directory + '/model'!r}) returned",
        )

    def test_list_of_nothing_is_empty(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """Below a directory without objects, and below an object, the list is empty, and no error."""
        put(f"{directory}/object", b"x")

        for prefix in (f"{directory}/nothing", f"{directory}/object", f"{directory}/nothing/at/all"):
            same([], listed_paths(storage, prefix), f"there is no object below {prefix}, but list returned")

    def test_list_of_the_root_finds_everything(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """The empty prefix lists the whole authority."""
        if not self.root_is_listable:
            pytest.skip("the root of this storage cannot be listed (root_is_listable is False)")
        names = {f"{directory}/a", f"{directory}/b/c"}
        for name in names:
            put(name, b"x")

        missing = sorted(names - set(listed_paths(storage, "")))
        same([], missing, "list('') did not return")

    def test_list_goes_on_after_a_page(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """``list`` returns all objects, each once, if they do not fit on one page."""
        if not self.page_size:
            pytest.skip("listings of this storage have no pages (page_size is 0)")
        names = sorted(f"{directory}/{number:06}" for number in range(self.page_size + 1))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: put(name, b""), names))

        listed = sorted(listed_paths(storage, directory))
        same(len(names), len(listed), "the number of objects that list returned is")
        same(names, listed, "list returned")

    def test_list_agrees_with_stat(self, storage: Storage, put: Callable[[str, bytes], object], directory: str) -> None:
        """``stat`` and ``read_into`` accept the listed paths; sizes and versions are the same."""
        contents = {f"{directory}/{name}": random_content(size) for name, size in (("a", 1), ("b/c", 1000))}
        for path, content in contents.items():
            put(path, content)

        for info in storage.list(directory):
            if not isinstance(info, ObjectInfo):
                violated(f"list returned {type(info).__name__}, not ObjectInfo")
            found = storage.stat(info.path)
            content = contents[info.path]
            same((info.path, len(content)), (found.path, found.size), f"stat({info.path!r}) returned path and size")
            same(len(content), info.size, f"list returned for {info.path} the size")
            same(found.version, info.version, f"stat returned for {info.path} the version {found.version!r}, but list")
            check_bytes(content, 0, checked_read(storage, info.path, 0, len(content), info.version), info.path)

    def test_list_of_a_missing_authority_is_not_found(self, missing_authority: Storage | None) -> None:
        """Listing a bucket, account or share that does not exist raises NotFoundError."""
        if missing_authority is None:
            pytest.skip("the fixture `missing_authority` is None")
        error = self._failing("list('model')", lambda: list(missing_authority.list("model")))
        check_class(error, (NotFoundError,), "listing an authority that does not exist")

    # -- stat ---------------------------------------------------------------------------------------------------------

    def test_stat_tells_the_size(self, storage: Storage, put: Callable[[str, bytes], object], directory: str) -> None:
        """``stat`` returns the current size, also after the object was replaced."""
        for size in (7, 0, 70_000):
            put(f"{directory}/object", random_content(size))

            same(size, storage.stat(f"{directory}/object").size, "stat returned the size")

    def test_stat_of_nothing_is_not_found(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """``stat`` of a missing object raises NotFoundError, also for the start of a path, or below an object."""
        put(f"{directory}/model/object", b"x")

        for path in ("model/obj", "model/object2", "elsewhere/object", "model/object/below"):
            error = self._failing(f"stat of {path}", lambda path=path: storage.stat(f"{directory}/{path}"))  # type: ignore[misc]  # a default binds it
            check_class(error, (NotFoundError,), f"stat({path!r}), which does not exist,")

    def test_stat_of_a_directory_is_an_error(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """``stat`` of a directory raises BackendError: a directory is not an object."""
        put(f"{directory}/model/object", b"x")

        error = self._failing("stat of a directory", lambda: storage.stat(f"{directory}/model"))
        check_class(error, (BackendError,), "stat of a directory")

    def test_digests_are_those_of_the_content(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """Published digests are those of the whole current object, in lower-case hex; core knows the algorithms."""
        path, published = f"{directory}/object", False
        for content in (random_content(_OBJECT_BYTES), random_content(_OBJECT_BYTES, seed=1)):
            put(path, content)
            for info in (storage.stat(path), *storage.list(directory)):
                for algorithm, digest in info.digests.items():
                    published = True
                    check_digest(content, algorithm, digest)
        if not published:
            pytest.skip("the storage publishes no digests")

    # -- read_into ----------------------------------------------------------------------------------------------------

    def test_reads_any_range(self, storage: Storage, put: Callable[[str, bytes], object], directory: str) -> None:
        """A read writes all bytes of the range into the buffer, nothing outside it, and returns their number."""
        path, content = f"{directory}/object", random_content(_OBJECT_BYTES)
        put(path, content)
        version = storage.stat(path).version

        @settings(max_examples=60, deadline=None, derandomize=True, database=None)
        @given(one=st.integers(0, _OBJECT_BYTES), other=st.integers(0, _OBJECT_BYTES), pinned=st.booleans())
        @example(one=0, other=_OBJECT_BYTES, pinned=True)
        @example(one=0, other=1, pinned=True)
        @example(one=_OBJECT_BYTES - 1, other=_OBJECT_BYTES, pinned=False)
        @example(one=1, other=_OBJECT_BYTES - 1, pinned=True)
        def reads(*, one: int, other: int, pinned: bool) -> None:
            offset = min(one, other, _OBJECT_BYTES - 1)
            length = max(abs(one - other), 1)
            got = checked_read(storage, path, offset, length, version if pinned else None)
            check_bytes(content, offset, got, path, length)

        reads()

    def test_reads_the_object_that_was_asked_for(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """Objects of equal size and equal name in several directories are distinguished, in any order."""
        contents = {
            f"{directory}/{name}": random_content(5000, seed) for seed, name in enumerate(("a/x", "b/x", "x", "A/x"))
        }
        for path, content in contents.items():
            put(path, content)

        for path in (*contents, *reversed(contents)):
            version = storage.stat(path).version
            check_bytes(contents[path], 0, checked_read(storage, path, 0, 5000, version), path, 5000)

    def test_reads_much_at_once(self, storage: Storage, put: Callable[[str, bytes], object], directory: str) -> None:
        """One call fills a buffer of sixteen megabytes."""
        path, content = f"{directory}/object", random_content(_LARGE_BYTES)
        put(path, content)

        got = checked_read(storage, path, 3, _LARGE_BYTES - 3, storage.stat(path).version)

        check_bytes(content, 3, got, path, _LARGE_BYTES - 3)

    def test_reads_into_any_memory(self, storage: Storage, put: Callable[[str, bytes], object], directory: str) -> None:
        """A buffer may be any memory: of a tensor, a mapped file, shared or pinned, at any address."""
        path, content = f"{directory}/object", random_content(10_000)
        put(path, content)

        with mmap.mmap(-1, 10_000) as mapped:
            kinds = {
                "a ctypes array": memoryview((ctypes.c_uint8 * 10_000)()).cast("B"),
                "an array of floats": memoryview((ctypes.c_float * 2500)()).cast("B"),
                "a mapping": memoryview(mapped),
                "an odd address": memoryview(bytearray(10_001))[1:],
            }
            try:
                for kind, view in kinds.items():
                    count = storage.read_into(path, 0, view, version=None)
                    same(10_000, count, f"read_into into {kind} returned")
                    check_bytes(content, 0, bytes(view), f"{path} (read into {kind})")
            finally:
                for view in kinds.values():
                    view.release()

    def test_a_read_over_the_end_is_short(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """A read beyond the end returns the number of existing bytes, and leaves the rest of the buffer unchanged."""
        path, content = f"{directory}/object", random_content(1000)
        put(path, content)

        for offset, length in ((0, 1001), (990, 11), (999, 5000), (1, 100_000)):
            got = checked_read(storage, path, offset, length, storage.stat(path).version)
            check_bytes(content, offset, got, path, 1000 - offset)

    def test_a_read_behind_the_end_brings_nothing(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """A read behind the end returns 0, or raises SourceChangedError because the object was truncated."""
        path = f"{directory}/object"
        put(path, random_content(1000))

        for offset in (1000, 1001, 5000, 1 << 32, (1 << 32) + 1):
            self._brings_nothing(storage, path, offset)

    def test_empty_objects(self, storage: Storage, put: Callable[[str, bytes], object], directory: str) -> None:
        """Empty objects are listed, have size 0, and a read returns 0 bytes."""
        path = f"{directory}/empty"
        put(path, b"")

        same([path], listed_paths(storage, directory), "list returned")
        same(0, storage.stat(path).size, "stat returned the size")
        self._brings_nothing(storage, path, 0)

    def test_unusual_names(self, storage: Storage, put: Callable[[str, bytes], object], directory: str) -> None:
        """Names with spaces, percent signs and so on are listed unchanged, and can be read under these names."""
        for name, reason in self.unsupported_names.items():
            if name not in UNUSUAL_NAMES or not reason.strip():
                violated(f"unsupported_names: {name!r} is not in UNUSUAL_NAMES, or has no reason")
        names = [name for name in UNUSUAL_NAMES if name not in self.unsupported_names]
        paths = [f"{directory}/{path}" for name in names for path in (name, f"in {name}/{name}")]
        for path in paths:
            put(path, path.encode())

        problems = []
        for path in paths:
            expected = path.encode()
            try:
                same(len(expected), storage.stat(path).size, "stat returned the size")
                check_bytes(expected, 0, checked_read(storage, path, 0, len(expected)), path)
            except (BackendError, AssertionError) as exc:
                problems.append(f"{path!r}: {exc}")
        same([], problems, "stat and read_into fail for these names")
        same(sorted(paths), sorted(listed_paths(storage, directory)), "list returned paths")

    def test_a_read_of_nothing_is_not_found(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """A read of a missing object raises NotFoundError, with and without a version."""
        put(f"{directory}/object", b"x")

        for version in (None, storage.stat(f"{directory}/object").version):
            read = self._failing("read_into", lambda v=version: checked_read(storage, f"{directory}/none", 0, 10, v))  # type: ignore[misc]  # a default binds it
            check_class(read, (NotFoundError,), "a read of an object that does not exist")

    # -- versions -----------------------------------------------------------------------------------------------------

    def test_versions_are_what_was_declared(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """Versions from ``stat`` and ``list`` are non-empty strings, or always None if there are no versions."""
        put(f"{directory}/object", b"x")

        for info in (storage.stat(f"{directory}/object"), *storage.list(directory)):
            if self.versions and not (isinstance(info.version, str) and info.version):
                violated(f"the version is {info.version!r}; if the storage has no versions, set versions = False")
            if not self.versions and info.version is not None:
                violated(f"the version is {info.version!r}, although versions is False: set it to True")

    def test_another_content_is_another_version(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """Another content of the same size has another version; without a change the version stays the same."""
        self._needs_versions()
        path = f"{directory}/object"
        seen = []
        for content in (b"first", b"other", b"third"):
            put(path, content)
            version = storage.stat(path).version
            same([version] * 2, [info.version for info in (storage.stat(path), *storage.list(directory))], "versions")
            seen.append(version)

        same(3, len(set(seen)), f"three contents of one size have the versions {seen}: the number of versions is")

    @pytest.mark.parametrize("size", [1000, 900, 1100], ids=["same size", "shorter", "longer"])
    def test_a_replaced_object_is_not_read_under_its_old_version(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str, size: int
    ) -> None:
        """A read under the old version raises SourceChangedError, or returns the old bytes if they are kept."""
        self._needs_versions()
        path, old = f"{directory}/object", random_content(1000)
        put(path, old)
        versions = [storage.stat(path).version, *(info.version for info in storage.list(directory))]
        put(path, random_content(size, seed=1))

        for version in versions:
            for offset, length in ((0, 1000), (500, 100)):
                try:
                    got = checked_read(storage, path, offset, length, version)
                except BackendError as exc:
                    check_class(exc, (SourceChangedError,), "a read of a version that was replaced")
                else:
                    check_bytes(old, offset, got, f"{path} in its old version {version!r}", length)

    def test_without_a_version_any_is_read(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """Without a version, a read returns the current content, or one since the storage was opened; no mixture."""
        path, stored = f"{directory}/object", []
        for seed in range(3):
            stored.append(random_content(1000, seed))
            put(path, stored[-1])

            got = checked_read(storage, path, 0, 1000)
            if got not in stored:
                check_bytes(stored[-1], 0, got, f"{path} (version=None)", 1000)

    def test_versions_are_never_mixed(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """While the object is being replaced, a read returns bytes of the requested version, or fails."""
        self._needs_versions()
        path, done = f"{directory}/object", threading.Event()
        put(path, bytes([1]) * 50_000)

        def read_runs(version: str | None) -> bytes:
            return checked_runs(cast("RunStorage", storage), path, Runs(0, 100, 200, 250), version)

        def read_whole(version: str | None) -> bytes:
            return checked_read(storage, path, 0, 50_000, version)

        def read_batch(version: str | None) -> bytes:
            buffers = BatchBuffers([(path, offset, 25_000, version) for offset in (0, 25_000)])
            for error in checked_batch(cast("BatchStorage", storage), buffers).values():
                raise error
            return buffers.content(0) + buffers.content(1)

        methods = [read_whole]
        methods += [read_runs] if hasattr(storage, "read_runs") else []
        methods += [read_batch] if hasattr(storage, "read_batch") else []
        byte_of: dict[str | None, int] = {}

        def replace() -> None:
            try:
                for value in range(2, 16):
                    put(path, bytes([value]) * 50_000)
                    time.sleep(0.01)  # timestamps of file systems are coarse
            finally:
                done.set()

        def read(number: int) -> None:
            read_once = methods[number % len(methods)]
            while not done.is_set():
                version = storage.stat(path).version
                try:
                    got = read_once(version)
                except SourceChangedError:
                    continue
                values = sorted(set(got))
                same(1, len(values), f"one read of {path} returned bytes of the contents {values}: their number is")
                first = byte_of.setdefault(version, values[0])
                same(first, values[0], f"the version {version!r} had the content {first}, and later")

        self._in_threads(4, read, meanwhile=replace)

    # -- runs, if the storage has read_runs ---------------------------------------------------------------------------

    def test_reads_any_runs(self, storage: Storage, put: Callable[[str, bytes], object], directory: str) -> None:
        """``read_runs`` returns the bytes of all runs, one after another, and writes nothing outside the buffer."""
        running = with_runs(storage)
        path, content = f"{directory}/object", random_content(_RUNS_BYTES)
        put(path, content)
        version = storage.stat(path).version

        @settings(max_examples=60, deadline=None, derandomize=True, database=None)
        @given(
            offset=st.integers(0, _RUNS_BYTES - 1),
            run_bytes=st.integers(1, 9000),
            gap_bytes=st.integers(1, 9000),
            number=st.integers(1, 300),
            pinned=st.booleans(),
        )
        @example(offset=0, run_bytes=1, gap_bytes=1, number=3000, pinned=True)
        @example(offset=1, run_bytes=512, gap_bytes=512, number=3000, pinned=True)
        @example(offset=3, run_bytes=256, gap_bytes=8000, number=3000, pinned=False)
        @example(offset=0, run_bytes=9000, gap_bytes=1, number=3000, pinned=True)
        @example(offset=_RUNS_BYTES - 1, run_bytes=1, gap_bytes=4096, number=1, pinned=True)
        def reads(*, offset: int, run_bytes: int, gap_bytes: int, number: int, pinned: bool) -> None:
            run_bytes = min(run_bytes, _RUNS_BYTES - offset)
            there = (_RUNS_BYTES - offset - run_bytes) // (run_bytes + gap_bytes) + 1
            runs = Runs(offset, run_bytes, run_bytes + gap_bytes, min(number, there))
            got = checked_runs(running, path, runs, version if pinned else None)
            check_runs(content, runs, got, path, runs.number)

        reads()

    def test_runs_over_the_end_are_short(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """``read_runs`` beyond the end returns only the runs that are whole, and the number of their bytes."""
        running = with_runs(storage)
        path, content = f"{directory}/object", random_content(1000)
        put(path, content)

        for offset, whole in ((0, 4), (1, 3), (899, 1), (900, 1), (901, 0), (999, 0), (1000, 0), (5000, 0)):
            runs = Runs(offset, 100, 300, 5)
            try:
                got = checked_runs(running, path, runs, storage.stat(path).version)
            except SourceChangedError as exc:
                check_final(exc, "read_runs over the end")
                if whole:
                    violated(f"{path} has {whole} whole runs at {offset}, but read_runs returned none: {exc}", exc)
                continue
            check_runs(content, runs, got, path, whole)

    def test_runs_of_nothing_are_not_found(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """``read_runs`` of a missing object raises NotFoundError."""
        running = with_runs(storage)
        put(f"{directory}/object", b"x")

        error = self._failing("read_runs", lambda: checked_runs(running, f"{directory}/none", Runs(0, 10, 20, 3)))
        check_class(error, (NotFoundError,), "read_runs of an object that does not exist")

    def test_runs_of_a_replaced_object_are_not_read_under_its_old_version(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """A read under the old version raises SourceChangedError, or returns the old bytes if they are kept."""
        running = with_runs(storage)
        self._needs_versions()
        path, old = f"{directory}/object", random_content(1000)
        put(path, old)
        version = storage.stat(path).version
        put(path, random_content(1000, seed=1))
        runs = Runs(5, 10, 30, 30)

        try:
            got = checked_runs(running, path, runs, version)
        except BackendError as exc:
            check_class(exc, (SourceChangedError,), "read_runs of a version that was replaced")
        else:
            check_runs(old, runs, got, f"{path} in its old version {version!r}", runs.number)

    def test_close_ends_runs_in_other_threads(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """After ``close``, running and later calls end soon, with bytes or a BackendError that is not retryable."""
        running = with_runs(storage)
        path, content = f"{directory}/object", random_content(1 << 20)
        put(path, content)

        def read(number: int) -> None:
            runs = Runs(number, 100, 200, 5000)
            check_runs(content, runs, checked_runs(running, path, runs), f"{path} (during close)")

        self._ends_at_close(storage, read)

    # -- batches, if the storage has read_batch -----------------------------------------------------------------------

    def test_batches_read_every_request(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """``read_batch`` fills the buffer of each request, nothing else, and yields each request once, when it is full.

        The ranges touch, repeat, and lie in several objects.
        """
        batching = with_batches(storage)
        contents = {f"{directory}/{name}": random_content(_OBJECT_BYTES, seed) for seed, name in enumerate("ab")}
        for path, content in contents.items():
            put(path, content)
        versions = {path: storage.stat(path).version for path in contents}
        chance = random.Random(1)  # noqa: S311 - no secret
        whole = [(path, 0, _OBJECT_BYTES, versions[path]) for path in contents]
        ends = [(path, at, 1, versions[path]) for path in contents for at in (0, 1, _OBJECT_BYTES - 1)]
        neighbours = [(path, at, 1000, None) for path in contents for at in range(0, 10_000, 1000)]
        ranges: list[tuple[str, int, int, str | None]] = [*whole, *ends, *neighbours]
        for _ in range(100):
            path, offset = chance.choice(list(contents)), chance.randrange(_OBJECT_BYTES)
            ranges.append((path, offset, chance.randint(1, _OBJECT_BYTES - offset), versions[path]))

        for batch in (ranges, ranges[:1], list(reversed(ranges)), []):

            def check(index: int, got: bytes, batch: Sequence[tuple[str, int, int, str | None]] = batch) -> None:
                path, offset, length, _ = batch[index]
                check_bytes(contents[path], offset, got, path, length)

            errors = checked_batch(batching, BatchBuffers(batch), check)
            same({}, errors, "reading objects that exist, read_batch yielded the errors")

    def test_batches_fail_by_request(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str, secrets: Sequence[str]
    ) -> None:
        """A missing object, or an end before the end of the range, fails its own request alone."""
        batching = with_batches(storage)
        path, content = f"{directory}/object", random_content(1000)
        put(path, content)
        version = storage.stat(path).version
        ranges = [
            (path, 0, 500, version),
            (f"{directory}/none", 0, 10, None),
            (path, 900, 101, version),
            (path, 2000, 10, version),
            (path, 500, 500, version),
        ]

        errors = checked_batch(
            batching,
            BatchBuffers(ranges),
            lambda index, got: check_bytes(content, ranges[index][1], got, path, ranges[index][2]),
        )

        same([1, 2, 3], sorted(errors), "the requests that cannot be read in full are 1, 2 and 3; read_batch failed")
        check_class(errors[1], (NotFoundError,), "a request for an object that does not exist")
        for index in (2, 3):
            check_class(errors[index], (SourceChangedError,), "a request over the end of an object")
        for error in errors.values():
            check_error(error, secrets)

    def test_batches_read_no_other_version(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """A request under the version of a replaced object fails with SourceChangedError, or gets the old bytes."""
        batching = with_batches(storage)
        self._needs_versions()
        path, old = f"{directory}/object", random_content(1000)
        put(path, old)
        put(f"{directory}/other", old)
        version, other = storage.stat(path).version, storage.stat(f"{directory}/other").version
        put(path, random_content(1000, seed=1))
        ranges = [(path, 5, 100, version), (f"{directory}/other", 5, 100, other), (path, 900, 100, version)]

        errors = checked_batch(
            batching,
            BatchBuffers(ranges),
            lambda index, got: check_bytes(old, ranges[index][1], got, f"{path} in its old version {version!r}", 100),
        )

        for index, error in errors.items():
            check_class(error, (SourceChangedError,), "a request for a version that was replaced")
            if index == 1:
                violated(f"the request for an object that was not replaced failed: {error}")

    def test_a_batch_that_is_closed_writes_nothing_more(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """Once the generator of ``read_batch`` is closed, nothing writes to any of its buffers."""
        batching = with_batches(storage)
        path, content = f"{directory}/object", random_content(4 << 20)
        put(path, content)
        buffers = BatchBuffers([(path, offset, 1 << 16, None) for offset in range(0, 4 << 20, 1 << 16)])

        batch = batching.read_batch(buffers.requests)
        next(batch)
        self._soon("close of a batch", batch.close)
        blank = bytes(1 << 16)
        for request in buffers.requests:
            request.buffer[:] = blank
        time.sleep(_MEANWHILE_SECONDS)

        written = [index for index in range(len(buffers.requests)) if buffers.content(index) != blank]
        same([], written, "after its generator was closed, read_batch wrote to the buffers of the requests")

    def test_close_ends_batches_in_other_threads(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """After ``close``, running and later batches end soon, with bytes or an error that is not retryable."""
        batching = with_batches(storage)
        path, content = f"{directory}/object", random_content(1 << 20)
        put(path, content)

        def read(number: int) -> None:
            ranges = [(path, number + at, 1 << 16, None) for at in range(0, 1 << 19, 1 << 16)]
            errors = checked_batch(
                batching,
                BatchBuffers(ranges),
                lambda index, got: check_bytes(content, ranges[index][1], got, f"{path} (read during close)"),
            )
            for error in errors.values():
                raise error

        self._ends_at_close(storage, read)

    # -- patience, if the storage has patience_seconds ----------------------------------------------------------------

    def test_patience_may_be_set_while_reads_run(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """``patience_seconds`` can be set at any time; reads that receive bytes continue."""
        patient = with_patience(storage)
        path, content, done = f"{directory}/object", random_content(_OBJECT_BYTES), threading.Event()
        put(path, content)
        check_patience(patient, None)

        def read(number: int) -> None:
            while not done.is_set():
                check_bytes(content, number, checked_read(storage, path, number, 50_000), path, 50_000)

        def set_it() -> None:
            try:
                end = time.monotonic() + _MEANWHILE_SECONDS
                while time.monotonic() < end:
                    for seconds in (20.0, 600.0, 15, 1e9):
                        patient.patience_seconds = seconds
                        check_patience(patient, seconds)
            finally:
                done.set()

        self._in_threads(3, read, meanwhile=lambda: self._soon("setting patience_seconds", set_it))

    def test_patience_ends_a_read_that_waits(self, stalled: tuple[Storage, str] | None) -> None:
        """A stalled read raises a retryable DeadlineError after the ``patience_seconds`` of its start."""
        if stalled is None:
            pytest.skip("the fixture `stalled` is None")
        storage, path = stalled
        patient = with_patience(storage)

        for seconds in (0.3, 1.2):
            patient.patience_seconds = seconds
            what = f"a read that receives no byte, with patience_seconds = {seconds:g},"
            self._in_threads(2, lambda _: check_waiting(patient, path), what=what)

        def set_patience() -> None:
            time.sleep(_MEANWHILE_SECONDS)
            begun = time.monotonic()
            patient.patience_seconds = 2.0
            if time.monotonic() - begun > 0.5:
                violated("setting patience_seconds waited for a stalled read")

        self._in_threads(2, lambda _: check_waiting(patient, path), meanwhile=set_patience)

    # -- diagnosis, if the storage has endpoint and credentials -------------------------------------------------------

    def test_endpoint_says_where_requests_go(self, storage: Storage, unreachable: Storage | None) -> None:
        """``endpoint`` returns host and port without credentials, and makes no connection, even without a server."""
        for each in (storage, unreachable):
            if each is None:
                continue
            diagnosable = with_diagnosis(each)
            with watched_sockets() as events:
                endpoint = self._soon("endpoint", diagnosable.endpoint)
                same(endpoint, diagnosable.endpoint(), "endpoint returned")
            if events:
                violated(f"endpoint must not use the network, but did: {', '.join(events)}")
            check_endpoint(endpoint)

    def test_credentials_say_who_asks(
        self, storage: Storage, denied: Storage | None, secrets: Sequence[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """``credentials`` returns one line without a secret, also for credentials that are refused."""
        with caplog.at_level("INFO"):
            for each in (storage, denied):
                if each is None:
                    continue
                text: object = self._soon("credentials", with_diagnosis(each).credentials)
                if not isinstance(text, str) or not text.strip() or "\n" in text:
                    violated(
                        f"credentials returned {type(text).__name__}; it must return one line that names the identity"
                    )
                check_hidden(text, secrets, "the result of credentials")
        check_hidden(caplog.text, secrets, "the log")

    def test_missing_credentials_are_denied(self, without_credentials: Storage | None, secrets: Sequence[str]) -> None:
        """Without credentials, requests and ``credentials`` raise AccessDeniedError."""
        if without_credentials is None:
            pytest.skip("the fixture `without_credentials` is None")
        calls = dict(calls_of(without_credentials))
        if hasattr(without_credentials, "credentials"):
            calls["credentials"] = with_diagnosis(without_credentials).credentials
        for name, call in calls.items():
            error = self._failing(f"{name} without credentials", call)
            check_class(error, (AccessDeniedError,), f"{name} without credentials")
            check_error(error, secrets)

    # -- threads ------------------------------------------------------------------------------------------------------

    def test_threads_do_not_disturb_each_other(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """Many threads read, list and stat at once; each gets the right result."""
        contents = {f"{directory}/{name}": random_content(_OBJECT_BYTES, seed) for seed, name in enumerate("ab")}
        for path, content in contents.items():
            put(path, content)
        infos = {info.path: info for info in storage.list(directory)}

        def use(number: int) -> None:
            chance = random.Random(number)  # noqa: S311 - no secret
            for turn in range(40):
                path = chance.choice(list(contents))
                offset = chance.randrange(_OBJECT_BYTES)
                length = chance.randint(1, _OBJECT_BYTES - offset)
                got = checked_read(storage, path, offset, length, infos[path].version)
                check_bytes(contents[path], offset, got, f"{path} (while other threads read)", length)
                if turn % 20 == 0:
                    same(_OBJECT_BYTES, storage.stat(path).size, "while other threads read, stat returned the size")
                    listed = sorted(listed_paths(storage, directory))
                    same(sorted(contents), listed, "while other threads read, list returned")

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            self._in_threads(8, use)
        finally:
            sys.setswitchinterval(before)

    # -- close --------------------------------------------------------------------------------------------------------

    def test_close_may_be_called_again(self, storage: Storage) -> None:
        """``close`` may be called several times."""
        for _ in range(3):
            self._soon("close", storage.close)

    def test_calls_after_close_end(self, storage: Storage, put: Callable[[str, bytes], object], directory: str) -> None:
        """Calls after ``close`` end soon, with a result or with a BackendError that is not retryable."""
        path, content = f"{directory}/object", random_content(1000)
        put(path, content)
        checked_read(storage, path, 0, 1000)
        storage.close()

        calls: Mapping[str, Callable[[], object]] = {
            "list": lambda: same([path], listed_paths(storage, directory), "list returned"),
            "stat": lambda: same(1000, storage.stat(path).size, "stat returned the size"),
            "read_into": lambda: check_bytes(content, 0, checked_read(storage, path, 0, 1000), path),
        }
        for name, call in calls.items():
            try:
                self._soon(f"{name} after close", call)
            except BackendError as exc:
                check_final(exc, f"{name} after close")

    def test_close_ends_reads_in_other_threads(
        self, storage: Storage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """``close`` ends reads in other threads soon, with bytes or a BackendError that is not retryable."""
        path, content = f"{directory}/object", random_content(1 << 20)
        put(path, content)

        def read(number: int) -> None:
            got = checked_read(storage, path, number, 1 << 19, broken=True)
            check_bytes(content, number, got, f"{path} (read during close)")

        self._ends_at_close(storage, read)

    def test_close_ends_a_read_that_waits(self, stalled: tuple[Storage, str] | None) -> None:
        """``close`` itself ends a stalled read, so that a failed load does not wait for a silent server.

        A read that only its time-out ends fails: give the storage of ``stalled`` one that is far longer than
        ``close_seconds``. The test sets the patience of a storage that has one.
        """
        if stalled is None:
            pytest.skip("the fixture `stalled` is None")
        storage, path = stalled
        if hasattr(storage, "patience_seconds"):
            storage.patience_seconds = 10 * self.hang_seconds
        ended: list[float] = []
        closed: list[float] = []

        def read(_: int) -> None:
            try:
                checked_read(storage, path, 0, 1000, broken=True)
            except BackendError as exc:
                ended.append(time.monotonic())
                check_final(exc, "a read that close ended")
                return
            violated("the read returned without an error, although it should stall: check the fixture `stalled`")

        def close() -> None:
            time.sleep(_MEANWHILE_SECONDS)
            closed.append(time.monotonic())
            self._soon("close during a stalled read", storage.close)

        self._in_threads(3, read, meanwhile=close)
        if min(ended) < closed[0]:
            violated("a read ended before close was called, although it should stall: check the fixture `stalled`")
        late = max(ended) - closed[0]
        if late > self.close_seconds:
            violated(
                f"a stalled read ended {late:.1f} s after close, and at most {self.close_seconds:g} s are allowed "
                "(close_seconds): shut its connection down in close, and do not wait for its time-out"
            )

    # -- errors -------------------------------------------------------------------------------------------------------

    def test_errors_say_what_was_tried(
        self,
        storage: Storage,
        put: Callable[[str, bytes], object],
        directory: str,
        secrets: Sequence[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Errors name URI, operation and provider, survive pickling, and contain no credential."""
        put(f"{directory}/object", b"x")
        missing = f"{directory}/no-such-object"
        with caplog.at_level("INFO"):
            errors = [
                self._failing("stat", lambda: storage.stat(missing)),
                self._failing("read_into", lambda: checked_read(storage, missing, 0, 10)),
            ]

        for error in errors:
            check_class(error, (NotFoundError,), "a call for an object that does not exist")
            check_error(error, secrets)
            if not error.uri.endswith("/no-such-object"):
                violated(f"the error's uri is {error.uri!r}, which does not name the object, {missing}")
        check_hidden(caplog.text, secrets, "the log")

    def test_an_unreachable_server_is_unavailable(self, unreachable: Storage | None, secrets: Sequence[str]) -> None:
        """An unreachable server raises a retryable UnavailableError or DeadlineError soon: only core retries."""
        if unreachable is None:
            pytest.skip("the fixture `unreachable` is None")
        for name, call in calls_of(unreachable).items():
            error = self._failing(f"{name} without a server", call)
            check_class(error, (UnavailableError, DeadlineError), f"{name} without a server")
            check_error(error, secrets)
            if not error.retryable:
                violated(
                    f"the {type(error).__name__} of {name} is not retryable, so that a restart of the server is fatal"
                )

    def test_refused_credentials_are_denied(
        self, denied: Storage | None, secrets: Sequence[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Refused credentials raise AccessDeniedError, not retryable, which does not contain the credentials."""
        if denied is None:
            pytest.skip("the fixture `denied` is None")
        with caplog.at_level("INFO"):
            for name, call in calls_of(denied).items():
                error = self._failing(f"{name} with refused credentials", call)
                check_class(error, (AccessDeniedError,), f"{name} with refused credentials")
                check_error(error, secrets)
        check_hidden(caplog.text, secrets, "the log")

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _needs_versions(self) -> None:
        if not self.versions:
            pytest.skip("the storage has no versions (versions is False)")

    def _brings_nothing(self, storage: Storage, path: str, offset: int) -> None:
        try:
            got = checked_read(storage, path, offset, 100, storage.stat(path).version)
        except BackendError as exc:
            check_class(exc, (SourceChangedError,), f"a read of {path} at {offset}, behind its end,")
        else:
            same(b"", got, f"{path} has no bytes at {offset}, but a read returned")

    def _ends_at_close(self, storage: Storage, read: Callable[[int], None]) -> None:
        """Close ``storage`` while threads call ``read`` repeatedly; fail unless running and later calls end."""
        done = threading.Event()

        def keep_reading(number: int) -> None:
            while not done.is_set():
                try:
                    read(number)
                except BackendError as exc:
                    check_final(exc, "a read during close")
                    return

        def close() -> None:
            try:
                time.sleep(_MEANWHILE_SECONDS / 4)
                self._soon("close during reads", storage.close)
                time.sleep(_MEANWHILE_SECONDS / 2)
            finally:
                done.set()

        self._in_threads(6, keep_reading, meanwhile=close)
        try:
            self._soon("a read after close", lambda: read(0))
        except BackendError as exc:
            check_final(exc, "a read after close")
