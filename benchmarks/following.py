"""Eight workers that start at the same time, with and without ``MX_FOLLOW``, from a storage of limited bandwidth."""

from __future__ import annotations

import contextlib
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import torch

import modelexpress_core as mx
from benchmarks.checkpoints import digest_of
from benchmarks.measuring import Absent, Plan, Report, Target, median
from benchmarks.peer_source import tensors_of
from benchmarks.range_server import PATTERN_BYTES, RangeServer, RangeStorage, pattern
from benchmarks.workers import Worker, WorkerError
from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.providers import StorageProvider

__all__ = ["Follower", "run"]

_WORKERS = 8
_FOLLOW_SECONDS = 600

#: Content version -> whether the workers wait.
_SETTINGS: Mapping[str, bool] = {"without MX_FOLLOW": False, "with MX_FOLLOW": True}


class _Origin(RangeStorage):
    """A checkpoint of one file on a range server, which does not have its header."""

    def __init__(self, port: int, header: bytes, data_bytes: int) -> None:
        super().__init__(port, len(header) + data_bytes)
        self._header = header
        self._counting = threading.Lock()
        self.bytes = 0

    def list(self, prefix: str) -> Iterator[ObjectInfo]:  # noqa: ARG002 - the protocol's
        yield self.stat("model.safetensors")

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        header = self._header[offset : offset + len(buffer)]
        buffer[: len(header)] = header
        if len(header) == len(buffer):
            return len(header)
        rest = buffer[len(header) :]
        read = super().read_into(path, offset + len(header) - len(self._header), rest, version=version)
        with self._counting:
            self.bytes += read
        return len(header) + read


def _header_of(tensors: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    whole = save(dict(tensors))
    (length,) = struct.unpack("<Q", whole[:8])
    return whole[: 8 + length]


class Follower:
    """A worker that loads a model, and then offers it until the next run.

    Args:
        mib: Size of the model.
        url: The server.
        port: The range server.
    """

    def __init__(self, mib: int, url: str, port: int) -> None:
        self._tensors = tensors_of(mib)
        self._header = _header_of(self._tensors)
        self._nbytes = sum(tensor.nbytes for tensor in self._tensors.values())
        self._port = port
        self._environ = {"MODEL_EXPRESS_URL": url, "MX_WORKER_GRPC_PORT": "0", "MX_WORKER_HOST": "127.0.0.1"}
        self._environ["MX_BULK_PORT"] = "0"
        self._offer = contextlib.ExitStack()

    def run(self, *, follow: bool, version: str) -> Mapping[str, Any]:
        """Load, then offer; the time ends with the load."""
        self._offer.close()
        for tensor in self._tensors.values():
            tensor.zero_()
        origin = _Origin(self._port, self._header, self._nbytes)
        environ = {**self._environ, **({"MX_FOLLOW": str(_FOLLOW_SECONDS)} if follow else {})}
        plugins = mx.PluginManager.discover(environ)
        plugins.register(_Provider(origin), name="origin")
        identity = mx.own_identity("benchmark", self._tensors, content_version=version)
        begun = time.perf_counter()
        report = mx.load_into(self._tensors, "origin:///model", identity=identity, environ=environ, plugins=plugins)
        seconds = time.perf_counter() - begun
        self._offer.enter_context(mx.publish(self._tensors, identity=identity, environ=environ, plugins=plugins))
        return {"load seconds": seconds, "from storage": origin.bytes, "place": report.uri.partition(":")[0]}

    def digest(self) -> str:
        """Return the digest of the tensors."""
        return digest_of(self._tensors)

    def release(self) -> None:
        """Keep all: other workers read it."""


@attrs.frozen
class _Provider:
    origin: _Origin

    @mx.hookimpl
    def mx_register_storages(self) -> list[StorageProvider]:
        return [StorageProvider("origin", ("origin",), lambda uri, settings: self.origin)]  # noqa: ARG005 - a factory


def run(plan: Plan) -> Report:
    """Measure."""
    mib = plan.pick(256, 16)
    rate = plan.pick(100e6, 50e6)
    rows: list[Mapping[str, Any]] = []
    absent: list[Absent] = []
    try:
        with contextlib.ExitStack() as running:
            url = running.enter_context(_server())
            origin = running.enter_context(RangeServer(0.01, rate))
            plan.say(f"starting {_WORKERS} workers with {mib} MiB ...")
            arguments = {"mib": mib, "url": url, "port": origin.port}
            workers = [Worker("benchmarks.following:Follower", arguments) for _ in range(_WORKERS)]
            for worker in workers:
                running.callback(worker.close)
            rows = _measure(plan, workers, mib)
    except WorkerError as exc:
        absent.append(Absent("all", str(exc)))
    with_follow = rows[1] if rows else {}
    faster = rows[0]["last worker s"] / rows[1]["last worker s"] if rows else None
    return Report(
        "following",
        f"{_WORKERS} workers load {(mib << 20) / 1e9:.2f} GB at the same time from a storage of {rate / 1e6:.0f} MB/s "
        "and 10 ms, digests between workers verified; all share the CPUs of one machine",
        rows,
        [
            Target(
                "bytes from storage over the model, with MX_FOLLOW", with_follow.get("from storage"), 1.01, at_most=True
            ),
            Target("times as fast until the last worker is loaded", faster, 3.0),
        ],
        absent,
        plan.rounds,
        plan.quick,
    )


def _measure(plan: Plan, workers: Sequence[Worker], mib: int) -> list[Mapping[str, Any]]:
    expected = _expected(mib)
    total = sum(tensor.nbytes for tensor in tensors_of(mib).values())
    last: dict[str, list[float]] = {name: [] for name in _SETTINGS}
    share: dict[str, list[float]] = {name: [] for name in _SETTINGS}
    with ThreadPoolExecutor(len(workers)) as pool:
        for number in range(plan.rounds + 1):
            plan.say(f"  round {number} of {plan.rounds}" + (" (not counted; bytes compared)" if not number else ""))
            for name, follow in _SETTINGS.items():
                version = f"{number} {name}"
                begun = [
                    pool.submit(worker.run, digest=not number, follow=follow, version=version) for worker in workers
                ]
                measured = [each.result() for each in begun]
                if not number and {expected} != {each.digest for each in measured}:
                    message = "a worker loaded wrong bytes"
                    raise WorkerError(message)
                if number:
                    last[name].append(max(each.details["load seconds"] for each in measured))
                    share[name].append(sum(each.details["from storage"] for each in measured) / total)
    return [
        {
            "workers": name,
            "from storage": round(median(share[name]), 4),
            "last worker s": round(median(last[name]), 3),
            "samples": [round(each, 3) for each in last[name]],
        }
        for name in _SETTINGS
    ]


def _expected(mib: int) -> str:
    """Return the digest of the tensors that the range server's file holds."""
    tensors = tensors_of(mib)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    content = bytearray(pattern() * (nbytes // PATTERN_BYTES + 1))
    from safetensors.torch import load

    return digest_of(load(_header_of(tensors) + bytes(content[:nbytes])))


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """``mx serve`` on a free port; its address."""
    command = [sys.executable, "-m", "modelexpress_core", "serve", "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen([*command, "--metrics-port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = next((match for line in process.stderr if (match := re.match(r"serving on ([^\s,]+)", line))), None)
        if found is None:
            message = "mx serve has not started"
            raise WorkerError(message)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield found[1]
    finally:
        process.terminate()
        process.wait()
