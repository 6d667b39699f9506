"""How many workers the server can handle, its latencies, and its memory per worker."""

from __future__ import annotations

import contextlib
import json
import os
import pstats
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import grpc
import redis
from attrs import frozen

from benchmarks.control_plane_load import WORKERS_OF_A_SOURCE
from benchmarks.measuring import Absent, Plan, Report, Target, median
from devtools.kube_apiserver import KubeApiServer
from devtools.missing import ToolMissingError
from devtools.redis_server import RedisServer
from modelexpress_core.wire.proto.modelexpress import health_pb2
from modelexpress_core.wire.rpc import HEALTH, stub

__all__ = ["run"]

_TENSORS = 2000
#: Calls per second that the server must handle with each store.
_RATES = {"memory": 2000, "redis": 1000}
#: Time between two heartbeats of a worker.
_HEARTBEAT_SECONDS = 30.0
#: How often servers with few and with many workers alternate in each round.
_TURNS = 10
_TICKS = os.sysconf("SC_CLK_TCK")
_START_SECONDS = 60
_LISTERS = 4
_HEALTH_RATE = 50
#: What changes objects of Kubernetes.
_WRITES = frozenset({"create", "update", "patch", "delete"})
_LISTS_OF_KUBERNETES = "ListSources beside heartbeats"
_WRITES_OF_KUBERNETES = "requests to the API server that write"
_HEALTH_BESIDE_LISTS = f"GetHealth beside {_LISTERS} lists of all workers"


@frozen
class _Cores:
    """The cores of server and clients: the server runs alone on one core."""

    server: int
    clients: int

    @classmethod
    def of_this_machine(cls) -> _Cores:
        cores = sorted(os.sched_getaffinity(0))
        return cls(cores[0], cores[-1])


@frozen
class _Sizes:
    """How much is measured."""

    workers: Sequence[int]
    seconds: float
    lists: int
    large: int
    connections: int
    listed: int
    kubernetes: int
    steady_seconds: float

    @property
    def most(self) -> int:
        return self.workers[-1]


@contextlib.contextmanager
def _on(core: int) -> Iterator[None]:
    """Processes that are started in the block run on one core, with all of their threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Process:
    """A running server on one core; the end of the block stops it with SIGTERM."""

    def __init__(self, core: int, *arguments: str, **environ: str) -> None:
        patient = {"MX_HEARTBEAT_TIMEOUT_SECS": "3600"}  # so that workers without heartbeats stay ready
        with _on(core):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.control_plane_server", *arguments],
                env={**os.environ, **patient, **environ},
                stderr=subprocess.PIPE,
                text=True,
            )
        assert self._process.stderr is not None
        timer = threading.Timer(_START_SECONDS, self._process.kill)
        timer.start()
        line = self._process.stderr.readline()
        timer.cancel()
        match = re.match(r"serving on ([^\s,]+)", line)
        assert match is not None, line + self._process.stderr.read()
        self.target = match[1]

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the server, in user and kernel mode (proc(5))."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    @property
    def memory_bytes(self) -> int:
        """The proportional set size (Pss) of the server, after a garbage collection."""
        self._signal(signal.SIGUSR1)
        rollup = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
        assert match is not None
        return int(match[1]) * 1024

    def profile(self) -> None:
        """Start profiling the thread of the event loop, or stop and write the profile."""
        self._signal(signal.SIGUSR2)

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal, and return when the server has handled it."""
        self._process.send_signal(number)
        with grpc.insecure_channel(self.target) as channel:
            stub(HEALTH, channel)["GetHealth"](health_pb2.GetHealthRequest())  # signals are handled before calls

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()


def _serve(cores: _Cores, metadata: str, **environ: str) -> _Process:
    ports = ("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0")
    return _Process(cores.server, "serve", *ports, "--metadata", metadata, **environ)


