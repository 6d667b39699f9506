"""Loads from workers in other processes, also from those that are killed or stopped amid a load."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from attrs import frozen
from prometheus_client import REGISTRY
from safetensors.torch import save_file

import modelexpress_core as mx
from modelexpress_core.contracts.candidates import Peer, Tier
from modelexpress_core.contracts.transport import PeerAccess, TensorRead
from modelexpress_core.doctor import diagnose
from modelexpress_core.errors import BackendError, DeadlineError, UnavailableError
from modelexpress_core.events import LoadFailed
from modelexpress_core.providers import TransportProvider
from modelexpress_core.sources.worker_client import WorkerClient
from mx_nixl._quarantine import QUARANTINE, quarantined_bytes
from mx_nixl._session import NixlSession
from mx_nixl._transport import NixlTransport, open_nixl
from tests.support.peers import identity_of, tensors_of
from tests.support.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("nixl-processes"), pytest.mark.usefixtures("nixl")]

_MIB = 96

Load = Callable[..., mx.LoadReport]


@frozen
class Worker:
    """A worker in a process of its own.

    Attributes:
        process: The process.
        uri: What ``MX_STATIC_SOURCES`` names it by.
    """

    process: subprocess.Popen[str]
    uri: str


@contextlib.contextmanager
def worker(*prefix: str, **environ: str) -> Iterator[Worker]:
    """Start a worker, by the command ``prefix`` if there is one, and end it."""
    program = Path(__file__).with_name("nixl_worker.py")
    process = subprocess.Popen(
        [*prefix, sys.executable, str(program), str(_MIB)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environ},
    )
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        assert port, "the worker has not started"
        yield Worker(process, f"nixl://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model on a disk, for when the worker is gone."""
    folder = tmp_path_factory.mktemp("model")
    save_file(dict(tensors_of(_MIB)), folder / "model.safetensors")
    return folder.as_uri()


class Amid:
    """The transport ``nixl``, which calls ``amid`` once, when the first range has arrived, and an observer of loads."""

    def __init__(self, amid: Callable[[], object] = lambda: None) -> None:
        self.failed: list[LoadFailed] = []
        self._amid = amid

    @mx.hookimpl
    def mx_register_transports(self) -> list[TransportProvider]:
        once = threading.Lock()

        class Session:
            def __init__(self, session: NixlSession, amid: Callable[[], object]) -> None:
                self._session = session
                self._amid = amid
                self.close = session.close

            def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
                for position in self._session.read(reads):
                    if once.acquire(blocking=False):
                        self._amid()
                    yield position

        class Transport:
            def __init__(self, uri: mx.ModelURI, amid: Callable[[], object]) -> None:
                self._transport = open_nixl(uri, {})
                self._amid = amid
                self.serve = self._transport.serve
                self.close = self._transport.close

            def connect(self, access: PeerAccess) -> Session:
                return Session(self._transport.connect(access), self._amid)

        return [TransportProvider("amid", ("nixl",), lambda uri, _: Transport(uri, self._amid), tier=Tier.PEER)]

    @mx.hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self.failed.append(event)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def stop(process: subprocess.Popen[str]) -> None:
    """Stop a process, and wait until it is stopped."""
    process.send_signal(signal.SIGSTOP)
    status = Path(f"/proc/{process.pid}/stat")
    assert eventually(lambda: status.read_text().rpartition(")")[2].split()[0] == "T")


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors_of(_MIB).items()}


def load(tensors: Mapping[str, torch.Tensor], checkpoint: str, peer: Worker, amid: Amid) -> mx.LoadReport:
    """Load from the worker, else from the checkpoint; every byte is right afterwards."""
    variables = {
        "MX_DISABLED_PLUGINS": "mx-nixl",
        "MX_DISCOVERY": "static://",
        "MX_STATIC_SOURCES": peer.uri,
        "MX_STALL_SECONDS": "1",
        "MX_SERVER_DEADLINE_SECONDS": "2",
    }
    plugins = mx.PluginManager.discover(variables)
    plugins.register(amid, name="amid")
    report = mx.load_into(tensors, checkpoint, identity=identity_of(tensors), environ=variables, plugins=plugins)
    assert [name for name, tensor in tensors_of(_MIB).items() if not torch.equal(tensor, tensors[name])] == []
    return report


