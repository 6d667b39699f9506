"""Workers that publish themselves to a real server: heartbeats, outages, and every way to end."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.sources import publishing
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.publishing import Publisher, withdraw_on_exit
from modelexpress_core.wire.identities import identity_to_message
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from modelexpress_core.wire.rpc import P2P
from tests.support.serving import Serving
from tests.support.signals import with_default_signals
from tests.support.waiting import eventually

_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = Path(__file__).with_name("publishing_worker.py")
_IDENTITY = SourceIdentity("acme/model")
_WORKER = p2p_pb2.WorkerMetadata(worker_rank=3, agent_name="agent")

READY, STALE = p2p_pb2.SOURCE_STATUS_READY, p2p_pb2.SOURCE_STATUS_STALE
INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING

Start = Callable[..., Serving]


def workers(client: ServerClient, status: Any = READY) -> list[str]:
    request = p2p_pb2.ListSourcesRequest(identity=identity_to_message(_IDENTITY), status_filter=status)
    return sorted(source.worker_id for source in client.list_sources(request))


def status_of(client: ServerClient, worker_id: str) -> str:
    answer = client.metadata(_IDENTITY.source_id, worker_id)
    assert answer.found
    return p2p_pb2.SourceStatus.Name(answer.worker.status)


@pytest.fixture
def run(start: Start) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a worker in a process of its own, and returns when the server has it as ready."""
    with ExitStack() as stack:

        def run(url: str, worker_id: str, mode: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                with_default_signals([sys.executable, str(_PROGRAM), url, worker_id, mode]),
                env={**os.environ, "PYTHONPATH": str(_ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert "ready\n" == process.stdout.readline(), process.communicate()[1]
            return process

        yield run


# -- a life ------------------------------------------------------------------------------------------------------------


def test_from_the_start_to_the_end(start: Start) -> None:
    """Initializing until it is ready, alive while heartbeats come, with its load, and stale as soon as it ends."""
    loads = iter([0.25, 7.0])
    with ServerClient(start(MX_HEARTBEAT_TIMEOUT_SECS="2").url) as client:
        with Publisher(
            client, _IDENTITY, _WORKER, "w", interval_seconds=0.3, load=lambda: next(loads, 0.5)
        ) as publisher:
            assert eventually(lambda: workers(client, INITIALIZING))
            before = workers(client)
            publisher.ready()
            assert eventually(lambda: workers(client))
            [reference] = client.list_sources()
            said = client.metadata(_IDENTITY.source_id, "w").worker
            assert eventually(
                lambda: publisher.state.heartbeats >= 12
            )  # it has been alive for longer than silence may last
            alive = workers(client)
            state = publisher.state
        after = workers(client, STALE)

    assert ([], ["w"], ["w"]) == (before, alive, after)
    assert reference.source_load in {0.25, 1.0, 0.5}
    assert ("agent", 3) == (said.agent_name, said.worker_rank)
    assert ("ready", 1, 0, "") == (state.status, state.published, state.failures, state.last_error)
    assert state.seconds_since_success is not None
    assert "stale" == publisher.state.status


def test_being_ready_is_told_at_once(start: Start) -> None:
    """Nobody waits for the next heartbeat, nor for the first."""
    with ServerClient(start().url) as client:
        with Publisher(client, _IDENTITY, _WORKER, "w", interval_seconds=3600) as publisher:
            assert eventually(lambda: workers(client, INITIALIZING))
            publisher.ready()
            assert eventually(lambda: workers(client))

        assert ["w"] == workers(client, STALE)


def test_withdrawing_ends_all(start: Start) -> None:
    """A second time changes nothing, and nothing makes it ready again."""
    with ServerClient(start().url) as client:
        publisher = Publisher(client, _IDENTITY, _WORKER, "w", interval_seconds=0.05)
        never_started = Publisher(client, _IDENTITY, _WORKER, "other", interval_seconds=0.05)
        publisher.start()
        publisher.ready()
        assert eventually(lambda: workers(client))
        told = publisher.withdraw()
        beats = publisher.state.heartbeats
        publisher.ready()
        told_again = publisher.withdraw()
        time.sleep(0.5)  # ten heartbeats, if there were any

        assert (True, True, True) == (told, told_again, never_started.withdraw())
        assert beats == publisher.state.heartbeats
        assert ["w"] == workers(client, STALE)
        assert [] == workers(client)


def test_outside_the_main_thread_only_exit_can_be_noticed() -> None:
    """Python lets no other thread set handlers; nobody's handler is touched."""
    before = signal.getsignal(signal.SIGTERM)
    with ServerClient("127.0.0.1:1") as client:
        publisher = Publisher(client, _IDENTITY, _WORKER, "w", interval_seconds=1)
        thread = threading.Thread(target=withdraw_on_exit, args=[publisher])
        thread.start()
        thread.join()

    assert publisher in [each() for each in publishing._publishers]
    assert before is signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_an_interval_is_above_zero(seconds: float) -> None:
    """Nothing else that is wrong keeps a worker from publishing."""
    with ServerClient("127.0.0.1:1") as client, pytest.raises(ValueError, match="interval_seconds"):
        Publisher(client, _IDENTITY, _WORKER, "w", interval_seconds=seconds)


def test_a_load_that_cannot_be_told_is_left_out(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """Heartbeats go on without it, and the log says so once."""

    def load() -> float:
        message = "no such gauge"
        raise LookupError(message)

    with (
        caplog.at_level(logging.WARNING),
        ServerClient(start().url) as client,
        Publisher(client, _IDENTITY, _WORKER, "w", interval_seconds=0.05, load=load) as publisher,
    ):
        publisher.ready()
        assert eventually(lambda: publisher.state.heartbeats >= 5)
        [reference] = client.list_sources()

    assert not reference.HasField("source_load")
    assert 1 == len(caplog.records)
    assert "no such gauge" in caplog.text


# -- outages -----------------------------------------------------------------------------------------------------------


def test_after_a_restart_all_are_back_within_one_heartbeat(start: Start, run: Any) -> None:
    """The server loses all that it knew: those that live publish again, and nobody else is offered.

    Each publisher tries at most a tenth of an interval after its last failure, and each sends a heartbeat in each
    interval. So all are back within one, and the time that 20 of them need for a call.
    """
    interval = 4.0
    serving = start()
    port = serving.url.rpartition(":")[2]
    run(serving.url, "dead", "wait").kill()
    with ExitStack() as stack:
        client = stack.enter_context(ServerClient(serving.url))
        publishers = [
            stack.enter_context(Publisher(client, _IDENTITY, _WORKER, f"w-{i:02}", interval_seconds=interval))
            for i in range(20)
        ]
        for publisher in publishers:
            publisher.ready()
        names = [f"w-{i:02}" for i in range(20)]
        assert eventually(lambda: set(names) <= set(workers(client)))
        serving.end()
        assert eventually(lambda: any(publisher.state.failures for publisher in publishers))
        start("--port", port)
        restarted = time.monotonic()
        listed: set[str] = set()
        while not set(names) <= listed:
            assert time.monotonic() < restarted + 60, listed
            listed |= set(workers(client))
            time.sleep(0.02)
        took = time.monotonic() - restarted
        published = [publisher.state.published for publisher in publishers]
        stale = workers(client, STALE)

    assert set(names) == listed
    assert [2] * 20 == published
    assert [] == stale
    assert took < interval + 2.5, f"{took:.2f} s"


def test_after_a_long_outage_it_is_found_soon(start: Start) -> None:
    """The connection is tried again every second or so, however long the server was away."""
    serving = start()
    port = serving.url.rpartition(":")[2]
    with (
        ServerClient(serving.url) as client,
        Publisher(client, _IDENTITY, _WORKER, "w", interval_seconds=5) as publisher,
    ):
        publisher.ready()
        assert eventually(lambda: publisher.state.status == "ready")
        serving.end()
        assert eventually(lambda: publisher.state.failures_in_a_row >= 3)
        start("--port", port)
        restarted = time.monotonic()
        assert eventually(lambda: publisher.state.published == 2)
        took = time.monotonic() - restarted

    assert took < 5 + 2.5, f"{took:.2f} s"


def test_an_outage_is_no_storm() -> None:
    """A fleet that cannot be served asks a few times in each interval, and does not keep its server down."""
    asked = Counter[str]()

    def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
        asked["calls"] += 1
        context.abort(grpc.StatusCode.UNAVAILABLE, "the store is away")
        raise AssertionError

    server = grpc.server(ThreadPoolExecutor(4))
    handlers = {name: grpc.unary_unary_rpc_method_handler(answer) for name in P2P.methods}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(P2P.name, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with (
            ServerClient(f"127.0.0.1:{port}") as client,
            Publisher(client, _IDENTITY, _WORKER, "w", interval_seconds=3) as publisher,
        ):
            for _ in range(600):
                publisher.ready()
                time.sleep(0.01)
            before_the_end = asked["calls"]
    finally:
        server.stop(None).wait()

    assert 2 <= before_the_end < 40


def test_an_outage_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """However long it lasts; and the end of the worker does not wait for the server."""
    with caplog.at_level(logging.WARNING), ServerClient("127.0.0.1:1") as client:
        publisher = Publisher(client, _IDENTITY, _WORKER, "w", interval_seconds=0.2)
        publisher.start()
        assert eventually(lambda: publisher.state.failures >= 5)
        begun = time.monotonic()
        told = publisher.withdraw(1.0)
        took = time.monotonic() - begun
        assert eventually(lambda: publisher._ended)

    assert not told
    assert took < 1.5
    assert 1 == len(caplog.records), caplog.text
    assert "no server listens there" in caplog.text


class _Answering:
    """A server that answers with what it is told to: `answers(method)` is a status, a response, or None to wait."""

    def __init__(self, answers: Callable[[str, Any], Any]) -> None:
        def handler(name: str) -> grpc.RpcMethodHandler[Any, Any]:
            def answer(request: Any, context: grpc.ServicerContext) -> Any:
                said = answers(name, request)
                if isinstance(said, tuple):
                    context.abort(*said)
                return said

            method = P2P.methods[name]
            return grpc.unary_unary_rpc_method_handler(
                answer, method.request.FromString, method.response.SerializeToString
            )

        self._server = grpc.server(ThreadPoolExecutor(4))
        handlers = {name: handler(name) for name in P2P.methods}
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(P2P.name, handlers)])
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> _Answering:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()


@pytest.mark.parametrize(
    "refusal",
    [
        (grpc.StatusCode.PERMISSION_DENIED, "not you"),
        (grpc.StatusCode.INTERNAL, "not you"),
        p2p_pb2.PublishMetadataResponse(success=False, message="not you"),
    ],
    ids=["denied", "broken", "refused"],
)
def test_a_refusal_is_logged_once_and_tried_again(refusal: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Each interval, until the server thinks better of it."""
    asked: list[str] = []

    def answers(method: str, _request: Any) -> Any:
        asked.append(method)
        if len(asked) < 5:
            return refusal
        responses = {
            "PublishMetadata": p2p_pb2.PublishMetadataResponse(success=True, mx_source_id="elsewhere"),
            "UpdateStatus": p2p_pb2.UpdateStatusResponse(success=True),
        }
        return responses[method]

    with (
        caplog.at_level(logging.INFO, "modelexpress_core.sources"),
        _Answering(answers) as server,
        ServerClient(server.url) as client,
        Publisher(client, _IDENTITY, _WORKER, "w", interval_seconds=0.1) as publisher,
    ):
        assert eventually(lambda: publisher.state.published)
        state = publisher.state

    said = [record.getMessage() for record in caplog.records]
    assert 1 == len([message for message in said if "not you" in message]), said
    assert 1 == len([message for message in said if "again" in message]), said
    assert (4, 0, "") == (state.failures, state.failures_in_a_row, state.last_error)


def test_nothing_is_ready_after_a_withdrawal_in_the_middle_of_a_heartbeat() -> None:
    """The heartbeat that is under way ends first; the last word is that the record is stale."""
    said: list[int] = []
    beating, go_on = threading.Event(), threading.Event()

    def answers(method: str, request: Any) -> Any:
        if method == "PublishMetadata":
            return p2p_pb2.PublishMetadataResponse(success=True, mx_source_id="id")
        if request.status == READY:
            beating.set()
            assert go_on.wait(60)
        said.append(request.status)
        return p2p_pb2.UpdateStatusResponse(success=True)

    with _Answering(answers) as server, ServerClient(server.url) as client:
        publisher = Publisher(client, _IDENTITY, _WORKER, "w", interval_seconds=0.05)
        publisher.start()
        publisher.ready()
        assert beating.wait(60)
        told_in_time = publisher.withdraw(0.1)
        go_on.set()
        assert eventually(lambda: publisher._ended)

    assert not told_in_time
    assert STALE == said[-1]
    assert [READY, STALE] == [status for status in said if status != INITIALIZING]


def test_heartbeats_of_a_fleet_do_not_come_in_step() -> None:
    """Workers that start together spread their heartbeats over the interval."""
    interval, count = 2.0, 20
    times: dict[str, float] = {}

    def answers(method: str, request: Any) -> Any:
        if method == "PublishMetadata":
            return p2p_pb2.PublishMetadataResponse(success=True, mx_source_id="id")
        times.setdefault(request.worker_id, time.monotonic())
        return p2p_pb2.UpdateStatusResponse(success=True)

    with ExitStack() as stack:
        server = stack.enter_context(_Answering(answers))
        client = stack.enter_context(ServerClient(server.url))
        for i in range(count):
            stack.enter_context(Publisher(client, _IDENTITY, _WORKER, str(i), interval_seconds=interval))
        assert eventually(lambda: len(times) == count)

    moments = sorted(times.values())
    assert moments[-1] - moments[0] > interval / 4
    assert max(later - earlier for earlier, later in pairwise(moments)) < interval * 0.75


# -- how processes end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "number", "code"),
    [
        ("return", None, 0),
        ("raise", None, 1),
        ("wait", signal.SIGTERM, -signal.SIGTERM),
        ("handler", signal.SIGTERM, 7),
        ("wait", signal.SIGINT, -signal.SIGINT),
        ("busy", signal.SIGTERM, -signal.SIGTERM),
        ("locked", signal.SIGTERM, -signal.SIGTERM),
    ],
    ids=[
        "it returns",
        "it raises",
        "SIGTERM",
        "SIGTERM with a handler",
        "Ctrl-C",
        "SIGTERM in the middle of calls",
        "SIGTERM while it holds the lock of the log",
    ],
)
def test_a_process_that_ends_is_offered_no_more(
    start: Start, run: Any, mode: str, number: int | None, code: int
) -> None:
    """At once, though silence would be noticed only much later; and it ends as it would have without us."""
    url = start().url
    process = run(url, "w", mode)
    if number is not None:
        process.send_signal(number)
    printed, errors = process.communicate(timeout=60)

    with ServerClient(url) as client:
        assert "SOURCE_STATUS_STALE" == status_of(client, "w"), errors
    assert code == process.returncode, errors
    assert ("handled\n" if mode == "handler" else "") == printed


def test_a_process_that_ignores_sigterm_goes_on(start: Start, run: Any) -> None:
    """It is still offered."""
    url = start().url
    process = run(url, "w", "ignore")
    with ServerClient(url) as client:
        process.send_signal(signal.SIGTERM)
        before = client.list_sources()[0].updated_at
        assert eventually(lambda: client.list_sources()[0].updated_at > before + 1000)

        assert ["w"] == workers(client)
        assert process.poll() is None


def test_sigterm_without_a_server_ends_the_process_soon(start: Start, run: Any) -> None:
    """It waits two seconds for the server, and no longer."""
    serving = start()
    process = run(serving.url, "w", "wait")
    serving.end()
    process.send_signal(signal.SIGTERM)

    assert -signal.SIGTERM == process.wait(20)


@pytest.mark.parametrize(("mode", "code"), [("fork", 3), ("fork and SIGTERM", -signal.SIGTERM)])
def test_a_child_that_ends_leaves_its_parent_as_it_is(start: Start, run: Any, mode: str, code: int) -> None:
    """Forked children have the same exit functions and signal handlers; the record is not theirs."""
    url = start().url
    process = run(url, "w", mode)
    assert process.stdout is not None
    child = process.stdout.readline().split()
    with ServerClient(url) as client:
        after = client.list_sources()[0].updated_at
        assert eventually(lambda: client.list_sources()[0].updated_at > after)  # and heartbeats go on

        assert ["child", str(code)] == child
        assert "SOURCE_STATUS_READY" == status_of(client, "w")


@pytest.mark.parametrize("seconds", [-86_400 * 365, 86_400 * 365])
def test_a_worker_whose_clock_is_wrong_is_offered_like_others(start: Start, run: Any, seconds: int) -> None:
    """Neither left out while it lives nor offered when it is dead: only the server's clock counts."""
    url = start(MX_HEARTBEAT_TIMEOUT_SECS="3", MX_REAPER_SCAN_INTERVAL_SECS="0.5").url
    process = run(url, "w", f"clock {seconds}")
    with ServerClient(url) as client:
        first = client.list_sources()[0].updated_at
        assert eventually(lambda: client.list_sources()[0].updated_at > first + 4000)
        alive = workers(client)
        process.kill()
        process.wait()
        assert eventually(lambda: workers(client, STALE))

        assert ["w"] == alive
        assert [] == workers(client)
        assert abs(first / 1000 - time.time()) < 60


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_example_of_the_page_runs(start: Start) -> None:
    """As it stands, with nothing but the address of the server."""
    url = start().url
    section = (_ROOT / "docs" / "server.md").read_text().partition("## Publishing from Python")[2]
    match = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert match is not None
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", match[1]],
        env={**os.environ, "PYTHONPATH": str(_ROOT), "MODEL_EXPRESS_URL": url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    with ServerClient(url) as client:
        [source] = client.list_sources()
        metadata = client.metadata(source.mx_source_id, source.worker_id)

    assert "PublishingState(status='stale', published=1" in done.stdout
    assert ("acme/model", STALE) == (source.model_name, metadata.worker.status)
    assert 16 == len(source.layout_signature)
