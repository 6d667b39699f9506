"""Pulls into real directories: right, resumed after every kind of end, verified, refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import modelexpress_core as mx
from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.contracts.storage import ObjectInfo, Storage
from modelexpress_core.copying import PullProgress
from modelexpress_core.copying.hidden_directory import HiddenDirectory
from modelexpress_core.copying.local import Disk
from modelexpress_core.copying.partial import Spans
from modelexpress_core.copying.selection import check_names
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from modelexpress_core.storage.memory import MemoryStorage
from modelexpress_core.testing import FaultPolicy, FaultyStorage
from tests.support.checkpoints import pattern, write_files

CHUNK = 4096

#: Settings of pulls in these tests: many small reads, and no long waits.
ENVIRON = {"MX_CHUNK_BYTES": str(CHUNK), "MX_RETRY_ATTEMPTS": "4"}

FILES = {
    "config.json": b'{"a": 1}',
    "model-00001-of-00002.safetensors": pattern(10 * CHUNK + 17, 1),
    "model-00002-of-00002.safetensors": pattern(6 * CHUNK, 2),
    "model.safetensors.index.json": b"{}",
    "onnx/model.onnx": pattern(CHUNK, 3),
    "tokenizer/deep/empty.txt": b"",
    "tokenizer/tokenizer.model": pattern(100, 4),
}
TOTAL = sum(map(len, FILES.values()))
FIRST = "model-00001-of-00002.safetensors"


class Watched:
    """A storage that can publish digests, counts reads, and calls back before each."""

    def __init__(
        self,
        inner: Storage,
        *,
        digests: Callable[[bytes], dict[str, str]] | None = None,
        listed: bool = True,
        before_read: Callable[[str, int, int], None] = lambda path, offset, length: None,
    ) -> None:
        self.inner = inner
        self.digests = digests
        self.listed = listed
        self.before_read = before_read
        self.reads: list[tuple[str, int, int]] = []
        self.stats: list[str] = []

    def _published(self, info: ObjectInfo) -> ObjectInfo:
        if self.digests is None:
            return info
        content = bytearray(info.size)
        if content:
            self.inner.read_into(info.path, 0, memoryview(content), version=None)
        return attrs.evolve(info, digests=self.digests(bytes(content)))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for info in self.inner.list(prefix):
            yield self._published(info) if self.listed else info

    def stat(self, path: str) -> ObjectInfo:
        self.stats.append(path)
        return self._published(self.inner.stat(path))

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        self.before_read(path, offset, len(buffer))
        self.reads.append((path, offset, len(buffer)))
        return self.inner.read_into(path, offset, buffer, version=version)

    def close(self) -> None:
        self.inner.close()


def sha256(content: bytes) -> dict[str, str]:
    return {"sha256": hashlib.sha256(content).hexdigest()}


def crc32(content: bytes) -> dict[str, str]:
    return {"crc32": f"{zlib.crc32(content):08x}", **sha256(content)}


def memory(files: dict[str, bytes] = FILES) -> MemoryStorage:
    storage = MemoryStorage("pull")
    for name, content in files.items():
        storage.put(f"model/{name}", content)
    return storage


def plugins_for(storage: Any, **capabilities: Any) -> mx.PluginManager:
    """Plugins with ``storage`` behind ``test://``."""

    class Plugin:
        @mx.hookimpl
        def mx_register_storages(self) -> list[StorageProvider]:
            kinds = StorageCapabilities(concurrency=4, most_concurrency=4, **capabilities)
            return [StorageProvider("test", ("test",), lambda uri, settings: storage, capabilities=kinds)]

    manager = mx.PluginManager.discover({})
    manager.register(Plugin(), name="test-storage")
    return manager


def pull(storage: Any, directory: Path, *, uri: str = "test://host/model", **arguments: Any) -> mx.PullReport:
    capabilities = arguments.pop("capabilities", {})
    environ = {**ENVIRON, **arguments.pop("environ", {})}
    return mx.pull(uri, directory, plugins=plugins_for(storage, **capabilities), environ=environ, **arguments)


