"""Pulls into a directory to which an attacker can write: nothing outside it is written, truncated or given a mode."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modelexpress_core as mx
from modelexpress_core.copying.directories import Directory
from modelexpress_core.copying.hidden_directory import HiddenDirectory
from modelexpress_core.copying.local import boot_id
from modelexpress_core.copying.partial import Identity, Partial
from modelexpress_core.storage.file import FileStorage
from tests.support.checkpoints import pattern, write_files
from tests.support.properties import examples

CHUNK = 4096
ENVIRON = {"MX_CHUNK_BYTES": str(CHUNK)}
WEIGHTS = "weights/model.safetensors"
FILES = {"config.json": b"{}", WEIGHTS: pattern(20 * CHUNK, 1)}

#: Looked for once, since that takes longer than a pull.
PLUGINS = mx.PluginManager.discover({})

#: What the attacker wants to have changed. It is as long as the weights, so that a pull may take it for them.
VALUABLE = bytes(20 * CHUNK)

_T = TypeVar("_T")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_files(tmp_path / "source", FILES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory of the user who pulls, which is not the target."""
    directory = tmp_path / "outside"
    directory.mkdir(mode=0o755)
    (directory / "valuable").write_bytes(VALUABLE)
    (directory / "valuable").chmod(0o640)
    return directory


