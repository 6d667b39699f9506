"""Loads from the cache of a server: goodput, CPU time, ranks, many readers of a cold model, an interruption."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from benchmarks.checkpoints import digest_of_directory, generated, sections
from benchmarks.contenders import in_threads
from benchmarks.measuring import Plan, Report, Target
from benchmarks.range_server import Bandwidth
from benchmarks.stores import fastest
from benchmarks.streaming_contenders import serve_bare_grpc, serve_sendfile
from benchmarks.workers import Entry, measure, started
from modelexpress_core.events import LoadFinished, LoadProgress

__all__ = ["run"]

_RAW, _BARE, _FILES, _EXISTING = "sendfile to recv_into", "bare gRPC", "StreamModelFiles by grpcio", "existing client"
_CONTENDERS = "benchmarks.streaming_contenders"

#: A model of the Hub in the cache, and its commit.
_MODEL, _COMMIT = "org/model", "0123456789abcdef0123456789abcdef01234567"

_RANKS = 8
_WORKERS = 16


@frozen
class _Server:
    """A server that runs.

    Attributes:
        url: Of its gRPC services.
        metrics_url: Of its metrics.
        process: Its process.
    """

    url: str
    metrics_url: str
    process: subprocess.Popen[str]

    def uri(self, path: str) -> str:
        """The ``mx`` URI of a model."""
        return f"mx://{self.url.removeprefix('http://')}/{path}"

    def counted(self, metric: str) -> float:
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:  # noqa: S310 - it is http
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{metric}[{{ ]", line))

    def cpu_seconds(self) -> float:
        """CPU time of its process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _serving(cache: Path, *options: str, **environ: str) -> Iterator[_Server]:
    here = ["--host", "127.0.0.1", "--metrics-port", "0", "--cache-dir", str(cache)]
    here += [] if "--port" in options else ["--port", "0"]
    variables = {"HF_ENDPOINT": "http://127.0.0.1:1", "MX_CACHE_SOURCES": "hf,file", **environ}
    command = [sys.executable, "-m", "modelexpress_core", "serve", *here, *options]
    with subprocess.Popen(command, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            found = None
            while found is None:
                line = process.stderr.readline()
                if not line:
                    message = f"the server ended with {process.wait()}"
                    raise RuntimeError(message)
                found = re.match(r"serving on (\S+), metrics on ([^\s,]+)", line)
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield _Server(found[1], f"http://{found[2]}", process)
        finally:
            process.kill()


def run(plan: Plan) -> Report:
    """Measure."""
    directory = generated(plan.scratch, quick=plan.quick)
    total = sum(section.length for section in sections(directory))
    expected = digest_of_directory(directory)
    cache = plan.scratch / f"cache-{directory.name}"
    command = [sys.executable, "-m", "modelexpress_core", "models", "import", str(directory), _MODEL]
    if not cache.exists():
        options = ["--revision", _COMMIT, "--cache-dir", str(cache)]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    absent = []
    with _serving(cache) as server:
        uri = server.uri(f"{_MODEL}?revision={_COMMIT}")
        place = {"directory": str(directory)}
        specifications: dict[str, tuple[str, Mapping[str, Any], Mapping[str, str]]] = {
            _RAW: (f"{_CONTENDERS}:SendfileSockets", {**place, "port": serve_sendfile(directory)}, {}),
            _BARE: (
                f"{_CONTENDERS}:BareModelFiles",
                {"port": serve_bare_grpc(total), "total": total, "expected": expected},
                {},
            ),
            _FILES: (
                f"{_CONTENDERS}:ModelFiles",
                {"url": server.url.removeprefix("http://"), "model": _MODEL, "total": total, "expected": expected},
                {},
            ),
            _EXISTING: (f"{_CONTENDERS}:ExistingClient", {"url": server.url, "model": _MODEL}, {}),
        }
        ours = (("mx", {}), ("mx not compared", {"MX_VERIFY_DIGESTS": "0"}), ("mx frames", {"MX_BULK_PORT": "0"}))
        for name, environ in ours:
            specifications[name] = ("benchmarks.contenders:ModelExpressInto", {**place, "uri": uri}, environ)
        entries = [
            *(Entry(_RAW, _RAW, {"connections": count}, "touched") for count in plan.pick((1, 2, 4), (1,))),
            *(Entry(f"modelexpress {name}", name, {}, "touched") for name, _ in ours),
            *(Entry(name, name, {}, "dropped") for name in (_BARE, _FILES)),
            Entry(_EXISTING, _EXISTING, {}, "files"),
        ]
        with started(specifications) as (workers, not_started):
            measured, failed = measure(plan, workers, entries, expected)
        absent = [*not_started, *failed]
        cpu = server.cpu_seconds()
        with started({"mx": specifications["mx"]}) as (workers, _):
            workers["mx"].run()
            before = server.cpu_seconds()
            reader = workers["mx"].run().cpu_seconds
            both_sides = (server.cpu_seconds() - before + reader) / total * 1e9
        plan.say(f"  both sides of one load: {both_sides:.2f} CPU-seconds per GB (server so far: {cpu:.1f} s)")
        moved = {kind: _moved_over_needed(server, uri, columns=kind == "columns") for kind in ("rows", "columns")}
    twice = _interrupted(plan, cache, total)
    origin, last = _cold(plan, directory)
    limit = fastest(measured, (_RAW,))

    def ratio(above: float | None, name: str) -> float | None:
        below = fastest(measured, (name,))
        return above / below if above is not None and below is not None else None

    targets = [
        Target("mx into place: goodput over raw sendfile to recv_into", ratio(limit, "mx"), 0.8),
        Target("mx into place: goodput over the existing client's", ratio(fastest(measured, (_EXISTING,)), "mx"), 3.0),
        Target("mx into place: goodput over StreamModelFiles", ratio(fastest(measured, (_FILES,)), "mx"), 1.0),
        Target("StreamModelFiles: goodput over bare gRPC", ratio(fastest(measured, (_BARE,)), _FILES), 0.9),
        *(
            Target(f"{_RANKS} ranks, {kind}: bytes moved over bytes needed", figure, 1.05, at_most=True)
            for kind, figure in moved.items()
        ),
        Target("killed and restarted at half: bytes that came twice", twice * 100, 2.0, at_most=True, unit="%"),
        Target(f"{_WORKERS} readers, cold: bytes of the origin over those of the model", origin, 1.001, at_most=True),
        Target(f"{_WORKERS} readers, cold: time of the last over the download alone", last, 1.15, at_most=True),
    ]
    return Report(
        "streaming",
        f"{total / 1e9:.2f} GB from the cache of a server on the same CPUs, over loopback, warm; limit: the fastest of "
        f"plain sockets with sendfile; both sides of one load take {both_sides:.2f} CPU-seconds per GB",
        [entry.row(total, limit) for entry in measured],
        targets,
        absent,
        plan.rounds,
        plan.quick,
    )


def _moved_over_needed(server: _Server, uri: str, *, columns: bool) -> float:
    """Bytes that the server sent to all ranks, over those that they needed."""
    import torch

    import modelexpress_core as mx

    needed = 0
    before = server.counted("mx_cache_sent_bytes_total")
    for rank in range(_RANKS):
        with mx.deferred_weights(uri) as weights:
            for _, tensor in weights:
                if tensor.dim() < 2 or tensor.shape[int(columns)] % _RANKS:
                    continue
                size = tensor.shape[int(columns)] // _RANKS
                part = tensor.narrow(int(columns), rank * size, size)
                target = torch.empty(part.shape, dtype=part.dtype)
                target.copy_(part)
                needed += target.nbytes
    return (server.counted("mx_cache_sent_bytes_total") - before) / needed


def _interrupted(plan: Plan, cache: Path, total: int) -> float:
    """Share of the bytes that came twice, where the server was killed amid a load, and started again."""
    import modelexpress_core as mx

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_serving(cache))
        uri, port = server.uri(f"{_MODEL}?revision={_COMMIT}"), server.url.rpartition(":")[2]
        reports: list[mx.LoadReport] = []

        class Observer:
            """Notes when half of the bytes have arrived, and the report."""

            @mx.hookimpl
            def mx_load_progress(self, event: LoadProgress) -> None:
                if event.bytes_done > total // 2:
                    half.set()

            @mx.hookimpl
            def mx_load_finished(self, event: LoadFinished) -> None:
                reports.append(event.report)

        half = threading.Event()
        plugins = mx.PluginManager.discover()
        plugins.register(Observer(), name="half")
        load = threading.Thread(target=lambda: mx.load_state_dict(uri, plugins=plugins))
        load.start()
        half.wait(60)
        before = server.counted("mx_cache_sent_bytes_total")
        server.process.kill()
        server.process.wait()
        again = stack.enter_context(_serving(cache, "--port", port))
        load.join(300)
        plan.say(f"  killed after {before / total:.0%}; the load {'ended well' if reports else 'failed'}")
        if not reports:
            return 1.0
        sent = before + again.counted("mx_cache_sent_bytes_total")
        return max(0.0, sent / (reports[0].bytes_fetched + reports[0].header_bytes) - 1)


