"""Workers that start together: the first one reads storage, the others wait for it and read from it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import save_file

import modelexpress_core as mx
from modelexpress_core.contracts.candidates import LoadRequest
from modelexpress_core.errors import NotFoundError
from modelexpress_core.providers import StorageProvider
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.following import FOLLOW_KEY, Announcement, in_turn, withdraw_announcements
from modelexpress_core.sources.settings import TrustSettings
from modelexpress_core.storage.file import FileStorage
from modelexpress_core.uri import ModelURI
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from tests.support.peers import identity_of, tensors_of
from tests.support.serving import Serving
from tests.support.waiting import eventually

Start = Callable[..., Serving]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("following")]

_MIB = 8
_WORKERS = 8
_LONG = "120"  # seconds: no test waits so long, unless what it tests fails
_FIRST = "no worker that is alive is before this one"


class Counted(FileStorage):
    """Files, whose bytes are counted; ``before_weights`` is called before each read that is not of a header."""

    def __init__(self, plugin: CountedPlugin) -> None:
        super().__init__()
        self._plugin = plugin

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        if len(buffer) > 64 << 10:
            self._plugin.before_weights()
        count = super().read_into(path, offset, buffer, version=version)
        self._plugin.add(count)
        return count


class CountedPlugin:
    """Provides the scheme ``counted``."""

    def __init__(self) -> None:
        self.bytes = 0
        self.before_weights: Callable[[], object] = lambda: None
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count

    @mx.hookimpl
    def mx_register_storages(self) -> list[StorageProvider]:
        return [StorageProvider("counted", ("counted",), lambda uri, settings: Counted(self))]


class Fleet:
    """Workers of this process, each of which loads the model and then offers it."""

    def __init__(self, serving: Serving, directory: Path, **environ: str) -> None:
        save_file(dict(tensors_of(_MIB)), directory / "model.safetensors")
        self.size = (directory / "model.safetensors").stat().st_size
        self.uri = f"counted://{directory}"
        self.environ = {
            "MODEL_EXPRESS_URL": serving.url,
            "MX_WORKER_GRPC_PORT": "0",
            "MX_WORKER_HOST": "127.0.0.1",
            "MX_FOLLOW": _LONG,
            "MX_HEARTBEAT_INTERVAL_SECS": "0.5",
            **environ,
        }
        self.storage = CountedPlugin()
        self.plugins = mx.PluginManager.discover(self.environ)
        self.plugins.register(self.storage, name="counted")
        self.identity = identity_of(tensors_of(_MIB))
        self.client = ServerClient(serving.url)
        self.ended = threading.Event()
        self._pool = ThreadPoolExecutor(2 * _WORKERS)

    def close(self) -> None:
        self.ended.set()
        self._pool.shutdown()
        withdraw_announcements()
        self.client.close()

    def load(self, uri: str | None = None) -> mx.LoadReport:
        tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(_MIB).items()}
        report = mx.load_into(
            tensors, uri or self.uri, identity=self.identity, environ=self.environ, plugins=self.plugins
        )
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in tensors_of(_MIB).items())
        return report

    def worker(self, uri: str | None = None) -> Future[mx.LoadReport]:
        """A worker that loads, and offers what it has loaded until the fleet ends; its report, once it is loaded."""
        loaded: Future[mx.LoadReport] = Future()

        def run() -> None:
            try:
                report = self.load(uri)
            except BaseException as exc:  # noqa: BLE001 - the test gets it
                loaded.set_exception(exc)
                return
            tensors = dict(tensors_of(_MIB))
            with mx.publish(tensors, identity=self.identity, environ=self.environ, plugins=self.plugins):
                loaded.set_result(report)
                self.ended.wait()

        self._pool.submit(run)
        return loaded

    def listed(self, status: p2p_pb2.SourceStatus) -> list[p2p_pb2.SourceInstanceRef]:
        return list(self.client.list_sources(p2p_pb2.ListSourcesRequest(status_filter=status)))

    def waiting(self) -> int:
        """Workers that have a number in the queue."""
        return len([each for each in self.listed(_INITIALIZING) if each.topology.get(FOLLOW_KEY, "0") != "0"])

    def announce(self, **more: str) -> Announcement:
        return Announcement(
            ServerClient.from_env({**self.environ, **more}),
            self.identity,
            0,
            trust=TrustSettings(),
            interval_seconds=0.5,
        )


_INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING
_READY = p2p_pb2.SOURCE_STATUS_READY
_STALE = p2p_pb2.SOURCE_STATUS_STALE


@pytest.fixture
def fleet(start: Start, tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """Makes a fleet with a server, which gets the variables ``server``."""
    with contextlib.ExitStack() as running:

        def fleet(server: Mapping[str, str] | None = None, **environ: str) -> Fleet:
            made = Fleet(start(**(server or {})), tmp_path, **environ)
            running.callback(made.close)
            return made

        yield fleet


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.endswith(".following")]


def test_eight_workers_read_storage_once(fleet: Callable[..., Fleet], caplog: pytest.LogCaptureFixture) -> None:
    """One reads every byte once, seven read from workers; each has one record, which becomes that of its offer."""
    caplog.set_level(logging.INFO)
    made = fleet()
    made.storage.before_weights = lambda: eventually(lambda: made.waiting() == _WORKERS)

    loaded = [made.worker() for _ in range(_WORKERS)]
    reports = [each.result(100) for each in loaded]

    assert ["counted"] + ["grpc"] * 7 == sorted(report.uri.partition(":")[0] for report in reports)
    [header_bytes] = [report.header_bytes for report in reports if report.uri.startswith("counted:")]
    assert sum(tensor.nbytes for tensor in tensors_of(_MIB).values()) == made.storage.bytes - header_bytes
    assert eventually(lambda: len(made.listed(_READY)) == _WORKERS)
    assert _WORKERS == len(made.client.list_sources())
    # A worker says it again if another one gets before the one that it waits for: both took a number at the same time.
    assert len([line for line in told(caplog) if line.startswith("waiting up to ")]) >= 7, told(caplog)
    assert 7 == len([line for line in told(caplog) if line.endswith(" is ready")]), told(caplog)


def test_without_the_setting_nobody_waits(fleet: Callable[..., Fleet]) -> None:
    """A worker that finds none which is ready reads storage, and publishes no record for that."""
    made = fleet(MX_FOLLOW="0")
    announcement = made.announce()

    report = made.load()

    assert made.uri.partition(":")[0] == report.uri.partition(":")[0]
    assert [announcement.worker_id] == [source.worker_id for source in made.client.list_sources()]
    announcement.withdraw()


def test_a_worker_alone_reads_storage(fleet: Callable[..., Fleet], caplog: pytest.LogCaptureFixture) -> None:
    """It waits for nobody, not for itself either."""
    caplog.set_level(logging.INFO)
    made = fleet()

    report = made.load()

    assert report.uri.startswith("counted://")
    assert [_FIRST] == [line.partition("because ")[2] for line in told(caplog)]


def test_a_killed_worker_is_replaced(fleet: Callable[..., Fleet], caplog: pytest.LogCaptureFixture) -> None:
    """Once its heartbeats have stopped, the next one loads, and the one after that reads from it."""
    caplog.set_level(logging.INFO)
    made = fleet({"MX_HEARTBEAT_TIMEOUT_SECS": "4", "MX_REAPER_SCAN_INTERVAL_SECS": "0.5"})
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("announced_worker.py")), made.environ["MODEL_EXPRESS_URL"]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        fields = attrs.asdict(made.identity, value_serializer=lambda *args: _plain(args[2]))
        process.stdin.write(json.dumps(fields) + "\n")
        process.stdin.flush()
        killed = process.stdout.readline().strip()
        loaded = [made.worker(), made.worker()]
        assert eventually(lambda: len([line for line in told(caplog) if killed in line]) == 2), told(caplog)
        process.kill()

        reports = [each.result(100) for each in loaded]

    assert ["counted", "grpc"] == sorted(report.uri.partition(":")[0] for report in reports)


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


def test_a_worker_whose_load_fails_is_replaced_at_once(
    fleet: Callable[..., Fleet], caplog: pytest.LogCaptureFixture
) -> None:
    """It withdraws: nobody waits until its heartbeats are missed, which takes longer than this test may."""
    caplog.set_level(logging.INFO)
    made = fleet({"MX_HEARTBEAT_TIMEOUT_SECS": "1000"}, MX_FOLLOW="1000")
    failing = threading.Event()

    def fail() -> None:
        if not failing.is_set():
            eventually(lambda: made.waiting() == 2)
            failing.set()
            message = "the disk is gone"
            raise NotFoundError(message)

    made.storage.before_weights = fail
    first = made.worker()
    assert eventually(lambda: made.waiting() == 1)
    second = made.worker()

    with pytest.raises(NotFoundError):
        first.result(100)
    assert second.result(100).uri.startswith("counted://")
    assert _FIRST in told(caplog)[-1]


def test_a_wait_ends_with_the_time(fleet: Callable[..., Fleet], caplog: pytest.LogCaptureFixture) -> None:
    """A record that never becomes ready, of whoever it is, delays a worker by MX_FOLLOW and not longer."""
    caplog.set_level(logging.INFO)
    made = fleet(MX_FOLLOW="1.5")
    announcement = made.announce()

    report = made.load()

    assert report.uri.startswith("counted://")
    assert any(announcement.worker_id in line for line in told(caplog))
    assert told(caplog)[-1].endswith("because MX_FOLLOW is over (1.5 s)")
    announcement.withdraw()


def test_records_of_other_workers_are_not_waited_for(
    fleet: Callable[..., Fleet], caplog: pytest.LogCaptureFixture
) -> None:
    """Of another rank, another content, another client, with a number that is none, or withdrawn."""
    caplog.set_level(logging.INFO)
    made = fleet(MX_FOLLOW="1000")
    record = p2p_pb2.WorkerMetadata(status=_INITIALIZING)
    made.client.publish(made.identity, record, "another client")
    for number, name in enumerate(("-1", "x", "9" * 10, "٣")):
        record.topology[FOLLOW_KEY] = name
        made.client.publish(made.identity, record, f"no number {number}")
    record.topology[FOLLOW_KEY] = "0"
    made.client.publish(made.identity.with_content_version("2"), record, "another content")
    record.worker_rank = 1
    made.client.publish(made.identity, record, "another rank")
    made.announce().withdraw()

    report = made.load()

    assert report.uri.startswith("counted://")
    assert [_FIRST] == [line.partition("because ")[2] for line in told(caplog)]


def test_the_largest_number_keeps_nobody_from_the_queue(fleet: Callable[..., Fleet]) -> None:
    """A stranger may claim it: those who come later get it too, and their ids decide."""
    made = fleet()
    record = p2p_pb2.WorkerMetadata(status=_INITIALIZING, topology={FOLLOW_KEY: "999999999"})
    made.client.publish(made.identity, record, "~ last of all ids")
    with contextlib.closing(made.client):
        announcement = made.announce()

        waited = announcement.wait(1000)

    assert 999_999_999 == announcement.number
    assert _FIRST == waited.reason
    announcement.withdraw()


def test_without_an_offer_the_announcement_expires(fleet: Callable[..., Fleet]) -> None:
    """A worker that loads and never offers leaves the queue after MX_FOLLOW."""
    made = fleet(MX_FOLLOW="1")

    made.load()

    assert eventually(lambda: [source.worker_id for source in made.listed(_STALE)])
    assert [] == made.listed(_INITIALIZING)


def test_a_server_that_lost_the_queue_is_given_time(fleet: Callable[..., Fleet]) -> None:
    """A worker that is not in the queue itself publishes its record again, and gives the others time to do so."""
    made = fleet()
    first, second = made.announce(), made.announce()
    waits = threading.Thread(target=second.wait, args=(1000,))
    waits.start()
    assert eventually(lambda: second._seen)

    for announcement in (first, second):
        lost = p2p_pb2.UpdateStatusRequest(
            mx_source_id=made.identity.source_id, worker_id=announcement.worker_id, status=_STALE
        )
        made.client.update_status(lost)

    assert eventually(lambda: made.waiting() == 2)
    assert waits.is_alive()
    first.withdraw()
    waits.join(60)
    assert not waits.is_alive()
    second.withdraw()


def test_only_trusted_records_are_waited_for(tmp_path: Path, fleet: Callable[..., Fleet]) -> None:
    """With authentication, a worker waits for its own name and for MX_TRUSTED_PUBLISHERS, as it reads from them."""
    tokens = {"workers": "w0rk" * 8, "stranger": "str4" * 8}
    for name, token in tokens.items():
        (tmp_path / name).write_text(token)
        (tmp_path / name).chmod(0o600)
    (tmp_path / "tokens").write_text("".join(f"{name}:{token}\n" for name, token in tokens.items()))
    (tmp_path / "tokens").chmod(0o600)
    made = fleet(
        {"MX_AUTH_MODE": "token", "MX_AUTH_TOKENS_PATH": str(tmp_path / "tokens")},
        MX_AUTH_TOKEN_PATH=str(tmp_path / "workers"),
        MX_AUTH_TOKEN_PLAINTEXT="1",
    )
    stranger = made.announce(MX_AUTH_TOKEN_PATH=str(tmp_path / "stranger"))
    request = LoadRequest(ModelURI.parse(made.uri), made.identity)

    with in_turn(made.environ, request) as turn:
        assert turn.waited is not None
        assert _FIRST == turn.waited.reason
        turn.withdraw()
    with in_turn({**made.environ, "MX_TRUSTED_PUBLISHERS": "stranger", "MX_FOLLOW": "1"}, request) as turn:
        assert turn.waited is not None
        assert turn.waited.reason.startswith("MX_FOLLOW is over")
    stranger.withdraw()


def test_without_a_server_the_setting_warns(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """It has no effect then, and the log says so."""
    request = LoadRequest(ModelURI.parse(str(tmp_path)), identity_of({}))

    with in_turn({"MX_FOLLOW": "5"}, request) as turn:
        assert turn.waited is None

    assert ["MX_FOLLOW has no effect"] == [line.partition(",")[0] for line in told(caplog)]
