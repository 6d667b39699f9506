"""A server in a process of its own, as `mx serve` starts it, and our client."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest

from modelexpress_core.contracts.identity import Engine, SourceIdentity
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import UnavailableError, UnsupportedError
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.wire.channel import open_channel
from modelexpress_core.wire.identities import identity_from_message, identity_to_message
from modelexpress_core.wire.proto.modelexpress import api_pb2, health_pb2, p2p_pb2
from modelexpress_core.wire.rpc import API, HEALTH, P2P, STANDARD_HEALTH, stub
from tests.support.serving import Serving
from tests.support.signals import with_default_signals
from tests.support.waiting import eventually

#: Identities of one test alone.
_IDENTITY = SourceIdentity("acme/model", backend_framework=Engine.VLLM, tensor_parallel_size=2, dtype="bfloat16")

READY, STALE = p2p_pb2.SOURCE_STATUS_READY, p2p_pb2.SOURCE_STATUS_STALE


Start = Callable[..., Serving]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def worker(rank: int = 0, status: Any = READY, **fields: Any) -> p2p_pb2.WorkerMetadata:
    return p2p_pb2.WorkerMetadata(worker_rank=rank, status=status, **fields)


def listed(client: ServerClient, identity: SourceIdentity = _IDENTITY, **filters: Any) -> list[str]:
    request = p2p_pb2.ListSourcesRequest(identity=identity_to_message(identity), **filters)
    return [source.worker_id for source in client.list_sources(request)]


def test_from_publishing_to_reading(start: Start) -> None:
    """All that a worker said comes back, with the server's time, and what lists show is of it."""
    tensors = [
        p2p_pb2.TensorDescriptor(name=f"w{i}", addr=2**63 + i, size=2**40, device_id=i, dtype="bf16") for i in (0, 1)
    ]
    said = worker(
        1,
        nixl_metadata=b"\0agent\xff",
        tensors=tensors,
        tensor_source=p2p_pb2.TensorSource(tensors=tensors),
        metadata_endpoint="10.0.0.1:5555",
        agent_name="agent",
        worker_grpc_endpoint="10.0.0.1:6555",
        accelerator="cuda:h100",
        topology={"rack": "7"},
        updated_at=1,
    )
    identity = SourceIdentity("acme/model", extra_parameters={"training_step": "12", "layout_signature": "Sig"})
    before = time.time()

    with ServerClient(start().url) as client:
        published = client.publish(identity, said, "w-1")
        answer = client.metadata(identity.source_id, "w-1")
        [reference] = client.list_sources()

    assert (True, identity.source_id, "w-1") == (published.success, published.mx_source_id, published.worker_id)
    assert answer.found
    assert before - 1 <= answer.worker.updated_at / 1000 <= time.time() + 1
    said.updated_at = answer.worker.updated_at
    assert said == answer.worker
    assert identity == identity_from_message(answer.identity)
    expected = p2p_pb2.SourceInstanceRef(
        mx_source_id=identity.source_id,
        worker_id="w-1",
        model_name="acme/model",
        worker_rank=1,
        accelerator="cuda:h100",
        updated_at=answer.worker.updated_at,
        training_step=12,
        layout_signature="Sig",
        topology={"rack": "7"},
    )
    assert expected == reference


