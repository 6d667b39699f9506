"""The model cache: each version is downloaded once, is whole or absent, and stays within limits."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest

from devtools.fake_hub import FakeHub, HubAnswer, HubRequest
from devtools.models import generate_sharded
from modelexpress_core.checkpoint.manifest import chunk_digest
from modelexpress_core.copying.puller import Pull
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    IntegrityError,
    InvalidURIError,
    ModelExpressError,
    NotFoundError,
    SourceChangedError,
)
from modelexpress_core.server.cache import ModelCache, Snapshot
from modelexpress_core.server.cache import cache as cache_module
from modelexpress_core.server.cache.chunk_tables import chunks_of
from modelexpress_core.server.cache.places import Sources
from modelexpress_core.server.settings import CacheSettings
from tests.support.waiting import eventually

_SECONDS = 60.0

SETTINGS = CacheSettings(sources=("file", "hf"), min_free_bytes=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with configuration."""
    directory = generate_sharded(tmp_path_factory.mktemp("source") / "model", shards=2, layers=1, hidden=256)
    (directory / "config.json").write_text('{"hidden": 256}')
    (directory / "empty.txt").write_text("")
    return directory


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., ModelCache]]:
    """Opens caches in one directory, one after another."""
    caches: list[ModelCache] = []

    def opened(settings: CacheSettings = SETTINGS, **variables: str) -> ModelCache:
        for cache in caches:
            cache.close()
        caches.append(ModelCache(tmp_path / "cache", settings=settings, environ=variables))
        return caches[-1]

    yield opened
    for cache in caches:
        cache.close()


def complete(cache: ModelCache, place: str, **options: object) -> Snapshot:
    snapshot = cache.begin(place, **options)  # type: ignore[arg-type]
    assert snapshot.wait(_SECONDS)
    return snapshot


def contents(snapshot: Snapshot) -> dict[str, bytes]:
    """Each file, as a reader gets it."""
    found = {}
    for path in snapshot.files:
        with snapshot.open(path) as reader:
            assert reader.wait(0, reader.size, _SECONDS)
            found[path] = os.pread(reader.descriptor, reader.size + 1, 0)
    return found


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


# -- downloading -------------------------------------------------------------------------------------------------------


def test_a_model_is_downloaded_once(opened: Callable[..., ModelCache], model: Path) -> None:
    """It is the same for a later cache on the directory, which asks its storage for the version alone."""
    cache = opened()
    first = complete(cache, f"file{model}")
    again = cache.begin(f"file{model}")

    assert files_of(model) == contents(first) == contents(again)
    assert (1, 1, first.size_bytes) == (cache.stats().misses, cache.stats().hits, cache.stats().origin_bytes)
    assert first.directory is not None
    assert files_of(model) == files_of(Path(first.directory))
    later = opened()
    assert later.begin(f"file{model}").complete
    assert 0 == later.stats().origin_bytes


def test_many_who_ask_at_once_share_a_download(opened: Callable[..., ModelCache], model: Path) -> None:
    """Sixteen threads; one download."""
    cache = opened()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: complete(cache, f"file{model}"), range(16)))

    assert 1 == len({snapshot.version for snapshot in found})
    assert found[0].size_bytes == cache.stats().origin_bytes


def test_the_manifest_has_the_digest_of_each_chunk(opened: Callable[..., ModelCache], model: Path) -> None:
    """Of all files, read from the tables on disk."""
    snapshot = complete(opened(), f"file{model}")

    manifest, tables = snapshot.manifest()

    assert sorted(files_of(model)) == [file.path for file in manifest.files]
    for file in manifest.files:
        content = memoryview((model / file.path).read_bytes())
        with snapshot.open(file.path) as reader:
            chunks, header_bytes = chunks_of(reader.descriptor, file.path, reader.size)
        assert (file.chunks, file.header_bytes, file.size) == (chunks.count, header_bytes, len(content))
        for table, width in {"crc64nvme": 8, "blake3": 32}.items():
            rows = Path(tables[table]).read_bytes()[file.first * width : (file.first + file.chunks) * width]
            assert rows == b"".join(chunk_digest(table, content[start:end]) for start, end in chunks)
    assert any(file.header_bytes and file.chunks > 2 for file in manifest.files)


