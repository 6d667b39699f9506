"""Processes of the benchmark ``peer_faults``: sources that offer tensors, and readers that are killed amid a load.

They are copies of one process that has imported torch, so that a source that was killed is soon replaced.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from attrs import define, field, frozen

import modelexpress_core as mx
from modelexpress_core.contracts.candidates import Tier
from modelexpress_core.contracts.transport import PeerAccess, PeerSession, TensorRead, TensorTable, Transport
from modelexpress_core.plugins import TRANSPORT, PluginManager
from modelexpress_core.providers import TransportProvider
from modelexpress_core.testing import serving_worker

__all__ = ["Amid", "Held", "Lane", "Source", "even_sizes", "identity_of", "sources", "start_reader", "tensors_of"]

_TENSORS = 40

#: An odd number: its multiples differ in all 64 bits, so that no two words of a tensor are the same.
_FACTOR = 0x5851F42D4C957F2D

_SCHEMES = {"grpc": "mx-grpc-stream", "nixl": "mx-nixl"}

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["benchmarks.peer_fault_workers"])


def tensors_of(sizes: Sequence[int], *, filled: bool = True) -> dict[str, torch.Tensor]:
    """Tensors of so many bytes each, whose content is the same in each process, or zeros."""
    found = {}
    for number, nbytes in enumerate(sizes):
        if filled:
            words = torch.arange(number, number + nbytes // 8 + 1, dtype=torch.int64).mul_(_FACTOR)
            found[f"layers.{number}.weight"] = words.view(torch.uint8)[:nbytes]
        else:
            found[f"layers.{number}.weight"] = torch.zeros(nbytes, dtype=torch.uint8)
    return found


def even_sizes(mib: int) -> Sequence[int]:
    """Sizes of 40 tensors of ``mib`` MiB together, most of them odd."""
    return [(mib << 20) // _TENSORS + number for number in range(_TENSORS)]


def identity_of(tensors: Mapping[str, torch.Tensor]) -> mx.SourceIdentity:
    """Their identity, for both sides."""
    return mx.own_identity("benchmark/faults", tensors, content_version="1")


# -- sources -----------------------------------------------------------------------------------------------------------


@frozen
class Held:
    """What a source holds at one moment.

    Attributes:
        private_bytes: Memory that is its own.
        descriptors: Open files and sockets.
        mappings: Mapped regions of memory, among them what UCX shares with its readers.
        threads: Threads.
        leases: Leases of readers.
    """

    private_bytes: int
    descriptors: int
    mappings: int
    threads: int
    leases: int


@frozen
class Lane:
    """A way of the bytes.

    Attributes:
        name: For the table.
        scheme: The transport.
        environ: Variables of the source.
        ucx_tls: UCX_TLS of both sides.
    """

    name: str
    scheme: str
    environ: Mapping[str, str] = field(factory=dict)
    ucx_tls: str = "all"


@define
class Source:
    """A source in a process of its own.

    Attributes:
        process: The process.
        pipe: For orders and their answers.
        port: Of its gRPC server.
        source_id: What it holds.
        worker_id: Its name.
    """

    process: Any
    pipe: Connection
    port: int
    source_id: str
    worker_id: str

    def uri(self, scheme: str, port: int | None = None) -> str:
        """The URI of its tensors over ``scheme``."""
        return f"{scheme}://127.0.0.1:{port or self.port}/{self.source_id}/{self.worker_id}"

    def order(self, *order: Any) -> Any:  # noqa: ANN401 - what the order answers
        """Have it do something, and return its answer."""
        self.pipe.send(order)
        return self.pipe.recv()

    def flip(self, name: str, offset: int, bit: int) -> None:
        """Invert one bit of its memory."""
        self.order("flip", name, offset, bit)

    def held(self) -> Held:
        """What it holds now."""
        found: Held = self.order("held")
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; returns when it is stopped or dead, if the signal does that."""
        os.kill(self.process.pid, number)
        if number is signal.SIGKILL:
            self.process.join()
        elif number is signal.SIGSTOP:
            status = Path(f"/proc/{self.process.pid}/stat")
            while status.read_text().rpartition(")")[2].split()[0] != "T":
                self.process.join(0.001)

    def end(self) -> None:
        """Kill it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class sources(contextlib.ExitStack):  # noqa: N801 - used as a function: ``with sources() as start``
    """Starts sources, and ends them at the end of the ``with`` block."""

    def __call__(self, sizes: Sequence[int], lane: Lane) -> Source:
        """Start a source with tensors of these sizes; returns when it serves."""
        ours, theirs = _processes.Pipe()
        environ = {**lane.environ, "UCX_TLS": lane.ucx_tls}
        process = _processes.Process(target=_serve, args=(theirs, sizes, lane.scheme, environ), daemon=True)
        process.start()
        theirs.close()
        started = Source(process, ours, 0, "", "")
        self.callback(started.end)
        try:
            started.port, started.source_id, started.worker_id = ours.recv()
        except EOFError as exc:
            message = "a source did not start"
            raise RuntimeError(message) from exc
        return started


def _serve(pipe: Connection, sizes: Sequence[int], scheme: str, environ: Mapping[str, str]) -> None:
    os.environ.update(environ)
    tensors = tensors_of(sizes)
    source_id, worker_id = identity_of(tensors).source_id, f"source-{os.getpid()}"
    with serving_worker(tensors, [scheme], source_id=source_id, worker_id=worker_id, environ=environ) as worker:
        pipe.send((worker.port, source_id, worker_id))
        while True:
            try:
                order, *arguments = pipe.recv()
            except EOFError:
                return  # the benchmark has ended
            if order == "flip":
                name, offset, bit = arguments
                tensors[name][offset] ^= 1 << bit
                pipe.send(None)
            else:
                pipe.send(_held(worker.leases.out()))


def _held(leases: int) -> Held:
    gc.collect()
    own = Path("/proc/self")
    sizes = dict(line.split(":", 1) for line in (own / "smaps_rollup").read_text().splitlines()[1:])
    private = sum(int(sizes[key].split()[0]) for key in ("Private_Clean", "Private_Dirty"))
    return Held(
        private_bytes=private << 10,
        descriptors=len(os.listdir(own / "fd")) - 1,
        mappings=len((own / "maps").read_text().splitlines()),
        threads=len(os.listdir(own / "task")),
        leases=leases,
    )


# -- loads -------------------------------------------------------------------------------------------------------------


@define(eq=False)
class Amid:
    """A plugin with the transports ``nixl`` and ``grpc``, which calls a function once, amid a load.

    Attributes:
        after_bytes: When so many bytes of the load have arrived.
        act: Called with the URI of the worker that is read.
        failures: The errors of the loads that failed.
    """

    after_bytes: int
    act: Callable[[str], object]
    failures: list[BaseException] = field(factory=list)
    _arrived: int = 0
    _lock: threading.Lock = field(factory=threading.Lock, repr=False)

    def manager(self) -> PluginManager:
        """The installed plugins, with this one in place of the transports."""
        plugins = PluginManager.discover({"MX_DISABLED_PLUGINS": ",".join(_SCHEMES.values())})
        plugins.register(self, name="amid")
        return plugins

    def arrived(self, nbytes: int, uri: str) -> None:
        """Count bytes that have arrived."""
        with self._lock:
            before, self._arrived = self._arrived, self._arrived + nbytes
        if before < self.after_bytes <= self._arrived:
            self.act(uri)

    @mx.hookimpl
    def mx_register_transports(self) -> list[TransportProvider]:
        """The transports."""
        installed = PluginManager.discover({})
        return [
            TransportProvider(
                f"amid-{scheme}",
                (scheme,),
                lambda uri, settings: _Transport(installed.open(TRANSPORT, uri, settings)[1], str(uri), self),
                tier=Tier.PEER,
            )
            for scheme in _SCHEMES
            if scheme in installed.table(TRANSPORT).schemes
        ]

    @mx.hookimpl
    def mx_load_failed(self, event: mx.LoadFailed) -> None:
        """Note it."""
        self.failures.append(event.error)


class _Transport:
    def __init__(self, transport: Transport, uri: str, amid: Amid) -> None:
        self._transport = transport
        self._uri = uri
        self._amid = amid

    def serve(self, table: TensorTable) -> Any:  # noqa: ANN401 - as the transport has it
        return self._transport.serve(table)

    def connect(self, access: PeerAccess) -> _Session:
        return _Session(self._transport.connect(access), self._uri, self._amid)

    def close(self) -> None:
        self._transport.close()


class _Session:
    def __init__(self, session: PeerSession, uri: str, amid: Amid) -> None:
        self._session = session
        self._uri = uri
        self._amid = amid
        self.close = session.close

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for position in self._session.read(reads):
            self._amid.arrived(len(reads[position].destination), self._uri)
            yield position


def start_reader(uri: str, sizes: Sequence[int], after_bytes: int, **environ: str) -> Any:  # noqa: ANN401 - a process
    """Start a reader that is killed when so many bytes have arrived. Its exit code is then that of the signal."""
    process = _processes.Process(target=_read_until_killed, args=(uri, sizes, after_bytes, environ), daemon=True)
    process.start()
    return process


def _read_until_killed(uri: str, sizes: Sequence[int], after_bytes: int, environ: Mapping[str, str]) -> None:
    os.environ.update(environ)
    amid = Amid(after_bytes, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    mx.load_into(tensors_of(sizes, filled=False), uri, environ=environ, plugins=amid.manager())