class _Clients:
    """The process that calls a server, with the server's CPU time during the calls."""

    def __init__(self, cores: _Cores, server: _Process) -> None:
        self._server = server
        with _on(cores.clients):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.control_plane_load", server.target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

    def do(self, order: str, **arguments: float) -> dict[str, Any]:
        """Send an order; return its results with the server's CPU use, in all and per call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        used, begun = self._server.cpu_seconds, time.perf_counter()
        print(json.dumps({"do": order, **arguments}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"{order} failed"
        answer: dict[str, Any] = json.loads(line)
        used, seconds = self._server.cpu_seconds - used, time.perf_counter() - begun
        answer["server_busy"] = used / seconds
        answer["load"] = os.getloadavg()[0]
        if "calls" in answer:
            answer["server_us"] = used / answer["calls"] * 1e6
        return answer

    def __enter__(self) -> _Clients:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class _Results:
    """Samples of all rounds, by measurement, in the order of the first round."""

    def __init__(self) -> None:
        self._samples: defaultdict[tuple[str, str, int], list[Mapping[str, Any]]] = defaultdict(list)

    def add(self, what: str, store: str, workers: int, **sample: Any) -> None:  # noqa: ANN401 - figures
        self._samples[what, store, workers].append(sample)

    def median(self, what: str, store: str, workers: int, figure: str) -> float | None:
        samples = self._samples.get((what, store, workers))
        return median([sample[figure] for sample in samples]) if samples else None

    def rows(self) -> list[dict[str, Any]]:
        columns = {
            "rate": "calls/s",
            "p50_ms": "p50 ms",
            "p99_ms": "p99 ms",
            "server_us": "server us",
            "server_busy": "server busy",
            "client_busy": "clients busy",
            "kib": "KiB each",
            "seconds": "seconds",
            "percent": "%",
            "per_minute": "per worker and minute",
        }
        rows: list[dict[str, Any]] = []
        for (what, store, workers), samples in self._samples.items():
            row: dict[str, Any] = {"what": what, "store": store, "workers": workers}
            for figure, column in columns.items():
                known = [sample[figure] for sample in samples if figure in sample]
                if known:
                    row[column] = median(known)
            wrong = sum(sample.get("wrong", 0) for sample in samples)
            rows.append({**row, "wrong": wrong, "samples": samples})
        return rows


@frozen
class _Rig:
    """What all measurements share."""

    cores: _Cores
    sizes: _Sizes
    results: _Results


def run(plan: Plan) -> Report:
    """Measure."""
    sizes = plan.pick(
        _Sizes(
            (100, 1000, 10_000),
            seconds=6.0,
            lists=200,
            large=50,
            connections=500,
            listed=40_000,
            kubernetes=1000,
            steady_seconds=60.0,
        ),
        _Sizes(
            (16, 64),
            seconds=1.0,
            lists=10,
            large=5,
            connections=10,
            listed=200,
            kubernetes=64,
            steady_seconds=3.0,
        ),
    )
    rates = plan.pick(_RATES, {"memory": 200, "redis": 100})
    rig = _Rig(_Cores.of_this_machine(), sizes, _Results())
    cores, results = rig.cores, rig.results
    before = os.getloadavg()[0]
    absent: list[Absent] = []
    for number in range(plan.rounds):
        plan.say(f"round {number + 1} of {plan.rounds}")
        _starts(rig)
        _bare(rig)
        for store in ("memory", "redis") if number % 2 == 0 else ("redis", "memory"):
            with _on(cores.clients), contextlib.ExitStack() as opened:
                shared = opened.enter_context(RedisServer()) if store == "redis" else None
                _lists(rig, store)
                _round(rig, store, shared.url if shared else "memory://", rates[store])
                if shared:
                    _memory_of_redis(rig, shared)
        _memory_of_tensors(rig)
        _health_beside_lists(rig)
        if not absent:
            try:
                _kubernetes(rig, plan.scratch)
            except ToolMissingError as exc:
                absent.append(Absent("kubernetes", str(exc)))
    plan.say("profile")
    for store in ("memory", "redis"):
        with _on(cores.clients), contextlib.ExitStack() as opened:
            uri = opened.enter_context(RedisServer()).url if store == "redis" else "memory://"
            _profile(rig, store, uri, plan.scratch / f"update-status-{store}.pstats")
    return Report(
        "control_plane",
        f"mx serve on core {cores.server}; its clients (one process, 64 connections), Redis and the API server of "
        f"Kubernetes on core {cores.clients}, of {len(os.sched_getaffinity(0))}; loopback, no TLS; "
        f"{WORKERS_OF_A_SOURCE} workers for each identity; load before the first round {before:.2f}",
        results.rows(),
        _targets(results, sizes, rates),
        absent,
        plan.rounds,
        plan.quick,
    )


def _targets(results: _Results, sizes: _Sizes, rates: Mapping[str, int]) -> list[Target]:
    most, least = sizes.most, sizes.workers[0]
    targets = []
    for store in ("memory", "redis"):
        few, many = (results.median("ListSources in turn", store, workers, "p50_ms") for workers in (least, most))
        beat = f"UpdateStatus at {rates[store]}/s"
        p99 = [
            ("ListSources beside heartbeats, p99", "ListSources beside heartbeats", 10.0),
            (f"{beat}, p99", beat, 50.0),
        ]
        targets += [
            Target(f"{store}: {name}", results.median(what, store, most, "p99_ms"), bound, at_most=True, unit="ms")
            for name, what, bound in p99
        ]
        targets += [
            Target(
                f"{store}: ListSources with {most} workers over {least}, p50",
                many / few if many and few else None,
                1.2,
                at_most=True,
            ),
            Target(
                f"{store}: UpdateStatus, most a second",
                results.median("UpdateStatus, as many as it bears", store, most, "rate"),
                float(rates[store]),
            ),
            Target(
                f"{store}: PublishMetadata of {_TENSORS} tensors, p50",
                results.median(f"PublishMetadata of {_TENSORS} tensors", store, most, "p50_ms"),
                20.0,
                at_most=True,
                unit="ms",
            ),
        ]
    lists = results.median(_LISTS_OF_KUBERNETES, "kubernetes", sizes.kubernetes, "p99_ms")
    writes = results.median(_WRITES_OF_KUBERNETES, "kubernetes", sizes.kubernetes, "per_minute")
    targets += [
        Target(f"kubernetes: {_LISTS_OF_KUBERNETES}, p99", lists, 10.0, at_most=True, unit="ms"),
        Target(f"kubernetes: {_WRITES_OF_KUBERNETES}, per worker and minute", writes, 0.1, at_most=True),
    ]
    health = results.median(_HEALTH_BESIDE_LISTS, "memory", sizes.listed, "p99_ms")
    targets.append(Target(f"{_HEALTH_BESIDE_LISTS}, p99", health, 50.0, at_most=True, unit="ms"))
    memory = results.median("memory of a worker", "memory", most, "kib")
    targets.append(Target("memory of a worker", memory, 20.0, at_most=True, unit="KiB"))
    ready = results.median("ready after exec", "memory", 0, "seconds")
    targets.append(Target("mx serve is ready after", ready, 2.0, at_most=True, unit="s"))
    return targets


def _starts(rig: _Rig) -> None:
    """Measure seconds from exec to the first answered health check."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "modelexpress_core", "serve", "--host", "127.0.0.1", "--port", str(port)]
    begun = time.perf_counter()
    with _on(rig.cores.server):
        process = subprocess.Popen([*command, "--metrics-port", "0"], stderr=subprocess.DEVNULL)
    try:
        while not _listens(port):
            assert process.poll() is None, "mx serve ended"
            assert time.perf_counter() < begun + _START_SECONDS, "mx serve does not listen"
            time.sleep(0.002)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub(HEALTH, channel)["GetHealth"](health_pb2.GetHealthRequest(), wait_for_ready=True, timeout=30)
        rig.results.add("ready after exec", "memory", 0, seconds=time.perf_counter() - begun)
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def _bare(rig: _Rig) -> None:
    """Measure the most calls that bare gRPC handles."""
    with (
        _Process(rig.cores.server, "bare") as server,
        _Clients(rig.cores, server) as clients,
    ):
        clients.do("beat_most", seconds=rig.sizes.seconds / 4, workers=rig.sizes.most)
        most = clients.do("beat_most", seconds=rig.sizes.seconds, workers=rig.sizes.most)
        rig.results.add("UpdateStatus, as many as it bears", "bare gRPC", rig.sizes.most, **most)


