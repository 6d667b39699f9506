"""Attacks on a real server: callers that do not read, do not finish, publish without end, or take all descriptors."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry, Counter

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.server.metrics_port import MetricsPort
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.wire.channel import open_channel
from modelexpress_core.wire.proto.modelexpress import health_pb2, p2p_pb2
from modelexpress_core.wire.rpc import HEALTH, P2P, stub
from tests.support.http2 import Http2, run_all
from tests.support.serving import Serving
from tests.support.waiting import eventually

Start = Callable[..., Serving]

_IDENTITY = SourceIdentity("acme/model")
_READY = p2p_pb2.SOURCE_STATUS_READY
_MIB = 1 << 20


def memory(serving: Serving, field: str = "VmRSS") -> int:
    """Bytes of the server's resident memory: now, or ``VmHWM`` for the most so far."""
    text = Path(f"/proc/{serving.process.pid}/status").read_text()
    [line] = [line for line in text.splitlines() if line.startswith(field)]
    return int(line.split()[1]) << 10


def cpu_seconds(serving: Serving) -> float:
    fields = Path(f"/proc/{serving.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker(**fields: object) -> p2p_pb2.WorkerMetadata:
    return p2p_pb2.WorkerMetadata(status=_READY, **fields)  # type: ignore[arg-type]  # fields of the message


def beat(client: ServerClient) -> bool:
    request = p2p_pb2.UpdateStatusRequest(mx_source_id=_IDENTITY.source_id, worker_id="w-0", status=_READY)
    return client.update_status(request).success


@contextlib.contextmanager
def attacking(connections: list[Http2]) -> Iterator[None]:
    """The connections go on, in a thread, during the block."""
    ended = threading.Event()

    def attack() -> None:
        with contextlib.suppress(OSError):
            while not ended.is_set():
                run_all(connections, 0.2)

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_answers_that_are_not_read(start: Start) -> None:
    """60 lists of 4 MB that nobody reads cost no more than the limit; heartbeats go on, and later lists, too."""
    serving = start(MX_MAX_ANSWER_BYTES="64MiB")
    with ServerClient(serving.url) as client, contextlib.ExitStack() as stack:
        topology = {f"key-{number}": "x" * 3500 for number in range(4)}
        for number in range(280):
            assert client.publish(_IDENTITY, worker(topology=topology), f"w-{number}").success
        before = memory(serving)
        connections = [stack.enter_context(Http2(serving.url)) for _ in range(4)]
        for connection in connections:
            for _ in range(15):
                connection.call(P2P.path("ListSources"))
        with attacking(connections):
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                assert beat(client)
                assert client.health().status == "ok"
        grown = memory(serving, "VmHWM") - before
        stack.pop_all().close()

        assert grown < 64 * _MIB + 48 * _MIB
        assert eventually(lambda: listed(client) == 280)


def listed(client: ServerClient) -> int:
    try:
        return len(client.list_sources())
    except ModelExpressError:
        return 0


def test_an_answer_without_room_is_refused(start: Start) -> None:
    """The error names the limit and its setting."""
    serving = start(MX_MAX_ANSWER_BYTES="8MiB")
    with ServerClient(serving.url) as client, Http2(serving.url) as lazy:
        topology = {f"key-{number}": "x" * 3500 for number in range(4)}
        for number in range(100):
            client.publish(_IDENTITY, worker(topology=topology), f"w-{number}")
        for _ in range(8):
            lazy.call(P2P.path("ListSources"))
        lazy.run(1.0)
        with Http2(serving.url) as other:  # it takes the other quarter of what this address may use
            for _ in range(8):
                other.call(P2P.path("ListSources"))
            other.run(1.0)
            with pytest.raises(ModelExpressError, match=r"RESOURCE_EXHAUSTED.*MX_MAX_ANSWER_BYTES"):
                client.list_sources()
        assert beat(client)


def test_messages_that_are_not_finished(start: Start) -> None:
    """60 messages of 4 MiB that lack their last byte cost no more than the limit, and heartbeats go on."""
    serving = start(MX_MAX_MESSAGE_BYTES="4MiB", MX_MAX_RECEIVING_BYTES="32MiB")
    with ServerClient(serving.url, deadline_seconds=10) as client, contextlib.ExitStack() as stack:
        assert client.publish(_IDENTITY, worker(), "w-0").success
        before = memory(serving)
        connections = [stack.enter_context(Http2(serving.url)) for _ in range(4)]
        for connection in connections:
            for _ in range(15):
                message = bytes(4 * _MIB - 1)
                connection.call(P2P.path("PublishMetadata"), message, declared_bytes=4 * _MIB)
        with attacking(connections):
            deadline = time.monotonic() + 4
            while time.monotonic() < deadline:
                assert beat(client)
        grown = memory(serving, "VmHWM") - before

        assert grown < 32 * _MIB + 48 * _MIB
        assert any(connection.ended for connection in connections), "no message gave way"


def test_a_message_that_is_too_long(start: Start) -> None:
    """It is refused, and the same connection goes on."""
    with ServerClient(start(MX_MAX_MESSAGE_BYTES="64KiB").url) as client:
        with pytest.raises(ModelExpressError, match="RESOURCE_EXHAUSTED"):
            client.publish(_IDENTITY, worker(nixl_metadata=bytes(65 << 10)), "w-0")
        assert client.publish(_IDENTITY, worker(nixl_metadata=bytes(60 << 10)), "w-0").success


@pytest.mark.parametrize("older", [True, False])
def test_messages_of_many_tiny_entries(start: Start, older: bool) -> None:
    """4 MiB of empty tensors are refused before they take 150 MiB; as many bytes of usual ones are taken."""
    serving = start(MX_MAX_MESSAGE_BYTES="5MiB")
    usual = p2p_pb2.TensorDescriptor(name="model.layers.1.mlp.weight", addr=1 << 46, size=1 << 25, dtype="bfloat16")
    with ServerClient(serving.url) as client:
        before = memory(serving)
        for tensor, accepted in ((p2p_pb2.TensorDescriptor(), False), (usual, True)):
            many = p2p_pb2.TensorSource(tensors=[tensor] * (4 * _MIB // (2 + tensor.ByteSize())))
            record = worker(tensors=many.tensors) if older else worker(tensor_source=many)
            del many
            if accepted:
                assert client.publish(_IDENTITY, record, "w").success
            else:
                with pytest.raises(ModelExpressError, match=r"RESOURCE_EXHAUSTED.*entries"):
                    client.publish(_IDENTITY, record, "w")
                assert memory(serving, "VmHWM") - before < 48 * _MIB


def test_records_without_end(start: Start) -> None:
    """A caller's records are refused from its limit on, and replacing one needs no room; the server's memory stays."""
    serving = start(MX_MAX_CALLER_BYTES="8MiB", MX_MAX_RECORDS_BYTES="16MiB")
    with ServerClient(serving.url) as client:
        client.publish(_IDENTITY, worker(), "w-0")
        before = memory(serving)
        answers = [
            client.publish(_IDENTITY, worker(nixl_metadata=bytes(_MIB)), f"big-{number}") for number in range(40)
        ]
        accepted = [answer for answer in answers if answer.success]
        again = client.publish(_IDENTITY, worker(nixl_metadata=bytes(_MIB)), "big-0")
        grown = memory(serving) - before
        metrics = serving.metrics()

    assert 7 == len(accepted)
    assert again.success
    assert "MX_MAX_CALLER_BYTES" in answers[-1].message
    assert f"{8 * _MIB}" in answers[-1].message
    assert grown < 24 * _MIB
    assert "mx_server_records_refused_total 33.0" in metrics


def test_records_beyond_a_limit(start: Start) -> None:
    """The answer says so, and names the setting; nothing is stored."""
    fields: list[tuple[dict[str, object], str]] = [
        ({"topology": {f"key-{number}": "" for number in range(65)}}, "MX_MAX_ENTRIES"),
        ({"topology": {"key": "x" * 9000}}, "MX_MAX_STRING_BYTES"),
        ({"topology": {"k" * 9000: ""}}, "MX_MAX_STRING_BYTES"),
        ({"topology": {str(number): "x" * 8000 for number in range(3)}}, "MX_MAX_TOPOLOGY_BYTES"),
        ({"agent_name": "x" * 9000}, "MX_MAX_STRING_BYTES"),
        ({"artifact_source": p2p_pb2.ArtifactSource(artifact_id="x" * 9000)}, "MX_MAX_STRING_BYTES"),
    ]
    cases = [(_IDENTITY, worker(**each), "w", setting) for each, setting in fields]
    cases += [
        (SourceIdentity("m" * 9000), worker(), "w", "MX_MAX_STRING_BYTES"),
        (_IDENTITY, worker(), "w" * 9000, "MX_MAX_STRING_BYTES"),
        (SourceIdentity("m", extra_parameters={str(n): "" for n in range(65)}), worker(), "w", "MX_MAX_ENTRIES"),
    ]
    with ServerClient(start().url) as client:
        for identity, record, worker_id, setting in cases:
            answer = client.publish(identity, record, worker_id)

            assert not answer.success, setting
            assert setting in answer.message
        assert [] == list(client.list_sources())


# -- the port of the metrics -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def metrics_port(token_path: str | None = None) -> Iterator[str]:
    registry = CollectorRegistry()
    Counter("mx_some", "Something.", registry=registry)
    port = MetricsPort("127.0.0.1", 0, registry, token_path, connection_seconds=1.0)
    try:
        yield f"127.0.0.1:{port.port}"
    finally:
        port.close()


def scraped(address: str, **headers: str) -> str:
    request = urllib.request.Request(f"http://{address}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def test_slow_requests_for_metrics_end() -> None:
    """Also one that goes on to send a byte now and then."""
    with metrics_port() as address, socket.create_connection(address.rsplit(":", 1), timeout=10) as slow:
        slow.settimeout(0.1)
        begun = time.monotonic()
        slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        ended = False
        while not ended and time.monotonic() - begun < 10:
            try:
                slow.sendall(b"x")
                ended = slow.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
        assert ended
        assert time.monotonic() - begun < 5


def test_many_requests_for_metrics() -> None:
    """Connections beyond the limit are closed at once, and when the others have ended all is well."""
    with metrics_port() as address, contextlib.ExitStack() as stack:
        host, port = address.rsplit(":", 1)
        idle = [stack.enter_context(socket.create_connection((host, int(port)), timeout=10)) for _ in range(100)]
        before = threading.active_count()

        assert b"" == idle[-1].recv(1)
        assert before < 60
        assert eventually(lambda: "mx_some_total" in _scraped_or_not(address))


def _scraped_or_not(address: str) -> str:
    try:
        return scraped(address)
    except OSError:
        return ""


def test_metrics_with_a_token(tmp_path: Path) -> None:
    """Without the right one there are no metrics; a new one is taken without a restart."""
    token = tmp_path / "token"
    token.write_text("secret-1\n")
    with metrics_port(str(token)) as address:
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret-1"}):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                scraped(address, **wrong)
        assert "mx_some_total" in scraped(address, Authorization="Bearer secret-1")
        token.write_text("secret-23\n")
        assert "mx_some_total" in scraped(address, Authorization="Bearer secret-23")


# -- file descriptors --------------------------------------------------------------------------------------------------


def test_running_out_of_file_descriptors(start: Start) -> None:
    """The log says so, the server does not spin, and goes on as soon as there are some."""
    serving = start()
    used = len(list(Path(f"/proc/{serving.process.pid}/fd").iterdir()))
    resource.prlimit(serving.process.pid, resource.RLIMIT_NOFILE, (used + 12, used + 12))
    lines: list[str] = []
    assert serving.process.stderr is not None
    reading = threading.Thread(target=lambda: lines.extend(serving.process.stderr or ()))
    with contextlib.ExitStack() as stack:
        for address in (serving.url, serving.metrics_url.removeprefix("http://").partition("/")[0]):
            host, _, port = address.rpartition(":")
            for _ in range(20):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
        reading.start()
        assert eventually(lambda: any("file descriptors are in use" in line for line in lines))
        begun, used_seconds = time.monotonic(), cpu_seconds(serving)
        time.sleep(2)
        share = (cpu_seconds(serving) - used_seconds) / (time.monotonic() - begun)
    with ServerClient(serving.url, deadline_seconds=30) as client:
        assert "ok" == client.health().status
    serving.process.terminate()
    reading.join(30)

    assert share < 0.3
    assert [line for line in lines if "the metrics port accepts no connection" in line]


# -- health under load -------------------------------------------------------------------------------------------------


def test_pages_and_heartbeats_at_the_same_time(start: Start) -> None:
    """Lists in pages have every worker once, though all of them send heartbeats meanwhile."""
    serving = start()
    topology = {str(number): "x" * 4000 for number in range(4)}
    names = {f"w-{number}" for number in range(600)}
    with ServerClient(serving.url) as client:
        for name in names:
            client.publish(_IDENTITY, worker(topology=topology), name)
        ended = threading.Event()

        def beat_on() -> None:
            with ServerClient(serving.url) as other:
                while not ended.is_set():
                    for name in names:
                        other.update_status(
                            p2p_pb2.UpdateStatusRequest(mx_source_id=_IDENTITY.source_id, worker_id=name, status=_READY)
                        )

        with ThreadPoolExecutor(1) as pool:
            beating = pool.submit(beat_on)
            lists = [[source.worker_id for source in client.list_sources()] for _ in range(3)]
            ended.set()
            beating.result(60)

    assert all(len(names) == len(each) and names == set(each) for each in lists)


def test_an_unknown_page(start: Start) -> None:
    """It is an error of the caller."""
    with open_channel(Endpoint.parse(start().url)) as channel, pytest.raises(grpc.RpcError) as failed:
        stub(P2P, channel)["ListSources"](p2p_pb2.ListSourcesRequest(page_token="?"), timeout=10)

    assert grpc.StatusCode.INVALID_ARGUMENT == failed.value.code()


def test_a_call_without_a_message(start: Start) -> None:
    """It is refused, and the server goes on."""
    with open_channel(Endpoint.parse(start().url)) as channel:
        empty = channel.stream_unary(HEALTH.path("GetHealth"))
        with pytest.raises(grpc.RpcError) as failed:
            empty(iter(()), timeout=10)
        answer = stub(HEALTH, channel)["GetHealth"](health_pb2.GetHealthRequest(), timeout=10)

    assert grpc.StatusCode.INVALID_ARGUMENT == failed.value.code()
    assert "ok" == answer.status