def files_in(directory: Path) -> dict[str, bytes]:
    """Everything below a directory, without what the pull has to remember."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and ".mx-pull" not in path.parts
    }


def left_behind(directory: Path) -> list[str]:
    """Names in the hidden directory but those that stay."""
    return sorted(set(os.listdir(directory / ".mx-pull")) - {"lock", "manifest"})


def journaled(directory: Path) -> int:
    """Bytes that journals of unfinished files say are there."""
    count = 0
    for part in (directory / ".mx-pull").glob("*.part"):
        for line in part.with_suffix(".journal").read_text().splitlines():
            if line[9:].startswith("have "):
                count += int(line.split(" ")[3])
    return count


def statuses(report: mx.PullReport) -> dict[str, str]:
    return {file.name: file.status for file in report.file_list}


class StoppedError(Exception):
    """Ends a pull in the middle."""


def stop_after(reads: int) -> Callable[[str, int, int], None]:
    """Raises once so many reads have begun."""
    left = [reads]
    lock = threading.Lock()

    def before(path: str, offset: int, length: int) -> None:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise mx.AccessDeniedError("enough", uri=path)

    return before


# -- right ------------------------------------------------------------------------------------------------------------


def test_everything_below_is_copied(tmp_path: Path) -> None:
    """Names, nested directories, empty files and bytes; the report accounts for all; nothing unfinished stays."""
    report = pull(memory(), tmp_path / "new" / "dir")

    assert FILES == files_in(tmp_path / "new" / "dir")
    assert (len(FILES), TOTAL, TOTAL, 0, 0) == (
        report.files,
        report.bytes,
        report.bytes_copied,
        report.bytes_skipped,
        report.bytes_resumed,
    )
    assert dict.fromkeys(FILES, "copied") == statuses(report)
    assert [] == left_behind(tmp_path / "new" / "dir")
    assert {"plugin": "test-storage", "version": ""} == report.storage
    json.dumps(report.to_dict())


def test_one_file_is_copied_under_its_name(tmp_path: Path) -> None:
    """Its URI is enough; it may be hidden, as it was asked for."""
    one = pull(memory(), tmp_path, uri="test://host/model/config.json")
    hidden = pull(memory({".env": b"x"}), tmp_path, uri="test://host/model/.env")

    assert {"config.json": FILES["config.json"], ".env": b"x"} == files_in(tmp_path)
    assert (1, 1) == (one.files, hidden.files)


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    """Files and directories whose names begin with a dot, at any depth; the report counts them."""
    hidden = {".gitattributes": b"x", ".cache/a": b"x", "onnx/.b/c": b"x"}

    report = pull(memory({**FILES, **hidden}), tmp_path)

    assert FILES == files_in(tmp_path)
    assert {"hidden": 3, "weights": 0} == report.left_out


def test_weights_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    """By suffix, in any case; the index and the tokenizer stay."""
    report = pull(memory({**FILES, "PYTORCH_MODEL.BIN": b"x", "model.onnx_data": b"x"}), tmp_path, weights=False)

    expected = {"config.json", "model.safetensors.index.json", "tokenizer/deep/empty.txt", "tokenizer/tokenizer.model"}
    assert expected == files_in(tmp_path).keys()
    assert {"hidden": 0, "weights": 5} == report.left_out


def test_where_nothing_is_left_that_is_an_error(tmp_path: Path) -> None:
    """A directory of weights alone has nothing to copy without them, and is not made."""
    with pytest.raises(mx.CheckpointError, match="1 files of weights"):
        pull(memory({"model.safetensors": b"x"}), tmp_path / "out", weights=False)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("uri", ["test://host/nothing", "test://host"])
def test_where_nothing_is_that_is_an_error(uri: str, tmp_path: Path) -> None:
    """With the URI, before the directory is made."""
    with pytest.raises(mx.NotFoundError, match=uri):
        pull(MemoryStorage("empty"), tmp_path / "out", uri=uri)

    assert not (tmp_path / "out").exists()


def test_files_of_a_disk_are_copied_and_links_to_files_followed(tmp_path: Path) -> None:
    """By path; a link to a file is copied as that file, one that leads nowhere is an error that names it."""
    source = write_files(tmp_path / "source", FILES)
    (source / "link.json").symlink_to(source / "config.json")

    mx.pull(source, tmp_path / "out", environ=ENVIRON)
    (source / "lost.json").symlink_to(source / "nowhere")

    assert {**FILES, "link.json": FILES["config.json"]} == files_in(tmp_path / "out")
    assert not (tmp_path / "out" / "link.json").is_symlink()
    with pytest.raises(mx.NotFoundError, match=r"lost\.json"):
        mx.pull(source, tmp_path / "out", environ=ENVIRON)


def test_files_get_the_mode_that_the_umask_allows(tmp_path: Path) -> None:
    """As any program's files do."""
    before = os.umask(0o027)
    try:
        pull(memory(), tmp_path)
    finally:
        os.umask(before)

    assert 0o640 == stat.S_IMODE((tmp_path / "config.json").stat().st_mode)


