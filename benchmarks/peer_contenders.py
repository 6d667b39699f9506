"""The readers that are compared on one worker (see ``benchmarks.contenders``)."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender, in_threads
from benchmarks.peer_source import BARE_METHOD, REQUEST, tensors_of

__all__ = ["BareGrpc", "PeerInto", "PeerSockets", "PeersInto", "RawNixl"]

#: Size of the requests over plain sockets.
_PIECE_BYTES = 4 << 20


class _Reader(Contender):
    """Reads into touched memory."""

    def __init__(self, mib: int) -> None:
        self.tensors = tensors_of(mib)

    def release(self) -> None:
        """Do nothing: the next run reads into the same memory."""


class PeerInto(_Reader):
    """``load_into`` from a worker; measures how much memory both sides take meanwhile, beside the tensors.

    Args:
        mib: Size of the tensors.
        uri: The worker.
        pid: The process of the worker.
    """

    def __init__(self, mib: int, uri: str, pid: int) -> None:
        super().__init__(mib)
        self.uri = uri
        self.pids = {"reader_mib": os.getpid(), "source_mib": pid}

    def run(self, **_setting: Any) -> Mapping[str, Any]:  # noqa: ANN401 - JSON
        import modelexpress_core as mx

        before = {name: _memory_before(pid) for name, pid in self.pids.items()}
        report = mx.load_into(self.tensors, self.uri)
        return {
            "phase_seconds": dict(report.phase_seconds),
            "requests": report.requests,
            "verified": dict(report.verified),
            **{name: (_kibibytes(pid, "VmHWM") - before[name]) / 1024 for name, pid in self.pids.items()},
        }


def _memory_before(pid: int) -> int:
    """The memory of a process now, in KiB; its peak begins there."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _kibibytes(pid, "VmRSS")


def _kibibytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class PeersInto(_Reader):
    """``load_into`` from the first of several workers."""

    def __init__(self, mib: int, uris: Sequence[str]) -> None:
        import modelexpress_core as mx

        super().__init__(mib)
        self.uris = uris
        self.identity = mx.own_identity("benchmark", self.tensors, content_version="1")

    def run(self, *, sources: int) -> Mapping[str, Any]:  # type: ignore[override]
        import modelexpress_core as mx

        environ = {"MX_DISCOVERY": "static://", "MX_STATIC_SOURCES": ",".join(self.uris[:sources])}
        report = mx.load_into(self.tensors, "memory://nowhere/model", identity=self.identity, environ=environ)
        return {
            "phase_seconds": dict(report.phase_seconds),
            "sources": [(each.uri, each.bytes, round(each.seconds, 3), each.error) for each in report.sources],
        }


class PeerSockets(_Reader):
    """Plain sockets: the limit."""

    def __init__(self, mib: int, port: int) -> None:
        super().__init__(mib)
        self.port = port

    def run(self, *, connections: int) -> None:  # type: ignore[override]
        import torch

        from modelexpress_core.transport.tensor_bytes import host_memory

        memory = [host_memory(tensor.view(torch.uint8)) for tensor in self.tensors.values()]
        tasks = [
            (number, offset, min(_PIECE_BYTES, len(view) - offset))
            for number, view in enumerate(memory)
            for offset in range(0, len(view), _PIECE_BYTES)
        ]

        def work(take: Callable[[], tuple[Any, ...] | None]) -> None:
            with socket.create_connection(("127.0.0.1", self.port)) as connection:
                while (task := take()) is not None:
                    number, offset, length = task
                    connection.sendall(REQUEST.pack(number, offset, length))
                    view = memory[number][offset : offset + length]
                    if connection.recv_into(view, length, socket.MSG_WAITALL) != length:
                        message = "the source closed the connection"
                        raise ConnectionError(message)

        in_threads(connections, work, tasks)


class BareGrpc(_Reader):
    """grpcio with serialisers that do nothing; what arrives is counted and dropped."""

    def __init__(self, mib: int, port: int, expected: str) -> None:
        self.tensors = {}
        self.port = port
        self.bytes = mib << 20
        self.expected = expected

    def run(self, *, streams: int) -> None:  # type: ignore[override]
        import grpc

        received = [0] * streams

        def read(number: int) -> None:
            with grpc.insecure_channel(
                f"127.0.0.1:{self.port}",
                options=[("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)],
            ) as channel:
                for frame in channel.unary_stream(BARE_METHOD)(b""):
                    received[number] += len(frame)
                    if received[number] * streams >= self.bytes:
                        break

        threads = [threading.Thread(target=read, args=(number,)) for number in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if sum(received) < self.bytes:
            message = f"{sum(received)} of {self.bytes} bytes arrived"
            raise ConnectionError(message)

    def digest(self) -> str:
        """Return what is expected: the number of bytes was compared, and there are no others."""
        return self.expected


class RawNixl(_Reader):
    """One READ of all memory, over a connection that exists, between memory that is registered."""

    def __init__(self, mib: int, source: Mapping[str, Any]) -> None:
        from mx_nixl._agent import Agent, rows_of

        super().__init__(mib)
        first, *_ = self.tensors.values()
        self.agent = Agent(uuid.uuid4().hex, "UCX")
        self.rows = rows_of([(first.data_ptr(), source["bytes"], 0)])
        self.remote = rows_of([(source["address"], source["bytes"], 0)])
        self.agent.register("DRAM", self.rows)
        self.name = self.agent.add(bytes.fromhex(source["metadata"]))
        self.agent.connect(self.name)

    def run(self, **_setting: Any) -> None:  # noqa: ANN401 - JSON
        read = self.agent.new_read(self.name, ("DRAM", self.rows), ("DRAM", self.remote))
        if not self.agent.post(read):
            while not self.agent.is_done(read):
                pass