def _round(rig: _Rig, store: str, uri: str, rate: int) -> None:
    """Measure all calls, on a new server."""
    most = rig.sizes.most
    with _serve(rig.cores, uri) as server, _Clients(rig.cores, server) as clients:
        clients.do("connect")
        clients.do("publish", first=0, count=rig.sizes.workers[0])
        clients.do("beat", rate=rate / 4, seconds=1.0, workers=rig.sizes.workers[0])
        memory = server.memory_bytes
        published = clients.do("publish", first=rig.sizes.workers[0], count=most - rig.sizes.workers[0])
        assert published["wrong"] == 0
        if store == "memory":
            kib = (server.memory_bytes - memory) / (most - rig.sizes.workers[0]) / 1024
            rig.results.add("memory of a worker", store, most, kib=kib)
        heartbeats = most / _HEARTBEAT_SECONDS
        beside = clients.do("list_beside", rate=rate / 10, beats=heartbeats, seconds=rig.sizes.seconds, workers=most)
        rig.results.add("ListSources beside heartbeats", store, most, **beside)
        beaten = clients.do("beat", rate=rate, seconds=rig.sizes.seconds, workers=most)
        rig.results.add(f"UpdateStatus at {rate}/s", store, most, **beaten)
        bears = clients.do("beat_most", seconds=rig.sizes.seconds, workers=most)
        rig.results.add("UpdateStatus, as many as it bears", store, most, **bears)
        large = clients.do("publish_in_turn", times=rig.sizes.large, tensors=_TENSORS)
        rig.results.add(f"PublishMetadata of {_TENSORS} tensors", store, most, **large)
        if store == "memory":
            memory = server.memory_bytes
            clients.do("connect", connections=rig.sizes.connections)
            kib = (server.memory_bytes - memory) / rig.sizes.connections / 1024
            rig.results.add("memory of a connection", store, most, kib=kib)