@pytest.mark.slow
def test_progress_grows_to_all_of_it(tmp_path: Path) -> None:
    """Bytes never shrink, files under way are named, and the last event says that all is there."""
    events: list[PullProgress] = []

    def slow(path: str, offset: int, length: int) -> None:
        if path.endswith(FIRST):  # longer than events are apart, and one after another: each brings one
            time.sleep(0.15)

    one_by_one = {"MX_CONCURRENCY": "1"}
    pull(Watched(memory(), before_read=slow), tmp_path, on_progress=events.append, environ=one_by_one)

    assert (TOTAL, TOTAL, len(FILES), len(FILES)) == (
        events[-1].bytes_done,
        events[-1].bytes,
        events[-1].files_done,
        events[-1].files,
    )
    done = [event.bytes_done for event in events]
    assert sorted(done) == done
    assert {FIRST} <= {file.name for event in events for file in event.active}


def test_what_watches_may_end_the_pull(tmp_path: Path) -> None:
    """What it raises reaches the caller, and nothing is half-written."""

    def watch(event: PullProgress) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        pull(
            Watched(memory(), before_read=lambda *_: time.sleep(0.05)),
            tmp_path,
            on_progress=watch,
        )

    assert files_in(tmp_path).items() <= FILES.items()


def test_the_next_candidate_is_tried(tmp_path: Path) -> None:
    """As for a load: a place that has nothing is passed over."""

    class Ranking:
        @mx.hookimpl
        def mx_rank_candidates(self, request: LoadRequest, candidates: Any) -> list[Candidate]:
            return [Candidate(mx.ModelURI.parse("test://host/elsewhere")), *candidates]

    plugins = plugins_for(memory())
    plugins.register(Ranking(), name="ranking")

    report = mx.pull("test://host/model", tmp_path, plugins=plugins, environ=ENVIRON)

    assert "test://host/model" == report.uri
    assert FILES == files_in(tmp_path)


# -- what is there already --------------------------------------------------------------------------------------------


def test_unchanged_files_are_skipped(tmp_path: Path) -> None:
    """A second pull reads nothing, and says so; other files of the directory are left alone."""
    storage = Watched(memory())
    (tmp_path / "mine.txt").write_text("mine")
    pull(storage, tmp_path)
    storage.reads.clear()

    report = pull(storage, tmp_path)

    assert [] == storage.reads
    assert (0, TOTAL) == (report.bytes_copied, report.bytes_skipped)
    assert dict.fromkeys(FILES, "skipped") == statuses(report)
    assert {**FILES, "mine.txt": b"mine"} == files_in(tmp_path)


def test_what_changed_on_either_side_is_copied_again(tmp_path: Path) -> None:
    """A new version of an object, a file that was written to, a deleted one; and nothing else."""
    storage = memory()
    pull(storage, tmp_path)
    storage.put("model/config.json", b'{"a": 2}')
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b"[]")
    (tmp_path / "onnx/model.onnx").unlink()

    report = pull(storage, tmp_path)

    assert {**FILES, "config.json": b'{"a": 2}'} == files_in(tmp_path)
    copied = {name for name, status in statuses(report).items() if status == "copied"}
    assert {"config.json", "model.safetensors.index.json", "onnx/model.onnx"} == copied


def test_a_link_in_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """The file that it leads to belongs to another owner."""
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").symlink_to(tmp_path / "other")

    pull(memory(), tmp_path / "out")

    assert b"other" == (tmp_path / "other").read_bytes()
    assert FILES == files_in(tmp_path / "out")


@pytest.mark.parametrize("listed", [True, False])
def test_a_file_with_the_published_digest_is_skipped_wherever_it_came_from(listed: bool, tmp_path: Path) -> None:
    """Put there by hand, with the right bytes or with others of that length; by list or by stat."""
    storage = Watched(memory(), digests=sha256, listed=listed)
    wrong = bytes(len(FILES["config.json"]))
    write_files(tmp_path, {FIRST: FILES[FIRST], "config.json": wrong})

    report = pull(storage, tmp_path, capabilities={"stat_digests": not listed})

    assert FILES == files_in(tmp_path)
    assert [FIRST] == [name for name, status in statuses(report).items() if status == "skipped"]
    assert {"sha256": len(FILES)} == report.verified_digests
    assert {} == pull(storage, tmp_path, capabilities={"stat_digests": not listed}).verified_digests


def test_the_same_version_of_another_place_is_something_else(tmp_path: Path) -> None:
    """Versions are words of one storage: those of two may be equal by chance."""
    storage = memory()
    for name, content in FILES.items():
        storage.put(f"other/{name}", bytes(reversed(content)))

    class SameVersions(Watched):
        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            return (attrs.evolve(info, version="1") for info in self.inner.list(prefix))

        def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
            return self.inner.read_into(path, offset, buffer, version=None)

    pull(SameVersions(storage), tmp_path)
    pull(SameVersions(storage), tmp_path, uri="test://host/other")

    assert {name: bytes(reversed(FILES[name])) for name in FILES} == files_in(tmp_path)