@pytest.mark.parametrize("lanes", ["all", "tcp"])
def test_another_process_is_read(checkpoint: str, lanes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over shared memory, and over TCP."""
    monkeypatch.setenv("UCX_TLS", lanes)
    with worker() as peer:
        report = load(zeros(), checkpoint, peer, Amid())

    assert report.uri.startswith(peer.uri)


def test_mx_doctor_says_why_shared_memory_is_not_used() -> None:
    """Of a worker in another PID namespace, as in another pod of the same node; its bytes come over TCP."""
    namespace = ("unshare", "--pid", "--fork", "--kill-child", *(("--user",) if os.geteuid() else ()))
    try:
        allowed = subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this user or this machine may not make PID namespaces")
    source = identity_of(tensors_of(_MIB)).source_id
    seen = []
    for prefix in ((), namespace):
        with worker(*prefix) as peer:
            steps = {step.name: step for step in diagnose(f"{peer.uri}/{source}/w", environ={}, timeout_seconds=20)}
        assert "ok" == steps["read"].status, steps
        seen.append(steps["read"].seen.partition("way of the bytes: ")[2])

    assert "shared memory (CMA)" == seen[0]
    assert "TCP or another lane: the worker runs in another PID namespace of this host" == seen[1]


@pytest.mark.parametrize("lanes", ["all", "tcp"])
def test_a_worker_that_is_killed_amid_a_load(checkpoint: str, lanes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The load goes on from the checkpoint, and nothing is kept."""
    monkeypatch.setenv("UCX_TLS", lanes)
    with worker() as peer:
        amid = Amid(lambda: kill(peer.process))

        report = load(zeros(), checkpoint, peer, amid)

    assert checkpoint == report.uri
    assert [True] == [isinstance(event.error, BackendError) for event in amid.failed]
    assert eventually(lambda: not quarantined_bytes())


def test_a_worker_that_is_stopped_while_the_connection_is_new(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over shared memory: the reads do not end, the load goes on from the checkpoint, and nothing is written later."""
    monkeypatch.setenv("UCX_TLS", "all")
    tensors = zeros()
    before = QUARANTINE.abandoned
    with worker() as peer:
        amid = Amid()
        connect = NixlTransport.connect

        def connect_and_stop(transport: NixlTransport, access: PeerAccess) -> NixlSession:
            session = connect(transport, access)
            stop(peer.process)
            return session

        monkeypatch.setattr(NixlTransport, "connect", connect_and_stop)
        report = load(tensors, checkpoint, peer, amid)
        for tensor in tensors.values():
            tensor.fill_(0xA5)
        peer.process.send_signal(signal.SIGCONT)
        with WorkerClient(peer.uri.replace("nixl://", "http://"), deadline_seconds=30) as client:
            client.lease(identity_of(tensors_of(_MIB)).source_id).__enter__()  # it runs again

        assert checkpoint == report.uri
        assert QUARANTINE.abandoned in {before, before + 1}  # UCX may end reads that the worker has no part in
        assert all(bool((tensor == 0xA5).all()) for tensor in tensors.values())


def test_a_worker_that_is_stopped_amid_a_load_writes_nothing_later(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TCP: the load goes on from the checkpoint; when the worker goes on, too, its bytes go into kept memory."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    tensors = zeros()
    with worker() as peer:
        amid = Amid(lambda: stop(peer.process))

        report = load(tensors, checkpoint, peer, amid)

        kept = quarantined_bytes()
        gauge = REGISTRY.get_sample_value("mx_p2p_quarantined_bytes", {"transport": "nixl"})
        for tensor in tensors.values():
            tensor.fill_(0xA5)
        peer.process.send_signal(signal.SIGCONT)
        ended = eventually(lambda: not quarantined_bytes())

    assert checkpoint == report.uri
    assert [True] == [isinstance(event.error, (DeadlineError, UnavailableError)) for event in amid.failed]
    assert kept == gauge > 0
    assert ended
    assert 0 == REGISTRY.get_sample_value("mx_p2p_quarantined_bytes", {"transport": "nixl"})
    assert all(bool((tensor == 0xA5).all()) for tensor in tensors.values())


def test_a_worker_that_is_stopped_amid_reads_into_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over CMA the reads end without it, or are left as they are: nothing writes once the session is closed."""
    monkeypatch.setenv("UCX_TLS", "all")
    expected = tensors_of(_MIB)
    source = identity_of(expected).source_id
    reads = [TensorRead(name, 0, torch.zeros_like(tensor)) for name, tensor in expected.items()]
    with worker() as peer, contextlib.ExitStack() as opened:
        client = WorkerClient(peer.uri.replace("nixl://", "http://"), deadline_seconds=1)
        lease = opened.enter_context(client.lease(source))
        description = client.access(lease.lease_id, "nixl")
        session = open_nixl(mx.ModelURI.parse(peer.uri), {"MX_NIXL_READ_TIMEOUT_SECONDS": "1"}).connect(
            PeerAccess(Peer(source, "w"), lease.lease_id, description)
        )
        arriving = session.read(reads)
        done = {next(arriving)}
        stop(peer.process)

        with contextlib.suppress(DeadlineError):
            done.update(arriving)
        session.close()
        session.close()
        right = {number for number, read in enumerate(reads) if torch.equal(expected[read.name], read.destination)}
        for read in reads:
            read.destination.fill_(0xA5)
        peer.process.send_signal(signal.SIGCONT)
        with client.lease(source):  # it runs again
            assert eventually(lambda: not quarantined_bytes())

    assert done <= right
    assert all(bool((read.destination == 0xA5).all()) for read in reads)


def test_a_process_with_kept_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, although the worker is still stopped."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    program = Path(__file__).with_name("kept_memory.py")
    with worker() as peer:
        ended = subprocess.run(
            [sys.executable, str(program), peer.uri, str(peer.process.pid), str(_MIB)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    assert 0 == ended.returncode, ended.stderr
    assert 0 < int(ended.stdout)
