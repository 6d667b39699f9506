"""Simulates many workers that publish, send heartbeats and list, in one process; run by ``benchmarks.control_plane``.

It reads orders as lines of JSON, ``{"do": NAME, ...}``, and answers each with a line of JSON with the measurements.
Each channel has a separate connection; workers share the channels.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import statistics
import sys
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import grpc.aio

from modelexpress_core.contracts.identity import Engine, SourceIdentity
from modelexpress_core.wire.identities import identity_to_message
from modelexpress_core.wire.proto.modelexpress import health_pb2, p2p_pb2
from modelexpress_core.wire.rpc import HEALTH, MESSAGE_OPTIONS, P2P, stub

#: Workers of one identity, as with tensor parallelism over 8 ranks.
WORKERS_OF_A_SOURCE = 8

_CHANNELS = 64
#: Approximate size of NIXL's metadata of an agent.
_NIXL_BYTES = 1536
_OPTIONS = (*MESSAGE_OPTIONS, ("grpc.use_local_subchannel_pool", 1))

#: Makes one call for a worker; returns whether the answer was right.
_Call: TypeAlias = "Callable[[int], Awaitable[bool]]"

#: Errors of failed calls of the current order -> how often they occurred.
_failures: Counter[str] = Counter()


def _identity(worker: int) -> SourceIdentity:
    return SourceIdentity(
        f"org/model-{worker // WORKERS_OF_A_SOURCE}",
        backend_framework=Engine.VLLM,
        tensor_parallel_size=WORKERS_OF_A_SOURCE,
        dtype="bfloat16",
        revision=hashlib.sha1(str(worker // WORKERS_OF_A_SOURCE).encode(), usedforsecurity=False).hexdigest(),
        backend_framework_version="0.32.0",
        torch_version="2.11.0",
        cuda_version="13.0",
        gpu_arch="sm_90",
    )


def _worker_id(worker: int) -> str:
    return uuid.UUID(int=worker).hex


def _tensors(count: int) -> Iterable[p2p_pb2.TensorDescriptor]:
    for number in range(count):
        yield p2p_pb2.TensorDescriptor(
            name=f"model.layers.{number // 20}.mlp.experts.{number % 20}.down_proj.weight",
            addr=(1 << 46) + number * (1 << 21),
            size=1 << 21,
            device_id=0,
            dtype="bfloat16",
        )


def _publication(worker: int, tensors: int) -> p2p_pb2.PublishMetadataRequest:
    """Return the record of a worker, with ``tensors`` tensors; with none, readers would ask its WorkerService."""
    rank = worker % WORKERS_OF_A_SOURCE
    host = f"10.{worker >> 16 & 255}.{worker >> 8 & 255}.{worker & 255}"
    listed = [*_tensors(tensors)]
    metadata = p2p_pb2.WorkerMetadata(
        worker_rank=rank,
        nixl_metadata=random.Random(worker).randbytes(_NIXL_BYTES),
        status=p2p_pb2.SOURCE_STATUS_READY,
        metadata_endpoint=f"{host}:{5555 + rank}",
        agent_name=f"mx-{_worker_id(worker)}",
        worker_grpc_endpoint=f"{host}:{6555 + rank}",
        accelerator="cuda",
        topology={"node": f"node-{worker // WORKERS_OF_A_SOURCE}", "zone": "eu-west-1a", "rack": f"r{worker // 64}"},
        tensors=listed,
        tensor_source=p2p_pb2.TensorSource(tensors=listed) if listed else None,
    )
    return p2p_pb2.PublishMetadataRequest(
        identity=identity_to_message(_identity(worker)),
        worker=metadata,
        worker_id=_worker_id(worker),
        pod_name=f"model-{worker}",
        pod_namespace="inference",
    )


class _Load:
    """Calls to one server.

    Args:
        target: ``host:port``.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._channels = [grpc.aio.insecure_channel(target, options=_OPTIONS) for _ in range(_CHANNELS)]
        self._calls = [stub(P2P, channel) for channel in self._channels]
        self._source_ids: dict[int, str] = {}
        self._lists: dict[int, p2p_pb2.ListSourcesRequest] = {}

    async def connect(self, connections: int = 0) -> Mapping[str, Any]:
        """Connect all channels, and open ``connections`` more, which stay open."""
        more = [grpc.aio.insecure_channel(self._target, options=_OPTIONS) for _ in range(connections)]
        for channel in [*self._channels, *more]:
            await stub(HEALTH, channel)["GetHealth"](health_pb2.GetHealthRequest())
        self._channels += more
        return {}

    async def publish(self, first: int, count: int, tensors: int = 0) -> Mapping[str, Any]:
        """Publish ``count`` workers, eight at a time."""
        wrong = 0
        waiting = iter(range(first, first + count))

        async def publishing() -> None:
            nonlocal wrong
            for worker in waiting:
                done = await _succeeded(self._publish(_publication(worker, tensors), worker))
                wrong += not done  # read after the await, during which other tasks change it

        await asyncio.gather(*(publishing() for _ in range(8)))
        return {"wrong": wrong}

    async def publish_in_turn(self, times: int, tensors: int) -> Mapping[str, Any]:
        """Publish one worker repeatedly; a latency includes the serialisation of the message."""
        request = _publication(0, tensors)
        return {**await _in_turn(times, lambda _: _succeeded(self._publish(request, 0))), "bytes": request.ByteSize()}

    async def list_in_turn(self, times: int, workers: int) -> Mapping[str, Any]:
        """List the sources of one identity after another."""
        return await _in_turn(times, self._any_of(workers, self._list))

    async def list_beside(self, rate: float, beats: float, seconds: float, workers: int) -> Mapping[str, Any]:
        """List at one rate while workers send heartbeats at another; latencies are those of the lists."""
        listed, beaten = await asyncio.gather(
            _at_rate(rate, seconds, self._any_of(workers, self._list)),
            _at_rate(beats, seconds, self._any_of(workers, self._beat)),
        )
        return {**listed, **{sum_of: listed[sum_of] + beaten[sum_of] for sum_of in ("calls", "wrong")}}

    async def list_all(self, seconds: float, under_way: int) -> Mapping[str, Any]:
        """List all workers, with ``under_way`` calls at once; answers are only counted, so that this takes little."""
        methods = [channel.unary_unary(f"/{P2P.name}/ListSources") for channel in self._channels]
        request = p2p_pb2.ListSourcesRequest().SerializeToString()

        async def one(number: int) -> bool:
            return len(await methods[number % _CHANNELS](request)) > 0

        return await _most(seconds, under_way, one)

    async def health(self, rate: float, seconds: float) -> Mapping[str, Any]:
        """Ask for the health at a rate, whether or not the server keeps up."""
        methods = [stub(HEALTH, channel)["GetHealth"] for channel in self._channels]

        async def one(number: int) -> bool:
            answer = await methods[number % _CHANNELS](health_pb2.GetHealthRequest())
            return bool(answer.status == "ok")

        return await _at_rate(rate, seconds, one)

    async def beat(self, rate: float, seconds: float, workers: int) -> Mapping[str, Any]:
        """Send heartbeats at a rate, whether or not the server keeps up."""
        return await _at_rate(rate, seconds, self._any_of(workers, self._beat))

    async def beat_most(self, seconds: float, workers: int, under_way: int = 64) -> Mapping[str, Any]:
        """Send heartbeats as fast as they are answered, with ``under_way`` calls at once."""
        call = self._any_of(workers, self._beat)
        return await _most(seconds, under_way, call)

    def _any_of(self, workers: int, call: _Call) -> _Call:
        """Make ``call`` for another worker each time, in a random but fixed order, so that caches do not help."""
        order = [*range(workers)]
        random.Random(workers).shuffle(order)

        async def one(number: int) -> bool:
            return await _succeeded(call(order[number % workers]))

        return one

    async def _publish(self, request: p2p_pb2.PublishMetadataRequest, worker: int) -> bool:
        response = await self._calls[worker % _CHANNELS]["PublishMetadata"](request)
        return bool(response.success)

    async def _beat(self, worker: int) -> bool:
        source_id = self._source_ids.get(worker) or self._source_ids.setdefault(worker, _identity(worker).source_id)
        response = await self._calls[worker % _CHANNELS]["UpdateStatus"](
            p2p_pb2.UpdateStatusRequest(
                mx_source_id=source_id,
                worker_rank=worker % WORKERS_OF_A_SOURCE,
                status=p2p_pb2.SOURCE_STATUS_READY,
                worker_id=_worker_id(worker),
                source_load=0.25,
            )
        )
        return bool(response.success)

    async def _list(self, worker: int) -> bool:
        source = worker // WORKERS_OF_A_SOURCE
        request = self._lists.get(source) or self._lists.setdefault(
            source,
            p2p_pb2.ListSourcesRequest(
                identity=identity_to_message(_identity(worker)), status_filter=p2p_pb2.SOURCE_STATUS_READY
            ),
        )
        response = await self._calls[worker % _CHANNELS]["ListSources"](request)
        return any(instance.worker_id == _worker_id(worker) for instance in response.instances)