def _lists(rig: _Rig, store: str) -> None:
    """Measure lists of servers with few and with many workers in turn, under the same load of the machine."""
    with _on(rig.cores.clients), contextlib.ExitStack() as opened:
        asked: list[tuple[int, _Clients]] = []
        for workers in rig.sizes.workers:
            uri = opened.enter_context(RedisServer()).url if store == "redis" else "memory://"
            clients = opened.enter_context(_Clients(rig.cores, opened.enter_context(_serve(rig.cores, uri))))
            clients.do("connect")
            assert clients.do("publish", first=0, count=workers)["wrong"] == 0
            clients.do("list_in_turn", times=rig.sizes.lists, workers=workers)
            asked.append((workers, clients))
        for _ in range(_TURNS):
            for workers, clients in asked:
                listed = clients.do("list_in_turn", times=rig.sizes.lists, workers=workers)
                rig.results.add("ListSources in turn", store, workers, **listed)


def _memory_of_redis(rig: _Rig, server: RedisServer) -> None:
    with redis.Redis(port=server.port) as client:
        full = client.info("memory")["used_memory"]
        client.flushdb()
        empty = client.info("memory")["used_memory"]
    rig.results.add("memory of a worker, in Redis", "redis", rig.sizes.most, kib=(full - empty) / rig.sizes.most / 1024)


def _memory_of_tensors(rig: _Rig) -> None:
    """Measure the memory of workers that publish all of their tensors."""
    count = rig.sizes.large * 4
    with _serve(rig.cores, "memory://") as server, _Clients(rig.cores, server) as clients:
        clients.do("publish", first=0, count=rig.sizes.large, tensors=_TENSORS)
        memory = server.memory_bytes
        clients.do("publish", first=rig.sizes.large, count=count, tensors=_TENSORS)
        kib = (server.memory_bytes - memory) / count / 1024
        rig.results.add(f"memory of a worker with {_TENSORS} tensors", "memory", count, kib=kib)


def _health_beside_lists(rig: _Rig) -> None:
    """Measure how long a probe of the health waits while others list everything."""
    with (
        _serve(rig.cores, "memory://") as server,
        _Clients(rig.cores, server) as listers,
        _Clients(rig.cores, server) as clients,
        ThreadPoolExecutor(1) as pool,
    ):
        clients.do("connect")
        assert clients.do("publish", first=0, count=rig.sizes.listed)["wrong"] == 0
        listing = pool.submit(listers.do, "list_all", seconds=rig.sizes.seconds + 2, under_way=_LISTERS)
        time.sleep(1)
        asked = clients.do("health", rate=_HEALTH_RATE, seconds=rig.sizes.seconds)
        listed = listing.result()
        rig.results.add(_HEALTH_BESIDE_LISTS, "memory", rig.sizes.listed, **asked)
        rig.results.add(f"ListSources of all, {_LISTERS} at once", "memory", rig.sizes.listed, **listed)