def test_without_weights_and_then_with_them(opened: Callable[..., ModelCache], model: Path) -> None:
    """Two versions on disk, that share the files which both have; the one with weights serves both."""
    cache = opened()
    light = complete(cache, f"file{model}", weights=False)
    whole = complete(cache, f"file{model}")

    assert {"config.json", "empty.txt", "model.safetensors.index.json"} == set(light.files)
    assert whole.size_bytes == cache.size_bytes()
    assert 2 == len(cache.snapshots())
    cache.remove(light)
    assert cache.begin(f"file{model}", weights=False).complete
    assert files_of(model) == contents(whole)


def test_a_changed_model_is_another_version(opened: Callable[..., ModelCache], model: Path, tmp_path: Path) -> None:
    """The old one stays readable; who has pinned it and comes too late is told."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("one")
    cache = opened()
    old = complete(cache, f"file{source}")
    (source / "config.json").write_text("another")
    cache._resolved.clear()

    new = complete(cache, f"file{source}")

    assert old.version != new.version
    assert ({"config.json": b"one"}, {"config.json": b"another"}) == (contents(old), contents(new))
    assert old.version == cache.begin(f"file{source}", version=old.version).version
    cache.remove(old)
    cache._resolved.clear()
    with pytest.raises(SourceChangedError, match="is not in the cache any more"):
        cache.begin(f"file{source}", version=old.version)


def test_versions_share_the_files_that_both_have(opened: Callable[..., ModelCache]) -> None:
    """A file that did not change between two commits: the older version stays readable, and so does the newer one."""
    with FakeHub() as hub:
        hub.put("org/model", "config.json", b"{}")
        hub.put("org/model", "weights.bin", b"one" * 5000)
        cache = opened(**hub.environ())
        old = complete(cache, "org/model")
        hub.put("org/model", "weights.bin", b"two" * 5000)
        cache._resolved.clear()
        new = complete(cache, "org/model")

    assert {"config.json": b"{}", "weights.bin": b"one" * 5000} == contents(old)
    assert {"config.json": b"{}", "weights.bin": b"two" * 5000} == contents(new)
    cache.remove(old)
    assert {"config.json": b"{}", "weights.bin": b"two" * 5000} == contents(new)


def test_a_version_without_weights_is_removed_from_beside_one_with_them(opened: Callable[..., ModelCache]) -> None:
    """In the Hub's layout both have the same directory: the names that the other one has stay."""
    with FakeHub() as hub:
        files = {"config.json": b"{}", "weights.bin": b"one" * 5000}
        for path, content in files.items():
            hub.put("org/model", path, content)
        cache = opened(**hub.environ())
        light = complete(cache, "org/model", weights=False)
        whole = complete(cache, "org/model")

    assert 0 == cache.remove(light)
    assert whole.directory is not None
    assert files == contents(whole) == files_of(Path(whole.directory))
    assert sum(len(content) for content in files.values()) == cache.remove(whole)
    assert [".mx"] == os.listdir(cache.directory), "nothing is left of the model"


def test_an_old_version_that_is_asked_for_moves_no_branch(opened: Callable[..., ModelCache]) -> None:
    """The branch still has the version that it had, for us without a network and for the Hub's tools."""
    with FakeHub() as hub:
        hub.put("org/model", "config.json", b"{}")
        cache = opened(**hub.environ())
        old = complete(cache, "org/model").version
        hub.put("org/model", "config.json", b"[]")
        cache._resolved.clear()
        new = complete(cache, "org/model").version
        [first] = [each for each, _ in cache.snapshots() if each.version == old]
        cache.remove(first)

        assert old == complete(cache, "org/model", version=old).version

    cache._resolved.clear()
    found = cache.find("org/model")
    assert found is not None
    assert new == found.version
    assert new == Path(cache.directory, "models--org--model", "refs", "main").read_text()


