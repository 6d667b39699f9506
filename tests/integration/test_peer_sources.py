"""Loads from several workers over gRPC, each in a process of its own, of which one is slow, stopped or killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from attrs import frozen

import modelexpress_core as mx
from modelexpress_core.contracts.candidates import Tier
from modelexpress_core.contracts.transport import PeerAccess, PeerSession, TensorRead
from modelexpress_core.errors import UnavailableError
from modelexpress_core.events import LoadFailed
from modelexpress_core.plugins import TRANSPORT
from modelexpress_core.providers import TransportProvider
from tests.support.commands import Commands
from tests.support.peers import identity_of, tensors_of
from tests.support.serving import Serving
from tests.support.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.xdist_group("peer sources")]

_MIB = 64


@frozen
class Worker:
    """A worker in a process of its own."""

    process: subprocess.Popen[str]
    uri: str


@pytest.fixture(scope="module")
def workers(server_commands: Commands) -> Iterator[list[Worker]]:
    """Four workers with the same tensors."""
    program = Path(__file__).with_name("peer_worker.py")
    with contextlib.ExitStack() as running:
        serving = Serving(server_commands)
        running.callback(serving.end)
        started: list[subprocess.Popen[str]] = []
        for _ in range(4):
            process = subprocess.Popen(
                [sys.executable, str(program), serving.url, str(_MIB)],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            running.enter_context(process)
            running.callback(process.kill)
            started.append(process)
        source_id = identity_of(tensors_of(_MIB)).source_id
        found: list[Worker] = []
        for process in started:
            assert process.stdout is not None
            worker_id, endpoint = process.stdout.readline().split()
            found.append(Worker(process, f"grpc://{endpoint}/{source_id}/{worker_id}"))
        yield found


class Watched:
    """The transport ``grpc``, whose sessions give nothing before ``together`` of them are asked for something.

    Before each range, ``before`` is called with the worker's id and what each worker gave so far; it returns whether
    the range may be given now.
    """

    def __init__(self, together: int, before: Callable[[str, Counter[str]], bool] = lambda _, __: True) -> None:
        self.given: Counter[str] = Counter()
        self.failed: list[LoadFailed] = []
        self._together = together
        self._before = before
        self._asked: set[str] = set()
        self._changed = threading.Condition()

    @mx.hookimpl
    def mx_register_transports(self) -> list[TransportProvider]:
        watched = self

        class Session:
            def __init__(self, inner: PeerSession, worker: str) -> None:
                self._inner = inner
                self._worker = worker
                self._closed = False

            def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
                for position in self._inner.read(reads):
                    if not watched.may_give(self._worker, lambda: self._closed):
                        reason = "the session was closed"
                        raise UnavailableError(reason)
                    yield position

            def close(self) -> None:
                self._closed = True
                watched.wake()
                self._inner.close()

        class Transport:
            def __init__(self, uri: mx.ModelURI) -> None:
                _, self._transport = mx.PluginManager.discover({}).open(TRANSPORT, uri, {})
                self.serve = self._transport.serve
                self.close = self._transport.close

            def connect(self, access: PeerAccess) -> Session:
                return Session(self._transport.connect(access), access.peer.worker_id)

        return [TransportProvider("watched", ("grpc",), lambda uri, _: Transport(uri), tier=Tier.PEER)]

    def may_give(self, worker: str, is_closed: Callable[[], bool]) -> bool:
        with self._changed:
            self._asked.add(worker)
            self._changed.notify_all()

            def ready() -> bool:
                return is_closed() or (len(self._asked) >= self._together and self._before(worker, self.given))

            assert self._changed.wait_for(ready, 120)
            if is_closed():
                return False
            self.given[worker] += 1
            self._changed.notify_all()
            return True

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @mx.hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self.failed.append(event)


def load(workers: Sequence[Worker], watched: Watched) -> mx.LoadReport:
    """Load from ``workers`` alone, without a stall time, and compare every byte."""
    variables = {
        "MX_DISABLED_PLUGINS": "mx-grpc-stream",
        "MX_DISCOVERY": "static://",
        "MX_STATIC_SOURCES": ",".join(worker.uri for worker in workers),
        "MX_STALL_SECONDS": "600",
    }
    plugins = mx.PluginManager.discover(variables)
    plugins.register(watched, name="watched")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(_MIB).items()}
    report = mx.load_into(
        tensors, "memory://nowhere/model", identity=identity_of(tensors), environ=variables, plugins=plugins
    )
    assert [name for name, tensor in tensors_of(_MIB).items() if not torch.equal(tensor, tensors[name])] == []
    assert [] == watched.failed
    assert sum(tensor.nbytes for tensor in tensors.values()) == sum(source.bytes for source in report.sources)
    return report


def id_of(worker: Worker) -> str:
    return worker.uri.rpartition("/")[2]


def test_three_workers_are_read_at_once(workers: list[Worker]) -> None:
    """Each delivers something."""
    report = load(workers[-3:], Watched(3))

    assert {worker.uri for worker in workers[-3:]} == {source.uri for source in report.sources if source.bytes}


def test_a_worker_that_is_ten_times_slower_delivers_little(workers: list[Worker]) -> None:
    """And is not waited for at the end: the last chunks that it was asked for come from the others."""
    slow, *others = workers[-3:]

    def before(worker: str, given: Counter[str]) -> bool:
        return worker != id_of(slow) or sum(given[id_of(each)] for each in others) >= 20 * (given[worker] + 1)

    watched = Watched(3, before)
    report = load([slow, *others], watched)

    delivered = {source.uri: source.bytes for source in report.sources}
    assert delivered[slow.uri] <= report.bytes_needed / 20
    assert all("" == source.error for source in report.sources)


def test_a_worker_that_is_stopped_amid_a_load_is_not_waited_for(workers: list[Worker]) -> None:
    """Others read what it was asked for, long before the stall time of ten minutes."""
    stopped, *others = workers[-3:]

    def before(worker: str, given: Counter[str]) -> bool:
        if worker == id_of(stopped) and given[worker] == 1:
            os.kill(stopped.process.pid, signal.SIGSTOP)
        return worker == id_of(stopped) or given[id_of(stopped)] >= 1

    try:
        report = load([stopped, *others], Watched(3, before))

        assert any(source.bytes for source in report.sources if source.uri != stopped.uri)
    finally:
        os.kill(stopped.process.pid, signal.SIGCONT)


def test_a_worker_that_is_killed_amid_a_load_is_replaced(workers: list[Worker]) -> None:
    """The load goes on, and keeps what is verified."""
    killed, *others = workers
    workers.remove(killed)

    def before(worker: str, given: Counter[str]) -> bool:
        if worker == id_of(killed) and given[worker] == 1:
            killed.process.kill()
            assert eventually(lambda: killed.process.poll() is not None)
        return worker == id_of(killed) or given[id_of(killed)] >= 1

    report = load([killed, *others[:2]], Watched(3, before))

    lost = next(source for source in report.sources if source.uri == killed.uri)
    assert lost.error
    assert 0 < lost.bytes < report.bytes_needed / 2