def test_lists_are_filtered_sorted_and_limited(start: Start) -> None:
    """In this order: filters, those that spoke last first, the limit."""
    with ServerClient(start().url) as client:
        for rank, step in ((0, "5"), (1, "6"), (2, "no number")):
            identity = SourceIdentity("acme/model", extra_parameters={"version": step})
            client.publish(identity, worker(rank), f"w-{rank}")
            time.sleep(0.01)
        client.publish(SourceIdentity("acme/other"), worker(status=STALE), "other")
        times = [source.updated_at for source in client.list_sources()]
        anything = SourceIdentity("")

        assert sorted(times, reverse=True) == times
        assert ["other", "w-2", "w-1", "w-0"] == listed(client, anything)
        assert ["other", "w-2", "w-1", "w-0"] == listed(client, anything, limit=0)
        assert ["other", "w-2"] == listed(client, anything, limit=2)
        assert ["w-2", "w-1", "w-0"] == listed(client, anything, status_filter=READY)
        assert ["other"] == listed(client, anything, status_filter=STALE)
        assert ["w-2", "w-1", "w-0"] == listed(client, anything, model_name_filter="acme/model")
        assert ["w-1"] == listed(client, anything, worker_rank_filter=1)
        assert ["w-1", "w-0"] == listed(client, anything, min_training_step=5)
        assert ["w-1"] == listed(client, anything, min_training_step=6, limit=1)
        assert ["other", "w-2"] == listed(client, anything, min_updated_at=times[1])
        assert ["w-1"] == listed(client, SourceIdentity("acme/model", extra_parameters={"version": "6"}))
        assert [] == listed(client, SourceIdentity("acme/model", tensor_parallel_size=64))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (p2p_pb2.PublishMetadataRequest(), "identity is required"),
        (p2p_pb2.PublishMetadataRequest(identity={}, worker_id="w", worker={}), "identity.model_name is required"),
        (p2p_pb2.PublishMetadataRequest(identity={"model_name": "m"}, worker={}), "worker_id is required"),
        (p2p_pb2.PublishMetadataRequest(identity={"model_name": "m"}, worker_id="w"), "worker is required"),
    ],
)
def test_what_is_missing_is_told_in_the_answer(
    start: Start, request_: p2p_pb2.PublishMetadataRequest, message: str
) -> None:
    """With the words that existing clients know, and without an error of gRPC."""
    with open_channel(Endpoint.parse(start().url)) as channel:
        answer = stub(P2P, channel)["PublishMetadata"](request_, timeout=10)

    assert (False, message) == (answer.success, answer.message)


def test_what_is_unknown(start: Start) -> None:
    """Metadata is not found; a heartbeat is told so, and the worker publishes again."""
    with ServerClient(start().url) as client:
        assert not client.metadata("0" * 16, "w").found
        answer = client.update_status(p2p_pb2.UpdateStatusRequest(mx_source_id="0" * 16, worker_id="w", status=READY))

    assert not answer.success
    assert "publish it again" in answer.message


def test_silent_workers_are_not_offered(start: Start) -> None:
    """As soon as they have been silent too long, though the reaper has not come by; a heartbeat brings them back."""
    url = start(MX_HEARTBEAT_TIMEOUT_SECS="1").url
    with ServerClient(url) as client:
        client.publish(_IDENTITY, worker(), "w")
        assert ["w"] == listed(client, status_filter=READY)
        time.sleep(1.5)
        silent = listed(client, status_filter=READY)
        state = client.metadata(_IDENTITY.source_id, "w").worker.status
        beat = p2p_pb2.UpdateStatusRequest(
            mx_source_id=_IDENTITY.source_id, worker_id="w", status=READY, source_load=0.5
        )
        assert client.update_status(beat).success
        [reference] = client.list_sources(p2p_pb2.ListSourcesRequest(status_filter=READY))

    assert [] == silent
    assert STALE == state
    assert 0.5 == reference.source_load


def test_the_reaper(start: Start) -> None:
    """Silent sources become stale, and later go; what it does is counted."""
    serving = start(MX_HEARTBEAT_TIMEOUT_SECS="0.5", MX_GC_TIMEOUT_SECS="2", MX_REAPER_SCAN_INTERVAL_SECS="0.2")
    with ServerClient(serving.url) as client:
        client.publish(_IDENTITY, worker(), "w")
        assert eventually(lambda: listed(client, status_filter=STALE) == ["w"])
        assert eventually(lambda: not client.metadata(_IDENTITY.source_id, "w").found)

    assert 'mx_server_reaped_total{action="stale"} 1.0' in serving.metrics()
    assert 'mx_server_reaped_total{action="removed"} 1.0' in serving.metrics()


def test_numbers_that_mean_nothing(start: Start) -> None:
    """A state that there is not is unknown; a load that is no number, and a step with 5,000 digits, are not there."""
    strange = SourceIdentity("acme/model", extra_parameters={"training_step": "9" * 5000})
    serving = start()
    with ServerClient(serving.url) as client:
        client.publish(strange, worker(status=77), "w")
        for status in (-1, 99, 2**31 - 1):
            assert client.update_status(
                p2p_pb2.UpdateStatusRequest(
                    mx_source_id=strange.source_id, worker_id="w", status=status, source_load=float("nan")
                )
            ).success
        [reference] = client.list_sources(p2p_pb2.ListSourcesRequest(status_filter=0))

    assert not reference.HasField("source_load")
    assert not reference.HasField("training_step")