@pytest.mark.parametrize("revision", ["../../../outside", "/etc/outside", "a//b", "a\nb", "a" * 300, "refs/../x"])
def test_what_is_no_revision(opened: Callable[..., ModelCache], revision: str) -> None:
    """It would be the name of a file; nothing is asked or written."""
    with pytest.raises(InvalidURIError, match="is no revision"):
        opened().begin("org/model", revision=revision)


def test_who_waits_for_a_storage_that_fails_asks_it_no_second_time(opened: Callable[..., ModelCache]) -> None:
    """Eight callers wait for one answer, which is an error; a later one asks again. Nothing is remembered of names."""
    asked = threading.Event()
    with FakeHub() as hub:

        def refused(request: HubRequest) -> HubAnswer | None:
            assert asked.wait(_SECONDS)
            return 404, {"X-Error-Code": "RepoNotFound"}, b""

        hub.before = refused
        cache = opened(**hub.environ())

        def ask() -> str:
            with pytest.raises(NotFoundError) as raised:
                cache.begin("org/model")
            return str(raised.value)

        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask) for _ in range(8)]
            eventually(lambda: [8] == [each.callers for each in cache._questions.values()])
            asked.set()
            assert 1 == len({answer.result() for answer in answers})
        requests = len(hub.requests)
        ask()

        assert 2 * requests == len(hub.requests)
        assert ({}, {}) == (cache._questions, cache._resolved)


