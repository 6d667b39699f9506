"""Loads from workers in other processes, also from those that are killed or stopped amid a load."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from attrs import frozen
from safetensors.torch import save_file

import modelexpress_core as mx
from modelexpress_core.errors import BackendError, DeadlineError, UnavailableError
from modelexpress_core.events import LoadFailed, LoadProgress
from mx_nixl._quarantine import QUARANTINE
from tests.support.waiting import eventually

sys.path.insert(0, str(Path(__file__).parent))

from nixl_worker import identity_of, tensors_of

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
def worker(**environ: str) -> Iterator[Worker]:
    """Start a worker, and end it."""
    program = Path(__file__).with_name("nixl_worker.py")
    process = subprocess.Popen(
        [sys.executable, str(program), str(_MIB)],
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


class Events:
    """Calls ``amid`` once, when the first bytes have arrived from the worker, and keeps the failures."""

    def __init__(self, amid: Callable[[], object]) -> None:
        self.failed: list[LoadFailed] = []
        self._amid = amid
        self._called = threading.Event()

    @mx.hookimpl
    def mx_load_progress(self, event: LoadProgress) -> None:
        if event.uri.startswith("nixl://") and 0 < event.bytes_done and not self._called.is_set():
            self._called.set()
            self._amid()

    @mx.hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self.failed.append(event)


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors_of(_MIB).items()}


def load(tensors: Mapping[str, torch.Tensor], checkpoint: str, peer: Worker, events: Events) -> mx.LoadReport:
    """Load from the worker, else from the checkpoint; every byte is right afterwards."""
    variables = {
        "MX_DISCOVERY": "static://",
        "MX_STATIC_SOURCES": peer.uri,
        "MX_STALL_SECONDS": "1",
        "MX_SERVER_DEADLINE_SECONDS": "2",
    }
    plugins = mx.PluginManager.discover(variables)
    plugins.register(events, name="events")
    report = mx.load_into(tensors, checkpoint, identity=identity_of(tensors), environ=variables, plugins=plugins)
    assert [name for name, tensor in tensors_of(_MIB).items() if not torch.equal(tensor, tensors[name])] == []
    return report


@pytest.mark.parametrize("lanes", ["all", "tcp"])
def test_another_process_is_read(checkpoint: str, lanes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over shared memory, and over TCP."""
    monkeypatch.setenv("UCX_TLS", lanes)
    with worker() as peer:
        report = load(zeros(), checkpoint, peer, Events(lambda: None))

    assert report.uri.startswith(peer.uri)
    assert "mx-nixl" == report.storage["plugin"]


@pytest.mark.parametrize("lanes", ["all", "tcp"])
def test_a_worker_that_is_killed_amid_a_load(checkpoint: str, lanes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The load goes on from the checkpoint, and nothing is kept."""
    monkeypatch.setenv("UCX_TLS", lanes)
    with worker() as peer:
        events = Events(peer.process.kill)

        report = load(zeros(), checkpoint, peer, events)

    assert checkpoint == report.uri
    assert [True] == [isinstance(event.error, BackendError) for event in events.failed]
    assert eventually(lambda: QUARANTINE.release_ended() or QUARANTINE.nbytes == 0)


def test_a_worker_that_is_stopped_amid_a_load_writes_nothing_later(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TCP: the load goes on from the checkpoint; when the worker goes on, too, its bytes go into kept memory."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    tensors = zeros()
    with worker() as peer:
        events = Events(lambda: peer.process.send_signal(signal.SIGSTOP))

        report = load(tensors, checkpoint, peer, events)

        kept = QUARANTINE.nbytes
        for tensor in tensors.values():
            tensor.fill_(0xA5)
        peer.process.send_signal(signal.SIGCONT)
        ended = eventually(lambda: QUARANTINE.release_ended() or QUARANTINE.nbytes == 0)

    assert checkpoint == report.uri
    assert [True] == [isinstance(event.error, (DeadlineError, UnavailableError)) for event in events.failed]
    assert kept
    assert ended
    assert all(bool((tensor == 0xA5).all()) for tensor in tensors.values())


def test_a_process_with_kept_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, although the worker is still stopped."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    program = f"""
import signal, sys
import torch
import modelexpress_core as mx
sys.path.insert(0, {str(Path(__file__).parent)!r})
from nixl_worker import identity_of, tensors_of
from mx_nixl._quarantine import QUARANTINE
import os
class Events:
    stopped = False
    @mx.hookimpl
    def mx_load_progress(self, event):
        if event.bytes_done and not self.stopped:
            self.stopped = True
            os.kill(int(sys.argv[2]), signal.SIGSTOP)
tensors = {{name: torch.zeros_like(tensor) for name, tensor in tensors_of({_MIB}).items()}}
plugins = mx.PluginManager.discover({{}})
plugins.register(Events(), name="events")
try:
    mx.load_into(
        tensors, sys.argv[1], identity=identity_of(tensors), plugins=plugins,
        environ={{"MX_STALL_SECONDS": "1", "MX_SERVER_DEADLINE_SECONDS": "2"}},
    )
except mx.BackendError:
    print(QUARANTINE.nbytes)
"""
    with worker() as peer:
        begun = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-c", program, peer.uri, str(peer.process.pid)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        seconds = time.monotonic() - begun

    assert (0, "") == (ended.returncode, ended.stderr.partition("keeping ")[0]), ended.stderr
    assert 0 < int(ended.stdout)
    assert seconds < 60