def state(directory: Path) -> dict[str, object]:
    """Names, modes and contents in ``directory``, and its own mode."""
    found: dict[str, object] = {".": stat.S_IMODE(directory.stat().st_mode)}
    for path in sorted(directory.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        found[str(path.relative_to(directory))] = (mode, path.read_bytes() if path.is_file() else None)
    return found


def files_in(directory: Path) -> dict[str, bytes]:
    """Regular files at their names, without the hidden directory."""
    return {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}


def soon(function: Callable[[], _T], seconds: float = 60.0) -> _T | mx.ModelExpressError:
    """What ``function`` returns, or the error of ours that it raises; fails if it hangs or raises another error."""
    results: list[_T | BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as exc:  # noqa: BLE001 - raised below
            results.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "the pull hangs"
    (result,) = results
    if isinstance(result, BaseException) and not isinstance(result, mx.ModelExpressError):
        raise result
    return result  # type: ignore[return-value]


def pull(source: Path, out: Path) -> mx.PullReport | mx.ModelExpressError:
    return soon(lambda: mx.pull(source, out, environ=ENVIRON, plugins=PLUGINS))


def journal_line(text: str) -> bytes:
    content = text.encode()
    return b"%08x %s\n" % (zlib.crc32(content), content)


def begun_pull(source: Path, out: Path) -> None:
    """Leave unfinished weights in ``out``, with the journal of their first chunk."""
    (out / ".mx-pull").mkdir(parents=True)
    info = FileStorage().stat(str(source / WEIGHTS))
    root = str(mx.ModelURI.parse(source))
    identity = {"name": WEIGHTS, "root": root, "size": info.size, "version": info.version}
    text = json.dumps(identity, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    content = FILES[WEIGHTS][:CHUNK] + bytes(info.size - CHUNK)
    (out / ".mx-pull" / f"{key}.part").write_bytes(content)
    lines = (f"file {text}", f"boot {boot_id()}", f"have 0 {CHUNK}")
    (out / ".mx-pull" / f"{key}.journal").write_bytes(b"".join(map(journal_line, lines)))


def test_the_unfinished_weights_of_these_tests_are_those_of_a_pull(source: Path, out: Path) -> None:
    """Otherwise the tests below would attack nothing."""
    begun_pull(source, out)

    report = pull(source, out)

    assert isinstance(report, mx.PullReport)
    assert CHUNK == report.bytes_resumed


def name_of(file: str, out: Path) -> Path:
    """The path of a file of the hidden directory; ``*`` stands for the key of the unfinished weights."""
    (path,) = list(out.rglob(file)) or [out / ".mx-pull" / file]
    return path


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "valuable")


def link_to_nothing(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "new")


def hard_link(path: Path, outside: Path) -> None:
    path.hardlink_to(outside / "valuable")


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def directory(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "file").touch()


def device(path: Path, outside: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero, which has no end
    except PermissionError:
        pytest.skip("only root can make devices")


def of_another_user(path: Path, outside: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files to another user")
    path.write_bytes(b"")
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize("plant", [link, link_to_nothing, hard_link, pipe, directory, device, of_another_user])
@pytest.mark.parametrize("file", ["lock", "manifest", "manifest.new", "*.part", "*.journal"])
def test_files_that_an_attacker_planted_lead_nowhere(
    plant: Callable[[Path, Path], None], file: str, source: Path, out: Path, outside: Path
) -> None:
    """The pull does without them, or ends with an error that names them; it neither hangs nor follows them."""
    begun_pull(source, out)
    path = name_of(file, out)
    path.unlink(missing_ok=True)
    plant(path, outside)
    before = state(outside)

    result = pull(source, out)

    assert before == state(outside)
    if isinstance(result, mx.ModelExpressError):
        assert path.name in str(result)
        assert result.hint
        assert "lock" == file or plant is directory
    else:
        assert FILES == files_in(out)
        assert stat.S_ISREG((out / ".mx-pull" / "manifest").lstat().st_mode)


@pytest.mark.parametrize("place", [".mx-pull", "weights"])
@pytest.mark.parametrize("target", ["outside", "outside/new", "inside"])
def test_links_in_place_of_directories_are_refused(
    place: str, target: str, source: Path, out: Path, outside: Path
) -> None:
    """Also a link within the target, which could be changed to lead elsewhere."""
    (out / "inside").mkdir()
    (out / place).symlink_to(out / "inside" if target == "inside" else outside.parent / target)
    before = state(outside)

    result = pull(source, out)

    assert before == state(outside)
    assert isinstance(result, mx.ModelExpressError)
    assert str(out / place) in str(result)
    assert [] == list((out / "inside").iterdir())


def test_a_link_to_the_target_itself_is_followed(source: Path, out: Path, tmp_path: Path) -> None:
    """The user gave it."""
    (tmp_path / "link").symlink_to(out)

    pull(source, tmp_path / "link")

    assert FILES == files_in(out)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o755, 0o700])
def test_nobody_else_may_write_to_the_hidden_directory(mode: int, source: Path, out: Path) -> None:
    """One that others may write to, from an earlier version or a wide umask, is closed to them."""
    (out / ".mx-pull").mkdir()
    (out / ".mx-pull").chmod(mode)

    pull(source, out)

    assert 0 == (out / ".mx-pull").stat().st_mode & 0o022
    assert FILES == files_in(out)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories to another user")
def test_the_hidden_directory_of_another_user_is_refused(source: Path, out: Path) -> None:
    """Root does not use it either: its owner could change what is in it during the pull."""
    (out / ".mx-pull").mkdir()
    os.chown(out / ".mx-pull", 12345, 12345)

    result = pull(source, out)

    assert isinstance(result, mx.ModelExpressError)
    assert "belongs to user 12345" in str(result)
    assert [] == os.listdir(out / ".mx-pull")
    assert [".mx-pull"] == os.listdir(out)


@contextmanager
def swapping(path: Path, other: Path) -> Iterator[None]:
    """Exchange ``path`` and ``other`` again and again, as fast as it goes."""
    done = threading.Event()
    aside = path.with_name("aside")

    def swap() -> None:
        while not done.is_set():
            for old, new in ((path, aside), (other, path), (path, other), (aside, path)):
                try:
                    old.rename(new)
                except OSError:
                    done.wait(0.0001)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("place", [".mx-pull", "weights"])
def test_an_attacker_who_swaps_directories_and_links_gains_nothing(
    place: str, source: Path, out: Path, outside: Path
) -> None:
    """Whatever moment he hits, files come to the target or to where its own directories were moved."""
    (out / "trap").symlink_to(outside)
    (out / place).mkdir(mode=0o700)
    before = state(outside)
    whole = 0

    with swapping(out / place, out / "trap"):
        for _ in range(30):
            whole += isinstance(pull(source, out), mx.PullReport)
            (out / "config.json").unlink(missing_ok=True)

    assert before == state(outside)
    assert isinstance(pull(source, out), (mx.PullReport, mx.ModelExpressError))


# -- contents ----------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*FILES, "", "/etc/passwd", "../outside/valuable", "a/../b", "a\0b", "\ud800", "x" * 300])
ENTRY = st.fixed_dictionaries(
    {
        "name": NAMES | VALUES,
        "root": st.text(max_size=5) | VALUES,
        "version": st.none() | st.text(max_size=5) | VALUES,
        "size": st.integers() | VALUES,
        "mtime_ns": st.integers() | VALUES,
        "digest": st.tuples(st.text(max_size=5), st.text(max_size=5)) | VALUES,
    },
    optional={"more": VALUES},
)
LINE = (ENTRY | VALUES).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60)
MANIFEST = st.lists(LINE, max_size=6).map(b"\n".join) | st.binary(max_size=300)


@settings(max_examples=examples(1000))
@given(content=MANIFEST)
def test_a_manifest_may_have_any_content(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Lines that are none of a manifest are ignored; the next pull reads what this one writes."""
    out = tmp_path_factory.mktemp("manifest")
    (out / ".mx-pull").mkdir()
    (out / ".mx-pull" / "manifest").write_bytes(content)
    (out / "config.json").write_bytes(b"{}")
    identity = Identity("file:///source", "config.json", "1", 2)

    with HiddenDirectory(str(out)) as hidden:
        hidden.unchanged(identity)
        hidden.discard_superseded([], [], root="", everything=True)
        hidden.record(identity, (out / "config.json").stat().st_mtime_ns, None)
        hidden.tidy()
    with HiddenDirectory(str(out)) as hidden:
        assert hidden.unchanged(identity) is not None


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[" * 100_000, id="nested deeply"),
        pytest.param(b'{"name":' * 100_000, id="nested objects"),
        pytest.param(b"1" * 100_000, id="a long number"),
        pytest.param(b'{"name": [], "root": {}}\n' * 1000, id="names that are no text"),
        pytest.param(b'"text"\n5\nnull\ntrue\n[1]\n', id="no objects"),
        pytest.param(b"\n" * 10_000_000, id="empty lines"),
        pytest.param(b'{"name": "config.json", "size": 2}', id="fields that are missing"),
    ],
)
def test_manifests_that_were_made_to_crash_a_reader(content: bytes, source: Path, out: Path) -> None:
    """The files are copied, and the next pull finds them."""
    (out / ".mx-pull").mkdir()
    (out / ".mx-pull" / "manifest").write_bytes(content)

    first, second = pull(source, out), pull(source, out)

    assert isinstance(first, mx.PullReport)
    assert isinstance(second, mx.PullReport)
    assert len(FILES) == sum(file.status == "skipped" for file in second.file_list)


def test_a_manifest_without_an_end_fills_no_memory(source: Path, out: Path) -> None:
    """A sparse file of a terabyte."""
    (out / ".mx-pull").mkdir()
    (out / ".mx-pull" / "manifest").touch()
    os.truncate(out / ".mx-pull" / "manifest", 1 << 40)

    assert isinstance(pull(source, out), mx.PullReport)
    assert (out / ".mx-pull" / "manifest").stat().st_size < 10_000


WORDS = st.sampled_from(
    ["have", "sync", "boot", "file", "", "have 1", "sync x", "boot ", "have -1 5", "have 0 9e9", f"have {CHUNK} 5"]
)
JOURNAL_LINE = st.tuples(WORDS, st.text(max_size=10)).map(" ".join)


@settings(max_examples=examples(1000))
@given(lines=st.lists(JOURNAL_LINE, max_size=5), end=st.binary(max_size=20))
def test_a_journal_may_have_any_content(tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: bytes) -> None:
    """Also lines with a right checksum: what it lists of the file counts, or nothing."""
    out = tmp_path_factory.mktemp("journal")
    identity = Identity("file:///source", WEIGHTS, "1", 2 * CHUNK)
    with Directory.at(str(out)) as directory:
        partial = Partial(directory, identity)
        partial.reserve()
        partial.write(memoryview(FILES[WEIGHTS])[:CHUNK], 0)
        partial.close()
        with name_of("*.journal", out).open("ab") as file:
            for line in lines:
                file.write(journal_line(line.replace("\n", " ").encode("utf-8", "replace").decode()))
            file.write(end)
        resumed = Partial(directory, identity)

        resumed.resume()
        resumed.reserve()

        assert resumed.present_bytes in {0, CHUNK, CHUNK + 5}