# -- taken up again ---------------------------------------------------------------------------------------------------


def test_a_failed_pull_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    """Every range that was written is not read again, whatever the size of reads is by then."""
    storage = Watched(memory(), before_read=stop_after(8))
    with pytest.raises(mx.AccessDeniedError):
        pull(storage, tmp_path)
    kept = journaled(tmp_path) + sum(map(len, files_in(tmp_path).values()))
    again = Watched(storage.inner)

    report = pull(again, tmp_path, environ={"MX_CHUNK_BYTES": "1000"})

    assert FILES == files_in(tmp_path)
    assert 4 * CHUNK < kept < TOTAL
    assert TOTAL - kept == report.bytes_copied == sum(length for _, _, length in again.reads)
    assert kept == report.bytes_resumed + report.bytes_skipped
    assert "resumed" in statuses(report).values()
    assert [] == left_behind(tmp_path)


def test_an_unfinished_file_of_another_version_is_thrown_away(tmp_path: Path) -> None:
    """Bytes of two versions never meet in one file."""
    storage = Watched(memory(), before_read=stop_after(8))
    with pytest.raises(mx.AccessDeniedError):
        pull(storage, tmp_path)
    changed = {name: bytes(255 - byte for byte in content) for name, content in FILES.items()}
    for name, content in changed.items():
        storage.inner.put(f"model/{name}", content)

    report = pull(storage.inner, tmp_path)

    assert changed == files_in(tmp_path)
    assert 0 == report.bytes_resumed
    assert [] == left_behind(tmp_path)


def test_without_versions_nothing_is_taken_up(tmp_path: Path) -> None:
    """Without versions, the bytes could be of other content; and files in place cannot be recognised either."""

    class Unversioned(Watched):
        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            return (attrs.evolve(info, version=None) for info in self.inner.list(prefix))

        def stat(self, path: str) -> ObjectInfo:
            return attrs.evolve(self.inner.stat(path), version=None)

    with pytest.raises(mx.AccessDeniedError):
        pull(Unversioned(memory(), before_read=stop_after(8)), tmp_path)
    left = left_behind(tmp_path)

    report = pull(Unversioned(memory()), tmp_path)

    assert [] == left
    assert (TOTAL, 0, 0) == (report.bytes_copied, report.bytes_resumed, report.bytes_skipped)


def test_without_weights_unfinished_weights_stay(tmp_path: Path) -> None:
    """A pull of the rest throws no gigabytes away; one of everything takes them up."""
    storage = Watched(memory(), before_read=stop_after(8))
    with pytest.raises(mx.AccessDeniedError):
        pull(storage, tmp_path)

    pull(storage.inner, tmp_path, weights=False)
    left = left_behind(tmp_path)
    report = pull(storage.inner, tmp_path)

    assert left
    assert report.bytes_resumed > 0
    assert FILES == files_in(tmp_path)


def test_what_is_no_longer_there_leaves_no_unfinished_file(tmp_path: Path) -> None:
    """Space on the disk is not held for an object that was deleted."""
    storage = Watched(memory(), before_read=stop_after(8))
    with pytest.raises(mx.AccessDeniedError):
        pull(storage, tmp_path)
    for name in FILES:
        if name.endswith(".safetensors"):
            storage.inner.delete(f"model/{name}")

    pull(storage.inner, tmp_path)

    assert [] == left_behind(tmp_path)


@pytest.mark.parametrize("synced", [False, True])
def test_after_a_loss_of_power_only_what_was_synced_counts(synced: bool, tmp_path: Path) -> None:
    """The journal may have survived bytes that it lists, which a reboot shows."""
    storage = Watched(memory(), before_read=stop_after(8))
    with pytest.raises(mx.AccessDeniedError):
        pull(storage, tmp_path, disk=Disk(sync_seconds=0.0) if synced else Disk())
    assert journaled(tmp_path) > 0
    if not synced:  # what the loss of power may do
        for path in (tmp_path / ".mx-pull").glob("*.part"):
            path.write_bytes(bytes(path.stat().st_size))

    report = pull(storage.inner, tmp_path, disk=Disk(boot_id=lambda: "another"))

    assert FILES == files_in(tmp_path)
    assert synced == (report.bytes_resumed > 0)