def test_a_source_that_cannot_be_reached_has_its_latest_version(
    opened: Callable[..., ModelCache], caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning; another model of it fails."""
    with FakeHub() as hub:
        hub.put("org/model", "config.json", b"{}")
        environ = {**hub.environ(), "MX_RETRY_BUDGET_SECONDS": "0.1"}
        cache = opened(**environ)
        version = complete(cache, "org/model").version
    cache._resolved.clear()

    assert version == cache.begin("org/model").version
    assert "cannot be asked for its version" in caplog.text
    with pytest.raises(BackendError):
        cache.begin("org/other")


def test_a_failed_download_is_not_begun_again_at_once(opened: Callable[..., ModelCache], model: Path) -> None:
    """Whoever waits gets the error; after a pause, the next one begins where it ended."""
    cache = opened()

    def full(descriptor: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    working = cache._disk
    cache._disk = attrs.evolve(working, allocate=full)
    snapshot = cache.begin(f"file{model}")
    with pytest.raises(ModelExpressError, match="the disk is full"):
        snapshot.wait(_SECONDS)
    eventually(lambda: not cache.stats().downloads)
    cache._disk = working
    with pytest.raises(ModelExpressError, match="the disk is full"):
        cache.begin(f"file{model}")
    [failure] = cache._failures.values()
    failure.until = 0

    assert files_of(model) == contents(complete(cache, f"file{model}"))


# -- reading while it arrives ------------------------------------------------------------------------------------------


def test_bytes_can_be_read_before_the_download_ends(opened: Callable[..., ModelCache]) -> None:
    """The stand-in for the Hub holds the second half back until the first was read."""
    content = os.urandom(24 << 20)
    with FakeHub() as hub:
        hub.put("org/model", "model.bin", content)
        held = threading.Event()
        release = threading.Event()

        def hold(request: HubRequest) -> HubAnswer | None:
            ends = re.search(r"bytes=\d+-(\d+)", request.headers.get("range", ""))
            if ends and int(ends[1]) > len(content) // 2:
                held.set()
                release.wait(_SECONDS)
            return None

        hub.before = hold
        cache = opened(**hub.environ())
        snapshot = cache.begin("org/model")
        with snapshot.open("model.bin") as reader:
            assert reader.wait(0, 8 << 20, _SECONDS)
            assert held.wait(_SECONDS)
            assert content[: 8 << 20] == os.pread(reader.descriptor, 8 << 20, 0)
            assert not reader.wait(0, reader.size, 0.01)
            assert not snapshot.complete
            assert 0 < snapshot.present_bytes < snapshot.size_bytes
            release.set()
            assert reader.wait(0, reader.size, _SECONDS)
            assert snapshot.wait(_SECONDS)
            assert content == os.pread(reader.descriptor, reader.size, 0), "the descriptor is still that of the file"


def test_a_file_of_a_pull_that_has_just_ended_is_waited_for(
    opened: Callable[..., ModelCache], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory is closed, and how it ended is not known yet."""
    reached, release = threading.Event(), threading.Event()
    run = Pull.run

    def fail(self: Pull) -> Any:
        run(self)
        unfinished: Any = self._unfinished
        unfinished["config.json"] = Unfinished()
        reached.set()
        assert release.wait(_SECONDS)

    class Unfinished:
        """A file whose directory was closed."""

        partial: Any

        def __init__(self) -> None:
            self.partial = self

        def open(self) -> int:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(Pull, "run", fail)
    snapshot = opened().begin(f"file{model}")
    assert reached.wait(_SECONDS)
    assert snapshot.try_open_file("config.json", 0) is None
    release.set()


# -- the directory -----------------------------------------------------------------------------------------------------


def test_a_second_server_is_refused(opened: Callable[..., ModelCache], tmp_path: Path) -> None:
    """With the process that uses the directory."""
    opened()

    with pytest.raises(ModelExpressError, match=f"another server uses the cache.*process {os.getpid()}"):
        ModelCache(tmp_path / "cache", settings=SETTINGS, environ={})


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """The error names it."""
    (tmp_path / "file").write_text("")

    with pytest.raises(ModelExpressError, match="could not make the directory of the cache"):
        ModelCache(tmp_path / "file", settings=SETTINGS, environ={})


@pytest.mark.parametrize("change", ["overwrite", "truncate", "remove"])
def test_a_file_that_was_changed_is_downloaded_again(
    opened: Callable[..., ModelCache], model: Path, change: str
) -> None:
    """Nobody gets its bytes."""
    cache = opened()
    snapshot = complete(cache, f"file{model}")
    [stored] = [each for each in snapshot.record.files if each.file.path == "config.json"]  # type: ignore[union-attr]
    blob = Path(cache.directory, stored.blob)
    if change == "remove":
        blob.unlink()
    else:
        with blob.open("r+b") as file:
            file.truncate(3) if change == "truncate" else file.write(b"wrong")

    with pytest.raises(SourceChangedError, match="since it was verified"), snapshot.open("config.json"):
        pass

    assert files_of(model) == contents(complete(cache, f"file{model}"))
    assert files_of(model) == contents(complete(opened(), f"file{model}"))


def test_a_record_that_cannot_be_read_is_left_out(
    opened: Callable[..., ModelCache], model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is downloaded again."""
    cache = opened()
    snapshot = complete(cache, f"file{model}")
    record = Path(cache.directory, ".mx", "records", f"{snapshot.key}.json")
    record.write_text('{"format": 1, "files": [{"file": {"path": "../../etc/passwd", "size": 1}}]}')

    cache = opened()

    assert "is left out of the cache" in caplog.text
    assert () == tuple(cache.snapshots())
    assert files_of(model) == contents(complete(cache, f"file{model}"))


# -- validating and importing ------------------------------------------------------------------------------------------


def test_validation_finds_flipped_bits(opened: Callable[..., ModelCache], model: Path) -> None:
    """In every file, at its ends and in between, also where the file looks unchanged from outside."""
    cache = opened()
    whole = complete(cache, f"file{model}")
    done: list[int] = []
    assert () == tuple(cache.validate(whole, done.append))
    assert (whole.size_bytes, sorted(done)) == (done[-1], done)

    for path, position in [("config.json", 0), ("model-00001-of-00002.safetensors", -1), ("config.json", 7)]:
        snapshot = complete(cache, f"file{model}")
        [stored] = [each for each in snapshot.record.files if each.file.path == path]  # type: ignore[union-attr]
        blob = Path(cache.directory, stored.blob)
        before = blob.stat()
        content = bytearray(blob.read_bytes())
        content[position] ^= 16
        with blob.open("r+b") as file:
            file.write(content)
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))

        [damage] = cache.validate(snapshot)

        assert path == damage.path
        assert "has other" in damage.reason
        assert not cache.snapshots(), "it is forgotten, so that it is downloaded again"


def test_what_is_right_of_a_damaged_version_is_kept_for_its_download(
    opened: Callable[..., ModelCache], model: Path
) -> None:
    """It counts for the limits meanwhile, and its own storage of files has no others."""
    cache = opened()
    snapshot = complete(cache, f"file{model}")
    assert snapshot.directory is not None
    damaged = Path(snapshot.directory, "config.json").resolve()
    damaged.write_bytes(b"other")

    assert ["config.json"] == [damage.path for damage in cache.validate(snapshot)]

    kept = Path(cache.directory, ".mx", "downloads", snapshot.key)
    expected = files_of(model)
    del expected["config.json"]
    assert expected == files_of(kept)
    assert cache.size_bytes() >= sum(map(len, expected.values()))
    again = complete(cache, f"file{model}")
    assert files_of(model) == contents(again)
    eventually(lambda: not cache.stats().downloads)
    blobs = {each.blob for each in again.record.files}  # type: ignore[union-attr]
    own = Path(cache.directory, ".mx", "files")
    assert {f".mx/files/{path}" for path in files_of(own)} == blobs
    assert not kept.exists()


def test_an_old_snapshot_does_not_drop_the_new_download(opened: Callable[..., ModelCache], model: Path) -> None:
    """Whoever still has the version as it was gets an error; the version that was downloaded since stays."""
    cache = opened()
    old = complete(cache, f"file{model}")
    assert old.directory is not None
    Path(old.directory, "config.json").resolve().write_bytes(b"other")
    for _ in range(2):
        with pytest.raises(SourceChangedError), old.open("config.json"):
            pass
        new = complete(cache, f"file{model}")
        assert files_of(model) == contents(new)

    assert (2, [new.key]) == (cache.stats().misses, [each.key for each, _ in cache.snapshots()])


def test_a_damaged_file_that_versions_share_is_replaced_for_both(opened: Callable[..., ModelCache]) -> None:
    """Both are downloaded again, though the file looks unchanged from outside."""
    with FakeHub() as hub:
        hub.put("org/model", "config.json", b"{}")
        hub.put("org/model", "weights.bin", b"one" * 5000)
        cache = opened(**hub.environ())
        old = complete(cache, "org/model")
        hub.put("org/model", "weights.bin", b"two" * 5000)
        cache._resolved.clear()
        new = complete(cache, "org/model")
        assert new.directory is not None
        blob = Path(new.directory, "config.json").resolve()
        before = blob.stat()
        blob.write_bytes(b"[]")
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))

        assert ["config.json"] == [damage.path for damage in cache.validate(old)]

        assert () == tuple(cache.snapshots())
        for snapshot, weights in ((old, b"one"), (new, b"two")):
            again = complete(cache, "org/model", version=snapshot.version)
            assert {"config.json": b"{}", "weights.bin": weights * 5000} == contents(again)
            assert () == tuple(cache.validate(again))


@pytest.mark.parametrize("named", [True, False])
def test_a_directory_is_imported(opened: Callable[..., ModelCache], model: Path, tmp_path: Path, named: bool) -> None:
    """As if it had been downloaded: no request is sent for its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    directory = model
    if not named:
        directory = tmp_path / "snapshots" / commit
        shutil.copytree(model, directory)
    cache = opened(HF_ENDPOINT="http://127.0.0.1:9")

    snapshot = cache.import_directory(directory, "org/name", revision=commit if named else None)

    assert (commit, True) == (snapshot.version, snapshot.complete)
    assert files_of(model) == contents(snapshot) == contents(cache.begin("org/name", revision=commit))
    assert files_of(model) == files_of(Path(cache.directory, "models--org--name", "snapshots", commit))


def test_an_import_needs_a_commit_of_the_hub(opened: Callable[..., ModelCache], model: Path, tmp_path: Path) -> None:
    """Models of other storages have the version of their content."""
    cache = opened(CacheSettings(sources=("hf", "s3"), min_free_bytes=0))
    with pytest.raises(ModelExpressError, match="unknown which commit of org/name"):
        cache.import_directory(model, "org/name")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelExpressError, match="no file to import"):
        cache.import_directory(tmp_path / "empty", "org/name")
    with pytest.raises(ModelExpressError, match="could not read"):
        cache.import_directory(tmp_path / "nothing", "org/name")

    one = cache.import_directory(model, "s3/bucket/model")
    assert one.version == cache.import_directory(model, "s3/bucket/model").version
    assert files_of(model) == contents(one)
    assert one.version == cache.begin("s3/bucket/model", version=one.version).version


def test_blobs_in_the_store_that_repositories_share_are_read(opened: Callable[..., ModelCache]) -> None:
    """huggingface_hub 2 links ``blobs/ETAG`` to a store of the whole cache. Removal takes the link, not the store."""
    content = os.urandom(50_000)
    etag, xet_hash = hashlib.sha256(content).hexdigest(), "ab" * 32
    with FakeHub() as hub:
        hub.put("org/model", "model.safetensors", content)
        cache = opened(**hub.environ())
        shared = Path(cache.directory, "blobs", xet_hash[:2], xet_hash)
        blob = Path(cache.directory, "models--org--model", "blobs", etag)
        for path in (shared, blob):
            path.parent.mkdir(parents=True)
        shared.write_bytes(content)
        shared.chmod(0o444)
        blob.symlink_to(f"../../blobs/{xet_hash[:2]}/{xet_hash}")

        snapshot = complete(cache, "org/model")

        assert [] == [each.path for each in hub.requests if each.server == "cdn"], "nothing was downloaded"
    assert {"model.safetensors": content} == contents(snapshot)
    assert () == tuple(cache.validate(snapshot))
    assert (True, 1) == (blob.is_symlink(), shared.stat().st_nlink)
    assert 0 == cache.remove(snapshot)
    assert (False, content) == (os.path.lexists(blob), shared.read_bytes())


def test_an_import_uses_what_the_library_noted(opened: Callable[..., ModelCache], tmp_path: Path) -> None:
    """``hf download --local-dir`` notes the commit, and the id of each file; a file that has another one is refused."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = {"config.json": b"{}", "sub/weights.bin": b"weights" * 100}
    ids = {
        "config.json": hashlib.sha1(b"blob 2\0{}").hexdigest(),
        "sub/weights.bin": hashlib.sha256(files["sub/weights.bin"]).hexdigest(),
    }
    directory = tmp_path / "local"
    for path, content in files.items():
        note = directory / ".cache/huggingface/download" / f"{path}.metadata"
        for each in (directory / path, note):
            each.parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
        note.write_text(f"{commit}\n{ids[path]}\n1712656091.123\n")
    cache = opened()

    snapshot = cache.import_directory(directory, "org/name")

    assert (commit, files) == (snapshot.version, contents(snapshot))
    assert {each: f"{commit}/{ids[each]}" for each in files} == {
        path: file.version for path, file in snapshot.files.items()
    }
    cache.remove(snapshot)
    (directory / "config.json").write_bytes(b"[]")
    with pytest.raises(IntegrityError, match=r"'config.json' .* the Hub published"):
        cache.import_directory(directory, "org/name")
    assert () == tuple(cache.snapshots())


@pytest.mark.parametrize("damaged", [False, True])
def test_a_snapshot_of_another_cache_is_imported(
    opened: Callable[..., ModelCache], tmp_path: Path, damaged: bool
) -> None:
    """Its links have the ids of their files, which are compared."""
    content = b"weights" * 100
    commit, sha256 = "0123456789abcdef0123456789abcdef01234567", hashlib.sha256(content).hexdigest()
    directory = tmp_path / "models--org--name" / "snapshots" / commit
    blob = directory.parents[1] / "blobs" / sha256
    for each in (directory, blob.parent):
        each.mkdir(parents=True)
    blob.write_bytes(b"other" if damaged else content)
    (directory / "weights.bin").symlink_to(f"../../blobs/{sha256}")
    cache = opened()

    if damaged:
        with pytest.raises(IntegrityError, match="the Hub published"):
            cache.import_directory(directory, "org/name")
    else:
        snapshot = cache.import_directory(directory, "org/name")
        assert (commit, {"weights.bin": content}) == (snapshot.version, contents(snapshot))


# -- limits ------------------------------------------------------------------------------------------------------------


def _models(tmp_path: Path, count: int) -> list[Path]:
    directories = [tmp_path / f"model-{number}" for number in range(count)]
    for number, directory in enumerate(directories):
        directory.mkdir()
        (directory / "weights.bin").write_bytes(bytes([number]) * 1000)
    return directories


def test_the_limit_of_bytes_holds(
    opened: Callable[..., ModelCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read least recently goes first, and what is being read stays."""
    monkeypatch.setattr(cache_module, "_IN_USE_SECONDS", -1.0)
    cache = opened(attrs.evolve(SETTINGS, max_bytes=3000))
    one, two, three, four = _models(tmp_path, 4)
    first = complete(cache, f"file{one}")
    for directory in (two, three):
        complete(cache, f"file{directory}")
    with cache.hold(first):
        complete(cache, f"file{four}")

    kept = {snapshot.place for snapshot, _ in cache.snapshots()}
    assert {f"file{one}", f"file{three}", f"file{four}"} == kept
    assert (3000, 1) == (cache.size_bytes(), cache.stats().evictions)
    assert {"weights.bin": bytes([0]) * 1000} == contents(first)


def test_a_model_that_does_not_fit_is_refused(
    opened: Callable[..., ModelCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is larger than the limit, or all others are being read."""
    monkeypatch.setattr(cache_module, "_IN_USE_SECONDS", -1.0)
    one, two = _models(tmp_path, 2)
    with pytest.raises(ModelExpressError, match="more than the whole cache may hold"):
        opened(attrs.evolve(SETTINGS, max_bytes=999)).begin(f"file{one}")
    cache = opened(attrs.evolve(SETTINGS, max_bytes=1500))
    with cache.hold(complete(cache, f"file{one}")), pytest.raises(ModelExpressError, match="there is no room"):
        cache.begin(f"file{two}")
    complete(cache, f"file{two}")
    assert [f"file{two}"] == [snapshot.place for snapshot, _ in cache.snapshots()]


def test_what_nobody_reads_goes(
    opened: Callable[..., ModelCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a time, also across restarts."""
    monkeypatch.setattr(cache_module, "_IN_USE_SECONDS", -1.0)
    one, two = _models(tmp_path, 2)
    cache = opened()
    old, _ = complete(cache, f"file{one}"), complete(cache, f"file{two}")
    os.utime(Path(cache.directory, ".mx", "records", f"{old.key}.json"), (0, 0))
    cache = opened(attrs.evolve(SETTINGS, max_idle_seconds=3600.0))

    assert 1 == cache.evict()
    assert [f"file{two}"] == [snapshot.place for snapshot, _ in cache.snapshots()]


def test_a_model_leaves_the_free_space_that_it_has_to(opened: Callable[..., ModelCache], tmp_path: Path) -> None:
    """It is refused before a byte is written."""
    [directory] = _models(tmp_path, 1)
    cache = opened(attrs.evolve(SETTINGS, min_free_bytes=1 << 60))

    with pytest.raises(ModelExpressError, match="MX_CACHE_MIN_FREE_BYTES"):
        cache.begin(f"file{directory}")

    assert () == tuple(cache.snapshots())
    assert not Path(cache.directory, ".mx", "downloads").exists()


def test_downloads_that_ended_early_count_and_go(
    opened: Callable[..., ModelCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First, and before any version that is complete."""
    monkeypatch.setattr(cache_module, "_IN_USE_SECONDS", -1.0)
    one, two = _models(tmp_path, 2)
    cache = opened()
    complete(cache, f"file{one}")
    part = Path(cache.directory, ".mx", "downloads", "0" * 32, ".mx-pull", "part")
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(20_000))
    assert 20_000 + 1000 <= cache.size_bytes()
    assert 0 == cache.evict()
    assert part.exists()

    cache = opened(attrs.evolve(SETTINGS, max_bytes=10_000))
    complete(cache, f"file{two}")

    assert not part.exists()
    assert (2, 0, 2000) == (cache.stats().models, cache.stats().evictions, cache.size_bytes())


def test_what_a_crash_left_is_removed(opened: Callable[..., ModelCache], tmp_path: Path) -> None:
    """Files that no version refers to, at the next start; what versions refer to, and the Hub's files, stay."""
    [one] = _models(tmp_path, 1)
    cache = opened()
    snapshot = complete(cache, f"file{one}")
    own = Path(cache.directory, ".mx")
    left = [own / each for each in ("begun/x/a", "manifests/x/index", "models/x/a", "files/ab/abcd", "records/x.new")]
    theirs = Path(cache.directory, "models--org--name", "blobs", "abcd")
    for path in (*left, theirs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"left")

    cache = opened()

    assert [] == [path for path in left if path.exists()]
    assert b"left" == theirs.read_bytes()
    assert contents(snapshot) == contents(cache.begin(f"file{one}"))
    assert () == tuple(cache.validate(cache.begin(f"file{one}")))


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name", "inside", "uri"),
    [
        ("org/name", "hf/org/name", "", "hf://org/name"),
        ("org/name/sub/a.json", "hf/org/name", "sub/a.json", "hf://org/name"),
        ("hf/s3/name", "hf/s3/name", "", "hf://s3/name"),
        ("s3/bucket", "s3/bucket", "", "s3://bucket"),
        ("s3/bucket/a/b/", "s3/bucket/a/b", "", "s3://bucket/a/b"),
        ("s3/bucket/a/x.safetensors", "s3/bucket/a", "x.safetensors", "s3://bucket/a"),
        ("file/data/models/m", "file/data/models/m", "", "file:///data/models/m"),
        ("az/name", "hf/az/name", "", "hf://az/name"),
    ],
)
def test_what_a_path_names(path: str, name: str, inside: str, uri: str) -> None:
    """A model of the Hub, or SCHEME/rest."""
    place = Sources(("hf", "s3", "file")).place(path)

    assert (name, inside, uri) == (place.name, place.inside, str(place.uri))
    assert place.asked == "/".join(filter(None, (place.root, place.inside)))


@pytest.mark.parametrize(
    "path", ["", "name", "/", "org//name", "org/../name", "./name", "org/na\nme", "org\\name", "a/" + "b" * 4096]
)
def test_what_names_no_model(path: str) -> None:
    """Control characters, ways out, and names without an end."""
    with pytest.raises(InvalidURIError, match="names no model"):
        Sources(("hf", "s3")).place(path)


@pytest.mark.parametrize(
    ("patterns", "path", "allowed"),
    [
        (("hf",), "org/name", True),
        (("hf",), "s3/bucket/name", False),
        (("hf",), "file/etc/passwd", False),
        (("s3://models-*",), "s3/models-a/name", True),
        (("s3://models-*",), "s3/secret/name", False),
        (("s3://models-*",), "org/name", False),
        (("hf://org",), "org/name", True),
        (("hf://org",), "organism/name", False),
        (("file:///data/models",), "file/data/models/a", True),
        (("file:///data/models",), "file/data/models2/a", False),
        (("file:///data/models/",), "file/data/models/a", True),
    ],
)
def test_the_operator_allows_sources(patterns: tuple[str, ...], path: str, allowed: bool) -> None:
    """By scheme, or by the beginning of a URI; the message names the variable."""
    if allowed:
        Sources(patterns).place(path)
    else:
        with pytest.raises(AccessDeniedError, match="does not download from") as caught:
            Sources(patterns).place(path)
        assert "MX_CACHE_SOURCES" in str(caught.value)


def test_the_model_of_the_server_is_allowed(opened: Callable[..., ModelCache], model: Path) -> None:
    """MX_MODEL_URI names it."""
    cache = opened(CacheSettings(min_free_bytes=0), MX_MODEL_URI=f"file://{model}")

    assert complete(cache, f"file{model}").complete
    with pytest.raises(AccessDeniedError):
        cache.begin(f"file{model.parent}/other")


def test_a_model_that_does_not_exist_is_not_found(opened: Callable[..., ModelCache], tmp_path: Path) -> None:
    """The error is that of the storage."""
    with pytest.raises(NotFoundError):
        opened().begin(f"file{tmp_path}/nothing")
