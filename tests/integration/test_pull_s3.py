"""``mx pull`` from a real S3 server: as a person runs it, killed, interrupted, and through a bad network."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import modelexpress_core as mx
from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.plugins import STORAGE
from tests.support.commands import Commands, RunningCommand

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[[str, Path, "dict[str, str]"], RunningCommand]

CHUNK = 256 << 10

_RANGE = re.compile(rb"range: bytes=(\d+)-(\d+)", re.IGNORECASE)
_PATH = re.compile(rb"GET (\S+) ")


class Ranges:
    """A policy that keeps account of the ranges that are asked for, and stalls them from a certain one on."""

    def __init__(self, stall_after: int | None = None) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self._stall_after = stall_after
        self._lock = threading.Lock()

    def __call__(self, number: int, head: bytes) -> Fault | None:
        asked, path = _RANGE.search(head), _PATH.match(head)
        if asked is None or path is None:
            return None
        with self._lock:
            if self._stall_after is not None and len(self.asked) >= self._stall_after:
                return Fault("stall")
            name = path[1].decode().partition("?")[0].rpartition("/")[2]
            self.asked.append((name, int(asked[1]), int(asked[2]) + 1 - int(asked[1])))
        return None

    @property
    def asked_bytes(self) -> int:
        return sum(length for _, _, length in self.asked)


@pytest.fixture
def proxy(s3_server: SeaweedFS) -> Iterator[TcpProxy]:
    """Stands before the S3 server."""
    port = urlsplit(s3_server.endpoint).port
    assert port is not None
    with TcpProxy("127.0.0.1", port) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: TcpProxy, environ: dict[str, str]) -> dict[str, str]:
    """Variables that lead through the proxy, with many small reads."""
    return {
        **environ,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "MX_CHUNK_BYTES": str(CHUNK),
        "MX_CONCURRENCY": "4",
    }


def total_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def assert_same(source: Path, copy: Path) -> None:
    """Names and bytes; what the pull has to remember is not looked at."""
    for path in source.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (copy / path.relative_to(source)).read_bytes(), path
    names = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file() and ".mx-pull" not in path.parts}
    assert {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()} == names


def whole_files(source: Path, copy: Path) -> int:
    """Bytes of the files in place, each of which has to be whole."""
    count = 0
    for path in copy.glob("*"):
        if path.is_file():
            assert (source / path.name).read_bytes() == path.read_bytes(), path
            count += path.stat().st_size
    return count


def journaled(copy: Path) -> int:
    """Bytes of unfinished files, by their journals."""
    count = 0
    for part in (copy / ".mx-pull").glob("*.part"):
        try:
            lines = part.with_suffix(".journal").read_text().splitlines()
        except FileNotFoundError:  # just put in place
            continue
        count += sum(int(line.split()[3]) for line in lines if line[9:].startswith("have "))
    return count


@pytest.fixture
def started(commands: Commands) -> Iterator[Start]:
    """Starts ``mx pull``; no process outlives the test."""
    processes: list[RunningCommand] = []

    def started(uri: str, out: Path, environ: dict[str, str]) -> RunningCommand:
        processes.append(commands.start(["pull", uri, str(out)], {**os.environ, **environ}))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: RunningCommand) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_pull_copies_and_reports(
    mx: Run, uploaded: str, sharded: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    """Bytes are those that were uploaded; again, nothing is read; stdout is JSON alone."""
    first = mx("pull", uploaded, str(tmp_path / "out"), "--json", environ=environ)
    second = mx("pull", uploaded, str(tmp_path / "out"), "--json", environ=environ)

    assert (0, "", 0, "") == (first.returncode, first.stderr, second.returncode, second.stderr)
    copied, skipped = json.loads(first.stdout), json.loads(second.stdout)
    assert_same(sharded, tmp_path / "out")
    assert (uploaded, total_bytes(sharded), 0) == (copied["uri"], copied["bytes_copied"], copied["bytes_skipped"])
    assert (0, total_bytes(sharded)) == (skipped["bytes_copied"], skipped["bytes_skipped"])
    assert ["skipped"] * copied["files"] == [file["status"] for file in skipped["file_list"]]
    assert copied["bytes_per_second"] == pytest.approx(copied["bytes_copied"] / copied["seconds"])


def test_pull_prints_a_report_for_people(
    mx: Run, uploaded: str, sharded: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    """The main figures are named; without a terminal there are no bars."""
    done = mx("pull", uploaded, str(tmp_path / "out"), "--no-weights", environ=environ)

    assert (0, "") == (done.returncode, done.stderr)
    for word in ("1 file", "copied", "left out", "3 weights", "mx-s3", "verified"):
        assert word in done.stdout
    assert ["model.safetensors.index.json"] == [path.name for path in (tmp_path / "out").iterdir() if path.is_file()]


def test_a_copy_loads_as_the_original_does(
    uploaded: str, sharded: Path, environ: dict[str, str], tmp_path: Path, expected: Any, assert_equal: Any
) -> None:
    """What the pull remembers is in nobody's way."""
    mx.pull(uploaded, tmp_path / "out", environ=environ)

    assert_equal(expected(sharded), mx.load_state_dict(tmp_path / "out"))