@pytest.mark.parametrize("damage", ["cut", "bit", "zeros", "part", "gone", "garbage"])
def test_a_damaged_journal_costs_time_and_nothing_else(damage: str, tmp_path: Path) -> None:
    """Whatever is not whole counts for nothing; what comes before it does, and what the next pull adds."""
    storage = Watched(memory(), before_read=stop_after(8))
    with pytest.raises(mx.AccessDeniedError):
        pull(storage, tmp_path)
    for journal in (tmp_path / ".mx-pull").glob("*.journal"):
        content = bytearray(journal.read_bytes())
        part = journal.with_suffix(".part")
        _, _, offset, length = content.decode().splitlines()[-1].split()
        if damage in {"cut", "bit"}:  # the line that is not whole is of bytes that are not there
            with part.open("r+b") as file:
                file.seek(int(offset))
                file.write(bytes(int(length)))
        if damage == "cut":
            del content[-3:]
        elif damage == "bit":
            content[-4] ^= 1
        elif damage == "zeros":
            content += bytes(50)
        elif damage == "part":
            os.truncate(part, 100)
        elif damage == "garbage":
            content[:] = os.urandom(len(content))
        if damage == "gone":
            journal.unlink()
        else:
            journal.write_bytes(content)

    with pytest.raises(mx.AccessDeniedError):
        pull(Watched(storage.inner, before_read=stop_after(2)), tmp_path)
    pull(storage.inner, tmp_path)

    assert FILES == files_in(tmp_path)
    assert [] == left_behind(tmp_path)


KILLED = """
import os, signal, sys
import modelexpress_core as mx
from modelexpress_core.copying import partial, hidden_directory
from modelexpress_core.copying.local import Disk
from modelexpress_core.storage.file import FileStorage

where, count = sys.argv[3], int(sys.argv[4])

def dying(function, *, after=False):
    def call(*args, **kwargs):
        global count
        count -= 1
        if count < 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if where == "read":
    FileStorage.read_into = dying(FileStorage.read_into)
elif where == "written":
    partial.write_all = dying(partial.write_all, after=True)
elif where == "manifest":
    hidden_directory.write_all = dying(hidden_directory.write_all, after=True)
elif where == "rename":
    os.replace = dying(os.replace)
elif where == "renamed":
    os.replace = dying(os.replace, after=True)
elif where == "unlink":
    os.unlink = dying(os.unlink)
elif where == "fsync":
    os.fsync = dying(os.fsync)
mx.pull(sys.argv[1], sys.argv[2], disk=Disk(fsync=os.fsync))
"""


def pull_killed(source: Path, directory: Path, where: str, count: int) -> int:
    """The status of a process that pulls, and is killed at a certain point."""
    program = [sys.executable, "-c", KILLED, str(source), str(directory), where, str(count)]
    environ = {**os.environ, **ENVIRON, "MX_CONCURRENCY": "3"}
    done = subprocess.run(program, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("where", ["read", "written", "manifest", "rename", "renamed", "unlink", "fsync"])
def test_kill_9_at_any_point_leaves_a_directory_that_the_next_pull_completes(where: str, tmp_path: Path) -> None:
    """No file is ever there in part; what was journaled is not read again; a pull that ends well leaves nothing."""
    source = write_files(tmp_path / "source", FILES)
    out = tmp_path / "out"
    kills = 0
    for count in (0, 2, 5, 9):
        kills += pull_killed(source, out, where, count) != 0
        assert files_in(out).items() <= FILES.items()
    kept = journaled(out) + sum(map(len, files_in(out).values()))

    report = mx.pull(source, out, environ=ENVIRON)

    assert kills >= 2
    assert FILES == files_in(out)
    assert TOTAL - kept == report.bytes_copied
    assert [] == left_behind(out)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20))), st.integers(1, 9))
def test_spans_know_which_bytes_are_there(parts: list[tuple[int, int]], most: int) -> None:
    """As a set of bytes does: what is there and what is missing are all of it, and neither overlaps."""
    spans = Spans()
    reference: set[int] = set()
    for offset, length in parts:
        spans.add(offset, length)
        reference |= set(range(offset, offset + length))

    assert sorted(reference) == [byte for offset, length in spans for byte in range(offset, offset + length)]
    assert len(reference) == spans.total
    missing = list(spans.missing(80, most))
    assert sorted(set(range(80)) - reference) == [
        byte for start, length in missing for byte in range(start, start + length)
    ]
    assert all(0 < length <= most for _, length in missing)


# -- verified ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digests", [sha256, crc32])
@pytest.mark.parametrize("listed", [True, False])
def test_digests_are_compared_with_what_is_on_the_disk(
    digests: Callable[[bytes], dict[str, str]], listed: bool, tmp_path: Path
) -> None:
    """The preferred one of those that are published, asked for by stat where the listing leaves them out."""
    storage = Watched(memory(), digests=digests, listed=listed)

    report = pull(storage, tmp_path, capabilities={"stat_digests": not listed})

    assert {"sha256" if digests is sha256 else "crc32": len(FILES)} == report.verified_digests
    assert {file.name: file.digest for file in report.file_list} == {
        name: next(iter(digests(content).items())) for name, content in FILES.items()
    }