def _figures(latencies: Sequence[float], wrong: int, seconds: float) -> Mapping[str, Any]:
    """Return statistics of the latencies of calls, in milliseconds."""
    ordered = sorted(latencies)
    return {
        "p50_ms": statistics.median(ordered) * 1e3,
        "p99_ms": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1e3,
        "max_ms": ordered[-1] * 1e3,
        "calls": len(ordered),
        "rate": len(ordered) / seconds,
        "wrong": wrong,
    }


async def _succeeded(call: Awaitable[bool]) -> bool:
    """Return whether the answer was right; count the reason if the call failed."""
    try:
        return await call
    except grpc.aio.AioRpcError as exc:
        _failures[f"{exc.code().name}: {exc.details()}"] += 1
        return False


async def _in_turn(times: int, call: _Call) -> Mapping[str, Any]:
    """Make one call after another."""
    latencies, wrong = [], 0
    for number in range(times):
        begun = time.perf_counter()
        wrong += not await call(number)
        latencies.append(time.perf_counter() - begun)
    return _figures(latencies, wrong, sum(latencies))


async def _at_rate(rate: float, seconds: float, call: _Call) -> Mapping[str, Any]:
    """Start calls when they are due, also if earlier ones are unanswered; latencies count from the due times."""
    latencies: list[float] = []
    wrong = 0
    begun = time.perf_counter()

    async def one(number: int, due: float) -> None:
        nonlocal wrong
        done = await call(number)
        latencies.append(time.perf_counter() - due)
        wrong += not done  # read after the await, during which other tasks change it

    calls = []
    for number in range(max(1, round(rate * seconds))):
        due = begun + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        calls.append(asyncio.ensure_future(one(number, due)))
    await asyncio.gather(*calls)
    return _figures(latencies, wrong, time.perf_counter() - begun)


async def _most(seconds: float, under_way: int, call: _Call) -> Mapping[str, Any]:
    """Keep ``under_way`` calls running."""
    latencies: list[float] = []
    wrong = number = 0
    begun = time.perf_counter()

    async def calling() -> None:
        nonlocal number, wrong
        while (now := time.perf_counter()) < begun + seconds:
            number += 1
            done = await call(number)
            latencies.append(time.perf_counter() - now)
            wrong += not done  # read after the await, during which other tasks change it

    await asyncio.gather(*(calling() for _ in range(under_way)))
    return _figures(latencies, wrong, time.perf_counter() - begun)


async def _main(target: str) -> None:
    load = _Load(target)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        used = time.process_time()
        begun = time.perf_counter()
        answer = await getattr(load, order.pop("do"))(**order)
        busy = (time.process_time() - used) / (time.perf_counter() - begun)
        print(json.dumps({**answer, "client_busy": busy, "failures": _failures}), flush=True)
        _failures.clear()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