def test_a_host_with_colons(start: Start) -> None:
    """Is written with brackets, in what is said and in what is asked."""
    serving = start("--host", "::1")

    assert serving.url.startswith("[::1]:")
    assert "mx_build_info" in serving.metrics()
    with ServerClient(serving.url) as client:
        assert "ok" == client.health().status


def test_what_callers_name_is_one_line_of_the_log(start: Start) -> None:
    """Also where it holds what would begin another, or move the cursor."""
    serving = start(MODEL_EXPRESS_LOG_LEVEL="debug")
    with open_channel(Endpoint.parse(serving.url)) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/x/y\x7f\u2028z")(b"", timeout=10)
    _, said = serving.ended()

    assert "x/y" in said
    assert not [line for line in said.splitlines() if "\x7f" in line or line.startswith("z")]


def test_the_small_services(start: Start) -> None:
    """Health, the standard health service, and pings."""
    with open_channel(Endpoint.parse(start().url)) as channel:
        api = stub(API, channel)["SendRequest"]
        health = stub(STANDARD_HEALTH, channel)
        pong = api(api_pb2.Request(id="1", action="ping"), timeout=10)
        other = api(api_pb2.Request(id="1", action="dance"), timeout=10)
        all_of_it = health["Check"](health_pb2.HealthCheckRequest(), timeout=10)
        one = health["Check"](health_pb2.HealthCheckRequest(service=P2P.name), timeout=10)
        with pytest.raises(grpc.RpcError) as unknown:
            health["Check"](health_pb2.HealthCheckRequest(service="other"), timeout=10)
        watch = health["Watch"](health_pb2.HealthCheckRequest(), timeout=10)
        first = next(watch)
        watch.cancel()

    assert (True, {"message": "pong"}) == (pong.success, json.loads(pong.data))
    assert (False, "Unknown action: dance") == (other.success, other.error)
    serving = health_pb2.HealthCheckResponse.SERVING
    assert [serving] * 3 == [all_of_it.status, one.status, first.status]
    assert grpc.StatusCode.NOT_FOUND == unknown.value.code()


def test_long_metadata(start: Start) -> None:
    """A worker with 200,000 tensors; and a message that is too long is refused, with a server that goes on."""
    tensors = [
        p2p_pb2.TensorDescriptor(name=f"model.layers.{i}.weight", addr=i, size=1 << 20, dtype="bfloat16")
        for i in range(200_000)
    ]
    with ServerClient(start().url) as client:
        client.publish(_IDENTITY, worker(tensor_source=p2p_pb2.TensorSource(tensors=tensors)), "w")
        assert len(tensors) == len(client.metadata(_IDENTITY.source_id, "w").worker.tensor_source.tensors)
        with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
            client.publish(_IDENTITY, worker(nixl_metadata=bytes(101 << 20)), "w")
        assert "ok" == client.health().status


def test_many_clients_at_once(start: Start) -> None:
    """Each sees its own source, and all see all."""
    serving = start()

    def live(number: int) -> bool:
        with ServerClient(serving.url) as client:
            identity = SourceIdentity(f"acme/{number}")
            client.publish(identity, worker(), f"w-{number}")
            return [f"w-{number}"] == listed(client, identity)

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(live, range(64)))
    with ServerClient(serving.url) as client:
        found = len(client.list_sources())

    assert all(results)
    assert 64 == found