def flipping(times: int) -> Callable[[MemoryStorage], Watched]:
    """Makes storages that hand out a wrong byte of the first file so often."""

    class Flipping(Watched):
        flips = 0

        def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
            count = super().read_into(path, offset, buffer, version=version)
            if path.endswith(FIRST) and offset == 2 * CHUNK and self.flips < times:
                self.flips += 1
                buffer[7] ^= 4
            return count

    return lambda inner: Flipping(inner, digests=sha256)


def test_a_file_with_wrong_bytes_is_fetched_once_more(tmp_path: Path) -> None:
    """And all is well; the bytes that were read twice count twice."""
    report = pull(flipping(1)(memory()), tmp_path)

    assert FILES == files_in(tmp_path)
    assert TOTAL + len(FILES[FIRST]) == report.bytes_copied


def test_wrong_bytes_twice_are_an_error(tmp_path: Path) -> None:
    """The file never appears, nothing of it is kept, and others that were complete are in place."""
    with pytest.raises(mx.IntegrityError, match="fetched twice") as caught:
        pull(flipping(2)(memory()), tmp_path)

    assert FIRST in str(caught.value)
    assert {name: FILES[name] for name in FILES if name != FIRST} == files_in(tmp_path)
    assert [] == left_behind(tmp_path)


def test_verification_can_be_turned_off(tmp_path: Path) -> None:
    """With it the stat requests that ask for digests."""
    storage = flipping(9)(memory())

    report = pull(storage, tmp_path, environ={"MX_VERIFY_DIGESTS": "0"}, capabilities={"stat_digests": True})

    assert {} == report.verified_digests
    assert FILES != files_in(tmp_path)
    assert [] == storage.stats


def test_bits_that_flip_after_they_were_written_are_found(tmp_path: Path) -> None:
    """What is hashed is the file, of an earlier pull too: damage there costs a second reading of it."""
    storage = Watched(memory(), digests=sha256, before_read=stop_after(8))
    with pytest.raises(mx.AccessDeniedError):
        pull(storage, tmp_path)
    for journal in (tmp_path / ".mx-pull").glob("*.journal"):
        ranges = [line.split() for line in journal.read_text().splitlines() if " have " in line]
        with journal.with_suffix(".part").open("r+b") as file:
            file.seek(int(ranges[0][2]))
            file.write(b"\xff\x00\xff")

    pull(Watched(storage.inner, digests=sha256), tmp_path)

    assert FILES == files_in(tmp_path)


# -- faults of the storage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_passing_faults_are_survived(seed: int, tmp_path: Path) -> None:
    """Resets, streams that end early and refusals; flipped bits are found by digest."""
    policy = FaultPolicy(
        reset=0.1, truncation=0.1, unavailable=0.1, throttled=0.05, retry_after_seconds=0.01, most=60, seed=seed
    )
    storage = FaultyStorage(memory(), policy)

    report = pull(storage, tmp_path, environ={"MX_RETRY_ATTEMPTS": "20"})

    assert FILES == files_in(tmp_path)
    assert storage.injected.total() > 3
    assert report.retries > 0


def test_an_object_that_changes_fails_the_pull(tmp_path: Path) -> None:
    """No file with bytes of two versions, none of the new one under the old one's version."""
    storage = FaultyStorage(memory(), FaultPolicy(first=[None] * 6 + ["changed"]))

    with pytest.raises(mx.SourceChangedError):
        pull(storage, tmp_path)

    assert files_in(tmp_path).items() <= FILES.items()


# -- the directory ----------------------------------------------------------------------------------------------------

HOSTILE = [
    "../escape",
    "a/../../escape",
    "a/./b",
    "..",
    "/absolute",
    "a//b",
    "a/",
    "a\0b",
    "a\nb",
    "a\x1b[2Jb",
    "a" * 256,
    "half\ud800",
]


class Listing(Watched):
    """Lists the given names."""

    def __init__(self, *names: str) -> None:
        super().__init__(memory())
        self.names = names

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (ObjectInfo(f"model/{name}", 1, "1") for name in self.names)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_no_file_below_can_have_are_refused(name: str, tmp_path: Path) -> None:
    """Before anything is written, and though all others are right."""
    storage = Listing("fine.json", name)

    with pytest.raises(mx.CheckpointError, match="cannot be copied into a directory"):
        pull(storage, tmp_path / "out")

    assert [] == list(tmp_path.iterdir())
    assert [] == storage.reads


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a", "a/b"), "would be a file, and the directory of 'a/b'"),
        (("A", "a/b"), "would be a file"),
        (("a/b/c", "a/b"), "would be a file"),
        (("Model.json", "model.json"), "differ only in case"),
    ],
)
def test_names_that_cannot_both_be_there_are_refused(names: tuple[str, str], words: str, tmp_path: Path) -> None:
    """File and directory of one name, and names that differ only in case."""
    with pytest.raises(mx.CheckpointError, match=words):
        pull(Listing(*names), tmp_path / "out")

    assert [] == list(tmp_path.iterdir())