def test_digests_that_s3_keeps_are_compared(s3_server: SeaweedFS, environ: dict[str, str], tmp_path: Path) -> None:
    """An object that was uploaded with a checksum is verified with it, where the plugin asks for digests."""
    client = s3_server.client()
    content = os.urandom(3 * CHUNK)
    client.put_object(Bucket="models", Key="with-digest/a.bin", Body=content, ChecksumAlgorithm="SHA256")
    client.close()
    capable = mx.PluginManager.discover({}).table(STORAGE).lookup("s3").provider.capabilities.stat_digests

    report = mx.pull("s3://models/with-digest", tmp_path / "out", environ=environ)

    assert content == (tmp_path / "out" / "a.bin").read_bytes()
    assert ({"sha256": 1} if capable else {}) == report.verified_digests


def test_after_kill_9_only_what_is_missing_is_read(
    mx: Run, started: Start, uploaded: str, sharded: Path, proxy: TcpProxy, through: dict[str, str], tmp_path: Path
) -> None:
    """No range that was finished is asked for a second time; no file was there in part."""
    out = tmp_path / "out"
    first = Ranges(stall_after=30)
    proxy.policy = first
    process = started(uploaded, out, through)
    wait_for(lambda: (out / ".mx-pull").exists() and journaled(out) + whole_files(sharded, out) >= 25 * CHUNK, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    kept = journaled(out) + whole_files(sharded, out)
    second = Ranges()
    proxy.policy = second

    done = mx("pull", uploaded, str(out), "--json", environ=through)

    assert -signal.SIGKILL == process.returncode
    assert 0 == done.returncode, done.stderr
    report = json.loads(done.stdout)
    assert_same(sharded, out)
    assert total_bytes(sharded) - kept == report["bytes_copied"] == second.asked_bytes
    assert kept == report["bytes_resumed"] + report["bytes_skipped"]
    assert ["lock", "manifest"] == sorted(os.listdir(out / ".mx-pull"))


def test_ctrl_c_says_that_the_next_run_goes_on(
    mx: Run, started: Start, uploaded: str, sharded: Path, proxy: TcpProxy, through: dict[str, str], tmp_path: Path
) -> None:
    """Exit code 130, no traceback, no file in part; and it does go on."""
    out = tmp_path / "out"
    proxy.policy = Ranges(stall_after=20)
    process = started(uploaded, out, through)
    wait_for(lambda: (out / ".mx-pull").exists() and journaled(out) + whole_files(sharded, out) >= 15 * CHUNK, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    kept = journaled(out) + whole_files(sharded, out)
    proxy.policy = Ranges()

    done = mx("pull", uploaded, str(out), "--json", environ=through)

    assert 130 == process.returncode
    assert "run the same command again to resume" in " ".join(errors.split())
    assert "Traceback" not in errors
    assert total_bytes(sharded) - kept == json.loads(done.stdout)["bytes_copied"]
    assert_same(sharded, out)


def test_the_directory_is_free_again_after_kill_9_and_taken_before(
    mx: Run,
    started: Start,
    uploaded: str,
    proxy: TcpProxy,
    through: dict[str, str],
    environ: dict[str, str],
    tmp_path: Path,
) -> None:
    """A second process is refused with the number of the first."""
    out = tmp_path / "out"
    policy = Ranges(stall_after=5)
    proxy.policy = policy
    process = started(uploaded, out, through)
    wait_for(lambda: len(policy.asked) >= 5, process)

    refused = mx("pull", uploaded, str(out), environ=environ)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    after = mx("pull", uploaded, str(out), environ=environ)

    assert 1 == refused.returncode
    assert f"is under way: process {process.pid}" in " ".join(refused.stderr.split())
    assert 0 == after.returncode, after.stderr


def test_a_bad_network_is_survived(
    uploaded: str, sharded: Path, proxy: TcpProxy, through: dict[str, str], tmp_path: Path
) -> None:
    """Every fifth answer is reset or ends early; all bytes arrive."""

    def policy(number: int, head: bytes) -> Fault | None:
        if number % 5 != 4 or (b"Range" not in head and b"range" not in head):
            return None
        return Fault("reset" if number % 2 else "truncate", after_bytes=CHUNK // 2)

    proxy.policy = policy

    report = mx.pull(uploaded, tmp_path / "out", environ=through)

    assert_same(sharded, tmp_path / "out")
    assert report.retries > 0


def test_an_object_that_is_replaced_meanwhile_fails_the_pull(
    s3_server: SeaweedFS, proxy: TcpProxy, through: dict[str, str], tmp_path: Path
) -> None:
    """If-Match sees it; no mixture appears, and the next pull copies the new version."""
    client = s3_server.client()
    old, new = os.urandom(8 * CHUNK), os.urandom(8 * CHUNK)
    client.put_object(Bucket="models", Key="replaced/a.bin", Body=old)
    replaced = threading.Event()

    def policy(number: int, head: bytes) -> Fault | None:
        if _RANGE.search(head) and not replaced.is_set():
            replaced.set()
            client.put_object(Bucket="models", Key="replaced/a.bin", Body=new)
        return None

    proxy.policy = policy

    with pytest.raises(mx.SourceChangedError):
        mx.pull("s3://models/replaced", tmp_path / "out", environ={**through, "MX_CONCURRENCY": "1"})
    seen = (tmp_path / "out" / "a.bin").exists()
    mx.pull("s3://models/replaced", tmp_path / "out", environ=through)
    client.close()

    assert not seen
    assert new == (tmp_path / "out" / "a.bin").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("pull",), 2, "Missing argument"),
        (("pull", "s3:/bucket/model", "out"), 2, "s3://bucket/model"),
        (("pull", "/no/such/model", "OUT"), 1, "/no/such/model"),
        (("pull", "MODEL", "/proc/new"), 1, "/proc/new"),
        (("pull", "MODEL", "s3://bucket/model"), 1, "first the URI, then a path"),
    ],
)
def test_wrong_input_gives_a_message_and_its_exit_code(
    arguments: tuple[str, ...], code: int, words: str, mx: Run, sharded: Path, tmp_path: Path
) -> None:
    """1 for what failed, 2 for wrong usage; a message on stderr that says what to do; no traceback."""
    places = {"MODEL": str(sharded), "OUT": str(tmp_path / "out")}

    done = mx(*(places.get(argument, argument) for argument in arguments))

    assert code == done.returncode, done.stdout + done.stderr
    assert words in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr


def test_a_terminal_sees_bars(sharded: Path, tmp_path: Path, on_terminal: Callable[..., tuple[int, bytes]]) -> None:
    """One for all files; the report follows."""
    code, seen = on_terminal("pull", str(sharded), str(tmp_path / "out"), MX_CHUNK_BYTES="65536")

    assert 0 == code
    assert b"4 of 4 files" in seen
    assert "━".encode() in seen
    assert b"copied" in seen