def test_random_bytes_do_no_harm(start: Start) -> None:
    """Whatever is sent to whatever method: an error or an answer, and a server that goes on, and holds no more."""
    serving = start()
    random = Random(1)
    codes: Counter[grpc.StatusCode] = Counter()
    message = p2p_pb2.PublishMetadataRequest(
        identity=identity_to_message(_IDENTITY), worker=worker(1, accelerator="x", topology={"a": "b"}), worker_id="w"
    ).SerializeToString()
    with open_channel(Endpoint.parse(serving.url)) as channel:
        for service in (P2P, API, HEALTH, STANDARD_HEALTH):
            for name, method in service.methods.items():
                if method.response_streaming:
                    continue
                call = channel.unary_unary(service.path(name))
                for _ in range(1000):
                    data = bytearray(message if random.random() < 0.7 else random.randbytes(random.randrange(1, 200)))
                    for _ in range(random.randrange(1, 5)):
                        data[random.randrange(len(data))] = random.randrange(256)
                    try:
                        call(bytes(data), timeout=10)
                    except grpc.RpcError as exc:
                        codes[exc.code()] += 1
                    else:
                        codes[grpc.StatusCode.OK] += 1
                    if sum(codes.values()) == 1000:
                        before = _held(serving)
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND} == set(codes)
    with ServerClient(serving.url) as client:
        assert "ok" == client.health().status
        published = len(client.list_sources())
    files, memory = _held(serving)
    assert abs(files - before[0]) <= 2
    assert memory - before[1] < (16 << 20) + published * (16 << 10)