@given(st.lists(st.text(st.sampled_from("aA./\0\ud800é"), max_size=6), max_size=4))
def test_names_that_are_not_refused_stay_below(names: list[str]) -> None:
    """For all names: each accepted one leads to a separate path below the directory."""
    try:
        check_names(names, mx.ModelURI.parse("test://host/model"))
    except mx.CheckpointError:
        return

    targets = [os.path.normpath(HiddenDirectory("/base").target(name)) for name in names]
    assert all(
        target.startswith("/base/") and len(target) == len(f"/base/{name}")
        for target, name in zip(targets, names, strict=True)
    )
    assert len({target.casefold() for target in targets}) == len(names)


def test_what_is_listed_elsewhere_is_the_plugins_fault(tmp_path: Path) -> None:
    """Objects that are not below the URI never get a name by chance."""

    class Elsewhere(Listing):
        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            yield ObjectInfo("other/config.json", 1, "1")

    with pytest.raises(mx.BackendError, match=r"other/config\.json"):
        pull(Elsewhere(), tmp_path / "out")


@pytest.mark.parametrize("there", ["directory", "file", "pipe"])
def test_what_is_in_the_way_is_named_before_anything_is_written(there: str, tmp_path: Path) -> None:
    """A directory where a file goes, a file where a directory does, a pipe."""
    out = tmp_path / "out"
    (out / "config.json").mkdir(parents=True) if there == "directory" else out.mkdir()
    if there == "file":
        (out / "onnx").write_bytes(b"")
    if there == "pipe":
        os.mkfifo(out / "config.json")
    storage = Watched(memory())

    with pytest.raises(mx.ModelExpressError, match="is there, and is"):
        pull(storage, out)

    assert [] == storage.reads
    assert not (out / ".mx-pull").exists()


@pytest.mark.parametrize("directory", ["", "s3://bucket/model", "a\0b"])
def test_what_is_no_directory_is_refused(directory: str) -> None:
    """A URI instead of the directory means arguments in the wrong order."""
    with pytest.raises(mx.ModelExpressError, match="no directory"):
        mx.pull("test://host/model", directory, plugins=plugins_for(memory()), environ=ENVIRON)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    """The message names it."""
    (tmp_path / "out").write_bytes(b"mine")

    with pytest.raises(mx.ModelExpressError, match="out is there, and is no directory"):
        pull(memory(), tmp_path / "out")

    assert b"mine" == (tmp_path / "out").read_bytes()


@pytest.mark.parametrize("where", [".", "below", "link"])
def test_a_directory_is_not_copied_into_itself(where: str, tmp_path: Path) -> None:
    """Nor below itself, by whatever path."""
    source = write_files(tmp_path / "source", FILES)
    (tmp_path / "link").symlink_to(source)

    with pytest.raises(mx.ModelExpressError, match="the directory to copy"):
        mx.pull(source, tmp_path / "link" if where == "link" else source / where, environ=ENVIRON)

    assert FILES == files_in(source)


def test_a_second_pull_at_once_is_refused(tmp_path: Path) -> None:
    """With who holds the directory; when the first has ended, another may begin."""
    refused: list[str] = []
    inner = memory()

    def second(path: str, offset: int, length: int) -> None:
        if not refused:
            with pytest.raises(mx.ModelExpressError) as caught:
                pull(inner, tmp_path)
            refused.append(str(caught.value))

    pull(Watched(inner, before_read=second), tmp_path, environ={"MX_CONCURRENCY": "1"})

    assert f"another pull into {tmp_path} is under way: process {os.getpid()}" in refused[0]
    assert len(FILES) == pull(inner, tmp_path).files


def mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for less than all files."""
    yield from mounted(tmp_path / "small", f"size={TOTAL // CHUNK * CHUNK - 2 * CHUNK}")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that even root cannot write to."""
    yield from mounted(tmp_path / "read-only", "ro")


def test_a_disk_that_is_too_small_is_seen_before_anything_is_read(small_disk: Path) -> None:
    """With both figures, and without using it up."""
    storage = Watched(memory())

    with pytest.raises(mx.ModelExpressError, match=r"have to be written .* but only .* are free") as caught:
        pull(storage, small_disk)

    assert "free space" in str(caught.value)
    assert [] == storage.reads
    assert [] == left_behind(small_disk)