def _cold(plan: Plan, directory: Path) -> tuple[float, float]:
    """Many readers of a model that the server downloads meanwhile from a slow origin.

    Returns:
        Bytes of the origin over those of the model, and the time of the last reader over that of the download.
    """
    import modelexpress_core as mx
    from devtools.fake_hub import FakeHub, HubRequest

    files = sorted(directory.glob("*.safetensors"))[:1]
    size = sum(file.stat().st_size for file in files)
    rate = Bandwidth(plan.pick(20e6, 5e6))

    def slow(request: HubRequest) -> None:
        ends = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if request.server == "cdn" and request.method == "GET":
            rate.take(int(ends[2]) - int(ends[1]) + 1 if ends else size)

    with FakeHub() as hub:
        for file in files:
            hub.put("org/cold", "model.safetensors", file.read_bytes())
        hub.before = slow
        times: list[float] = []
        for readers in (1, _WORKERS):
            with _serving(plan.scratch / f"cold-{readers}-{os.getpid()}", **hub.environ()) as server:
                uri = server.uri("org/cold")
                begun = time.monotonic()

                def read(take: Callable[[], tuple[Any, ...] | None], uri: str = uri) -> None:
                    while take() is not None:
                        with mx.deferred_weights(uri) as weights:  # one tensor each: memory is not what is measured
                            import torch

                            for _, tensor in weights:
                                torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

                in_threads(readers, read, [(number,) for number in range(readers)])
                times.append(time.monotonic() - begun)
                origin = server.counted("mx_cache_origin_bytes_total") / size
    return origin, times[1] / times[0]