def _held(serving: Serving) -> tuple[int, int]:
    """Open files of the server, and bytes of its resident memory."""
    process = Path(f"/proc/{serving.process.pid}")
    [line] = [line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS")]
    return len(list((process / "fd").iterdir())), int(line.split()[1]) << 10


def test_metrics_count_calls(start: Start) -> None:
    """By service, method and status; sources by state."""
    serving = start()
    with ServerClient(serving.url) as client:
        client.publish(_IDENTITY, worker(), "w")
        client.list_sources()
        assert eventually(lambda: 'mx_server_sources{status="ready"} 1.0' in serving.metrics())

    measured = serving.metrics()
    assert (
        'mx_server_rpcs_total{code="OK",method="PublishMetadata",service="model_express.p2p.P2pService"} 1.0'
        in measured
    )
    assert 'mx_server_store_seconds_count{operation="publish"} 1.0' in measured
    assert re.search(r'mx_build_info\{version="[\d.]+"\} 1\.0', measured)


def test_it_ends_well_as_soon_as_it_says_that_it_serves(start: Start) -> None:
    """Whoever waits for that may end it at once."""
    for _ in range(3):
        serving = start()
        serving.process.send_signal(signal.SIGTERM)

        assert 143 == serving.process.wait(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_it_is_told_to(start: Start, number: int) -> None:
    """With the signal's exit code, without a traceback, and once it has told those who watch, who do not keep it."""
    serving = start(MX_DRAIN_SECONDS="3600")
    with open_channel(Endpoint.parse(serving.url)) as channel:
        watch = stub(STANDARD_HEALTH, channel)["Watch"](health_pb2.HealthCheckRequest(), timeout=60)
        states = [next(watch).status]
        serving.process.send_signal(number)
        states += [answer.status for answer in watch]
        assert serving.process.stderr is not None
        said = serving.process.stderr.read()

        assert 128 + number == serving.process.wait(30)
        assert [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING] == states
        assert "Traceback" not in said


def test_what_cannot_be_served_is_told_at_once(mx: Command) -> None:
    """A port that is taken, a store that nobody offers, a value that makes no sense."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        taken = mx("serve", "--host", "127.0.0.1", "--port", port, "--metrics-port", "0")
        taken_metrics = mx("serve", "--host", "127.0.0.1", "--port", "0", "--metrics-port", port)
    unknown = mx("serve", "--metadata", "etcd://localhost")
    wrong = mx("serve", environ={"MODEL_EXPRESS_SERVER_PORT": "many", "MX_GC_TIMEOUT_SECS": "-1"})

    for done, said in (
        (taken, "MODEL_EXPRESS_SERVER_PORT"),
        (taken_metrics, "MODEL_EXPRESS_SERVER_METRICS_PORT"),
        (unknown, "no usable plugin handles the metadata store scheme"),
        (wrong, "MODEL_EXPRESS_SERVER_PORT='many'"),
    ):
        assert 1 == done.returncode, done.stderr
        assert said in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert "MX_GC_TIMEOUT_SECS='-1'" in wrong.stderr


def test_the_commands(start: Start, mx: Command) -> None:
    """`mx health` and `mx sources`, for people and for programs, and without a server."""
    serving = start()
    with ServerClient(serving.url) as client:
        client.publish(_IDENTITY, worker(1, accelerator="[red]h100"), "w-[1]")
    environ = {"MODEL_EXPRESS_URL": f"http://{serving.url}", "COLUMNS": "200"}
    health = mx("health", environ=environ)
    health_data = json.loads(mx("health", "--json", "--url", serving.url).stdout)
    sources = mx("sources", environ=environ)
    [source] = json.loads(mx("sources", "--json", environ=environ).stdout)
    other = mx("sources", "--model", "acme/other", environ=environ)
    nobody = mx("health", "--url", "127.0.0.1:1")
    wrong = mx("health", "--url", "ftp://server")

    assert health.stdout.startswith("ok, version ")
    assert "ok" == health_data["status"]
    for word in ("acme/model", "ready", "w-[1]", _IDENTITY.source_id, "[red]h100"):
        assert word in sources.stdout
    assert ("acme/model", "ready", 1, "w-[1]", _IDENTITY.source_id) == tuple(
        source[key] for key in ("model", "status", "rank", "worker_id", "source_id")
    )
    assert "publisher" not in sources.stdout  # the server authenticates nobody
    assert (None, None) == (source["publisher"], source["publisher_address"])
    assert "no sources" in other.stdout
    assert (1, True) == (nobody.returncode, "check MODEL_EXPRESS_URL" in nobody.stderr)
    assert (2, True) == (wrong.returncode, "host:port" in wrong.stderr)


@pytest.mark.parametrize("url", ["http://admin:hunter2@h:8001", "admin:hunter2@h", "https://a:b@hunter2@h/"])
def test_a_password_in_the_address_of_a_server_is_not_told(mx: Command, url: str) -> None:
    """It is no place for one, and the message says so without it."""
    for done in (mx("health", "--url", url), mx("sources", "--json", environ={"MODEL_EXPRESS_URL": url})):
        assert 2 == done.returncode
        assert "no address of a server" in done.stderr
        assert "hunter2" not in done.stderr + done.stdout
        assert "admin" not in done.stderr


@pytest.fixture
def answering() -> Iterator[Callable[..., str]]:
    """Starts a server of another make, with these sources by status and its own version; its address."""
    servers = []

    def answering(version: str, **by_status: list[p2p_pb2.SourceInstanceRef]) -> str:
        def sources(request: bytes, context: object) -> bytes:
            asked = p2p_pb2.ListSourcesRequest.FromString(request)
            name = p2p_pb2.SourceStatus.Name(asked.status_filter) if asked.HasField("status_filter") else ""
            found = [each for status, listed in by_status.items() if name in ("", status) for each in listed]
            return p2p_pb2.ListSourcesResponse(instances=found).SerializeToString()

        def health(request: bytes, context: object) -> bytes:
            return health_pb2.GetHealthResponse(status="ok", version=version).SerializeToString()

        server = grpc.server(ThreadPoolExecutor(1))
        for service, method, answer in ((P2P, "ListSources", sources), (HEALTH, "GetHealth", health)):
            handlers = {method: grpc.unary_unary_rpc_method_handler(answer)}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.name, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield answering
    for server in servers:
        server.stop(None).wait()


def test_what_others_publish_does_not_steer_the_terminal(answering: Callable[..., str], mx: Command) -> None:
    """Control characters of every sort are shown as escapes, also those that the server itself sends."""
    bad = "\x1b]0;owned\x07\x9b31m\x7f\r\n[red]"
    source = p2p_pb2.SourceInstanceRef(
        mx_source_id="0" * 16 + "\x1b", worker_id=f"w{bad}", model_name=f"m{bad}", accelerator=f"a{bad}"
    )
    url = answering(f"v{bad}", SOURCE_STATUS_READY=[source])

    shown = [mx(*arguments, "--url", url) for arguments in (("sources",), ("health",), ("sources", "--json"))]

    for done in shown:
        assert 0 == done.returncode, done.stderr
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout)
    for word in (r"w\x1b]0;owned\x07\x9b31m\x7f\r\n[red]", r"m\x1b]0", r"a\x1b]0", r"0\x1b"):
        assert word in shown[0].stdout
    assert r"v\x1b]0;owned" in shown[1].stdout
    assert f"m{bad}" == json.loads(shown[2].stdout)[0]["model"]


def test_a_message_does_not_steer_the_terminal(mx: Command) -> None:
    """Whatever is quoted in it."""
    done = mx("serve", "--check", "--config", "/no/such\x9b31m\x85")

    assert r"\x9b31m\x85" in done.stderr
    assert not re.search(r"[\x80-\x9f]", done.stderr)


def test_sources_of_every_status(answering: Callable[..., str], mx: Command) -> None:
    """Those that no list of one status has are there, too; a load that is no number is none, so that JSON is JSON."""
    loads = {"nan": float("nan"), "inf": float("inf"), "half": 0.5}
    sources = [p2p_pb2.SourceInstanceRef(worker_id=name, source_load=load) for name, load in loads.items()]
    other = p2p_pb2.SourceInstanceRef(worker_id="other")
    url = answering("1", SOURCE_STATUS_READY=sources[:2], SOURCE_STATUS_STALE=sources[2:], OF_ANOTHER_VERSION=[other])

    done = mx("sources", "--json", "--url", url)
    table = mx("sources", "--url", url).stdout

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    found = {each["worker_id"]: each for each in json.loads(done.stdout, parse_constant=refuse)}
    assert ["nan", "inf", "half", "other"] == list(found)
    assert [None, None, 0.5, None] == [each["load"] for each in found.values()]
    assert ["ready", "ready", "stale", "silent or unknown"] == [each["status"] for each in found.values()]
    assert "silent or unknown" in table


def test_silent_sources_are_shown(start: Start, mx: Command) -> None:
    """Though the server offers them to nobody, and the reaper has not come by yet."""
    serving = start(MX_HEARTBEAT_TIMEOUT_SECS="0.2", MX_REAPER_SCAN_INTERVAL_SECS="3600")
    with ServerClient(serving.url) as client:
        client.publish(_IDENTITY, worker(), "w")
        assert eventually(lambda: not listed(client, status_filter=READY))

    [source] = json.loads(mx("sources", "--json", "--url", serving.url).stdout)

    assert ("w", "silent or unknown") == (source["worker_id"], source["status"])


def test_watching(start: Start, tmp_path: Path) -> None:
    """Sources that come are shown, until Ctrl-C."""
    serving = start()
    with (tmp_path / "shown").open("w") as shown:
        process = subprocess.Popen(
            with_default_signals(
                [sys.executable, "-m", "modelexpress_core", "sources", "--watch", "--url", serving.url]
            ),
            env={**os.environ, "COLUMNS": "200", "FORCE_COLOR": "1"},
            stdout=shown,
            stderr=subprocess.STDOUT,
        )
        assert eventually(lambda: "no sources" in (tmp_path / "shown").read_text())
        with ServerClient(serving.url) as client:
            client.publish(_IDENTITY, worker(), "w")
        came = eventually(lambda: "acme/model" in (tmp_path / "shown").read_text())
        process.send_signal(signal.SIGINT)

        assert came
        assert 130 == process.wait(30)
        assert "Traceback" not in (tmp_path / "shown").read_text()


def test_a_call_that_finds_no_server_is_made_again() -> None:
    """A few times; what is answered then counts."""
    asked: list[bytes] = []

    def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
        asked.append(data)
        if len(asked) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return health_pb2.GetHealthResponse(status="ok").SerializeToString()

    handlers = {"GetHealth": grpc.unary_unary_rpc_method_handler(answer)}
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(HEALTH.name, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with ServerClient(f"127.0.0.1:{port}") as client:
            assert "ok" == client.health().status
    finally:
        server.stop(None).wait()

    assert 3 == len(asked)


def test_errors_of_the_client_name_the_cause(start: Start) -> None:
    """Nobody there, TLS where there is none, and a port where another program listens."""
    serving = start()
    for url, error, said in (
        ("127.0.0.1:1", UnavailableError, "no server listens there"),
        (f"https://{serving.url}", UnavailableError, "TLS"),
        (
            serving.metrics_url.removesuffix("/metrics"),
            (UnavailableError, UnsupportedError),
            "check",
        ),
    ):
        with ServerClient(url, deadline_seconds=5) as client, pytest.raises(error) as raised:
            client.health()
        assert said in str(raised.value)
        assert "GetHealth" in str(raised.value)