def test_a_disk_that_misreports_its_space_fails_before_anything_is_read(small_disk: Path) -> None:
    """Space is taken, not only asked for; what was taken is given back."""
    storage = Watched(memory())

    with pytest.raises(mx.ModelExpressError, match="ENOSPC"):
        pull(storage, small_disk, disk=Disk(check_space=lambda directory, needed: None))

    assert [] == storage.reads
    assert [] == left_behind(small_disk)


def test_a_disk_that_fills_up_meanwhile_fails_the_pull_and_the_next_goes_on(small_disk: Path) -> None:
    """Where space cannot be taken beforehand, the error comes with the write, and what is there is kept."""
    disk = Disk(check_space=lambda directory, needed: None, allocate=os.ftruncate)

    with pytest.raises(mx.ModelExpressError, match=r"could not write .*ENOSPC"):
        pull(memory(), small_disk, environ={"MX_CONCURRENCY": "1"}, disk=disk)
    kept = journaled(small_disk) + sum(map(len, files_in(small_disk).values()))
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)

    storage = memory()
    assert kept > 5 * CHUNK
    assert len(FILES) == pull(storage, small_disk).files
    assert FILES == files_in(small_disk)


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_an_error_that_says_so(tmp_path: Path) -> None:
    """As from ulimit -f."""
    source = write_files(tmp_path / "source", FILES)
    program = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({5 * CHUNK}, {5 * CHUNK}))\n"
        "sys.argv = ['mx', 'pull', *sys.argv[1:]]\n"
        "from modelexpress_core.cli import main\nmain()"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "out")],
        env={**os.environ, **ENVIRON},
        capture_output=True,
        text=True,
        check=False,
    )

    assert 1 == done.returncode
    assert "EFBIG" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_directory_that_cannot_be_written_to_is_an_error(read_only_disk: Path) -> None:
    """It is named, with what to do, and nothing is read; whether it is there or would have to be made."""
    storage = Watched(memory())

    for directory in (read_only_disk, read_only_disk / "new" / "deep"):
        with pytest.raises(mx.ModelExpressError, match=str(read_only_disk)) as caught:
            pull(storage, directory)
        assert caught.value.hint
    assert [] == storage.reads


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_rights_is_an_error(tmp_path: Path) -> None:
    """It is named, with what to do, and nothing is read."""
    tmp_path.chmod(0o555)
    storage = Watched(memory())

    with pytest.raises(mx.ModelExpressError, match=str(tmp_path)):
        pull(storage, tmp_path)

    assert [] == storage.reads


def test_directories_on_several_disks_are_refused(small_disk: Path, tmp_path: Path) -> None:
    """Renaming does not lead from one to another; said before anything is read."""
    out = tmp_path
    storage = Watched(memory({"config.json": b"{}", f"{small_disk.name}/model.onnx": b"1"}))

    with pytest.raises(mx.ModelExpressError, match="several disks"):
        pull(storage, out)

    assert [] == storage.reads


def test_a_failed_sync_leaves_nothing_that_would_be_trusted(tmp_path: Path) -> None:
    """It is unknown which bytes are on disk then: the file is fetched again. (fsync is made to fail.)"""

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(mx.ModelExpressError, match="EIO"):
        pull(memory({FIRST: FILES[FIRST]}), tmp_path, disk=Disk(fsync=failing))

    report = pull(memory({FIRST: FILES[FIRST]}), tmp_path)

    assert (0, len(FILES[FIRST])) == (report.bytes_resumed, report.bytes_copied)


def test_no_file_stays_open(tmp_path: Path) -> None:
    """Neither after a pull nor after one that failed."""
    pull(memory(), tmp_path / "warm-up")
    before = sorted(os.listdir("/proc/self/fd"))

    pull(memory(), tmp_path / "a")
    with pytest.raises(mx.AccessDeniedError):
        pull(Watched(memory(), before_read=stop_after(8)), tmp_path / "b")

    assert before == sorted(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_many_files_need_few_descriptors(tmp_path: Path) -> None:
    """More files than a process may open."""
    import resource

    files = {f"{number:04d}.json": bytes([number % 256]) * 3 for number in range(600)}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        pull(memory(files), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert files == files_in(tmp_path)


@pytest.mark.slow
def test_a_pull_needs_no_torch(tmp_path: Path) -> None:
    """A machine that only copies has none."""
    source = write_files(tmp_path / "source", FILES)
    program = (
        "import sys, modelexpress_core as mx\nmx.pull(sys.argv[1], sys.argv[2])\nassert 'torch' not in sys.modules"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )

    assert (0, "") == (done.returncode, done.stderr)