def _kubernetes(rig: _Rig, scratch: Path) -> None:
    """Measure lists beside the heartbeats of workers, and what their server writes to the API server meanwhile.

    Raises:
        ToolMissingError: This machine has no API server.
    """
    workers, seconds = rig.sizes.kubernetes, rig.sizes.steady_seconds
    beats = workers / _HEARTBEAT_SECONDS
    with contextlib.ExitStack() as opened:
        with _on(rig.cores.clients):
            api = opened.enter_context(KubeApiServer())
        api.apply(files("mx_kubernetes").joinpath("crds.yaml").read_text("utf-8"))
        config = api.kubeconfig(scratch / "kubeconfig", api.new_namespace())
        server = opened.enter_context(_serve(rig.cores, "kubernetes://", KUBECONFIG=str(config)))
        clients = opened.enter_context(_Clients(rig.cores, server))
        clients.do("connect")
        begun = time.perf_counter()
        published = clients.do("publish", first=0, count=workers)
        took = time.perf_counter() - begun
        rig.results.add("PublishMetadata of all, eight at once", "kubernetes", workers, seconds=took, **published)
        clients.do("list_beside", rate=100, beats=beats, seconds=min(seconds, 10.0), workers=workers)
        before = _writes(api)
        begun = time.perf_counter()
        listed = clients.do("list_beside", rate=100, beats=beats, seconds=seconds, workers=workers)
        minutes = (time.perf_counter() - begun) / 60
        rig.results.add(_LISTS_OF_KUBERNETES, "kubernetes", workers, **listed)
        per_minute = (_writes(api) - before) / minutes / workers
        rig.results.add(_WRITES_OF_KUBERNETES, "kubernetes", workers, per_minute=per_minute)


def _writes(api: KubeApiServer) -> int:
    return sum(event["verb"] in _WRITES for event in api.audited("admin"))


#: Text in the path of a function's file -> the package that it belongs to; the first match counts.
_OWNERS = (
    ("prometheus_client", "prometheus_client"),
    ("server/metrics", "server/metrics"),
    ("server/interceptors", "server/interceptors"),
    ("server/stores/measured", "server/stores/measured"),
    ("server/stores", "server/stores"),
    ("server/services", "server/services"),
    ("wire/", "wire"),
    ("<attrs generated", "attrs"),
    ("attr/", "attrs"),
    ("enum.py", "enum"),
    ("redis/", "redis-py"),
    ("asyncio/", "asyncio"),
    ("grpc/", "gRPC, in Python"),
    ("lib/python", "standard library"),
)


def _profile(rig: _Rig, store: str, uri: str, file: Path) -> None:
    """Profile UpdateStatus: shares of the busy time of the event loop's thread, by package."""
    with _serve(rig.cores, uri, BENCHMARK_PROFILE=str(file)) as server, _Clients(rig.cores, server) as clients:
        clients.do("connect")
        clients.do("publish", first=0, count=rig.sizes.workers[0])
        server.profile()
        clients.do("beat_most", seconds=rig.sizes.seconds, workers=rig.sizes.workers[0])
        server.profile()
    shares: defaultdict[str, float] = defaultdict(float)
    for (path, _, name), (_, _, seconds, _, _) in pstats.Stats(str(file)).stats.items():  # type: ignore[attr-defined]  # undocumented
        if "poll" in name and "select" in name:
            continue  # waiting
        shares[_owner(path, name)] += seconds
    total = sum(shares.values())
    for owner, seconds in sorted(shares.items(), key=lambda item: -item[1]):
        if seconds > 0.01 * total:
            rig.results.add(
                f"profile of UpdateStatus: {owner}", store, rig.sizes.workers[0], percent=100 * seconds / total
            )


def _owner(path: str, name: str) -> str:
    if "Context" in name and "run" in name:
        return "gRPC, compiled"  # gRPC's coroutines run in it, invisible to the profiler
    for part, owner in _OWNERS:
        if part in path:
            return owner
    return "built-in functions" if path == "~" else "other"
