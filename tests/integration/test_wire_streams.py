"""Calls with streams in both directions, of messages and of raw frames, between our client and a real server."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from opentelemetry import trace

from modelexpress_core.contracts.authenticator import Call, Refusal, RefusedError
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    NotFoundError,
    UnavailableError,
)
from modelexpress_core.server.calls import LoggingInterceptor
from modelexpress_core.server.interceptors import MetricsInterceptor
from modelexpress_core.server.metrics import ServerMetrics
from modelexpress_core.wire.authentication import caller
from modelexpress_core.wire.channel import open_channel
from modelexpress_core.wire.client import Security
from modelexpress_core.wire.interception import CallScope, Interceptor
from modelexpress_core.wire.settings import TlsSettings, TokenSettings
from tests.support.echo import ECHO, RAW, Echo, EchoClient, message, serving, texts

_REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving() as port:
        yield port


@pytest.fixture
def client(port: int) -> Iterator[EchoClient]:
    with EchoClient(port) as client:
        yield client


def test_every_kind_of_call(client: EchoClient) -> None:
    """One or many requests and responses arrive whole and in order."""
    assert "0" == client.call("One", message("1 OK")).service
    assert ["0", "1", "2"] == texts(client.stream("Many", message("3 OK")))
    assert "abc" == client.call("Collect", map(message, "abc")).service
    assert list("abc") == texts(client.stream("Both", [message(text) for text in "abc"]))
    assert [] == list(client.stream("Both", []))


def test_raw_frames(client: EchoClient) -> None:
    """Bytes of any content and length pass as they are, also those that are no message."""
    frames = [b"", b"\xff\xff\xff", bytes(range(256)) * 4096, b"x"]

    assert frames == list(client.stream("Both", frames, service=RAW))
    assert b"".join(frames) == client.call("Collect", iter(frames), service=RAW)
    assert b"2 OK" == client.call("One", b"2 OK", service=RAW)
    assert [b"2 OK"] * 2 == list(client.stream("Many", b"2 OK", service=RAW))


def test_requests_and_responses_alternate(client: EchoClient) -> None:
    """A request that depends on the response before it: neither side waits for the end of the other's stream."""
    answered = threading.Semaphore(0)

    def requests() -> Iterator[Any]:
        yield message("0")
        for number in range(1, 20):
            answered.acquire()
            yield message(str(number))

    seen = []
    for response in client.stream("Both", requests()):
        seen.append(response.service)
        answered.release()

    assert [str(number) for number in range(20)] == seen


@pytest.mark.parametrize(
    ("method", "request_of", "before"),
    [
        ("Many", lambda status: message(f"0 {status}"), []),
        ("Many", lambda status: message(f"3 {status}"), ["0", "1", "2"]),
        ("Both", lambda status: [message(f"end {status}")], []),
        ("Both", lambda status: [message("a"), message(f"end {status}"), message("b")], ["a"]),
    ],
    ids=["first", "after-the-last", "first-of-both", "middle-of-both"],
)
@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("NOT_FOUND", NotFoundError),
        ("PERMISSION_DENIED", AccessDeniedError),
        ("UNAVAILABLE", UnavailableError),
        ("INTERNAL", BackendError),
    ],
)
def test_an_error_within_a_stream_is_one_of_ours(
    client: EchoClient,
    method: str,
    request_of: Callable[[str], Any],
    before: list[str],
    status: str,
    error: type[BackendError],
) -> None:
    """Wherever it arises; what came before it is delivered, and it is raised again and again."""
    stream = client.stream(method, request_of(status))
    received = []

    with pytest.raises(error, match=f"the server answered {status}: as asked") as raised:
        while True:
            received.append(next(stream).service)

    assert before == received
    assert error is type(raised.value)
    assert f"call {method}" == raised.value.operation
    assert raised.value.uri is not None
    with pytest.raises(error):
        next(stream)


def test_a_unary_response_to_a_stream_that_fails(client: EchoClient) -> None:
    """An error of a call with a stream of requests alone is one of ours."""
    with pytest.raises(UnavailableError, match="no server listens there"), EchoClient(1) as nowhere:
        nowhere.call("Collect", [message("a")], deadline_seconds=5.0)
    with pytest.raises(NotFoundError, match="the server answered NOT_FOUND: as asked"):
        client.call("Collect", [message("a"), message("end NOT_FOUND"), message("b")])


@pytest.mark.parametrize(
    ("make", "requests"),
    [
        ("unary_unary", b"\xff"),
        ("unary_stream", b"\xff"),
        ("stream_unary", [b"\n\x01a", b"\xff"]),
        ("stream_stream", [b"\n\x01a", b"\xff"]),
    ],
)
def test_undecodable_requests_are_invalid(port: int, make: str, requests: Any) -> None:
    """In a stream also behind good ones, whose responses arrive; the caller is told, not the server blamed."""
    method = {"unary_unary": "One", "unary_stream": "Many", "stream_unary": "Collect", "stream_stream": "Both"}[make]
    received = []
    with open_channel(Endpoint("127.0.0.1", port)) as channel, pytest.raises(grpc.RpcError) as raised:
        call = getattr(channel, make)(ECHO.path(method))
        answer = call(iter(requests) if isinstance(requests, list) else requests, timeout=10)
        if make.endswith("stream"):
            while True:
                received.append(next(answer))

    assert grpc.StatusCode.INVALID_ARGUMENT == raised.value.code()
    assert "no HealthCheckRequest" in str(raised.value.details())
    assert ([b"\n\x01a"] if make == "stream_stream" else []) == received


@pytest.mark.parametrize("method", ["Many", "Both"])
def test_a_deadline_within_a_stream(port: int, method: str) -> None:
    """Ends it with a DeadlineError, after what had arrived; the deadline is the client's, or that of the call."""
    hanging = message("2 HANG") if method == "Many" else [message("0"), message("1"), message("end HANG")]
    received: list[str] = []

    begun = time.monotonic()
    with EchoClient(port, deadline_seconds=0.5) as hasty, pytest.raises(DeadlineError):
        stream = hasty.stream(method, hanging)
        while True:
            received.append(next(stream).service)
    by_default = time.monotonic() - begun
    begun = time.monotonic()
    with EchoClient(port, deadline_seconds=60.0) as patient, pytest.raises(DeadlineError):
        list(patient.stream(method, hanging, deadline_seconds=0.5))

    assert ["0", "1"] == received
    assert by_default < 10
    assert time.monotonic() - begun < 10


def test_a_stream_without_a_deadline(port: int) -> None:
    """Outlives the deadline of its client."""
    go_on = threading.Event()

    def requests() -> Iterator[Any]:
        yield message("a")
        go_on.wait(10)
        yield message("b")

    with EchoClient(port, deadline_seconds=0.3) as hasty:
        stream = hasty.stream("Both", requests(), deadline_seconds=math.inf)
        first = next(stream).service
        time.sleep(0.6)
        go_on.set()
        assert ["a", "b"] == [first, *texts(stream)]


@pytest.mark.parametrize("way", ["close", "with", "garbage", "break"])
def test_a_stream_that_is_left_is_cancelled(way: str) -> None:
    """Its server learns so, and does not go on for nobody."""
    echo = Echo()

    def first(client: EchoClient) -> None:
        for _ in client.stream("Many", message("2 HANG")):
            break

    with serving(echo) as port, EchoClient(port) as client:
        if way == "break":
            first(client)
            gc.collect()
        else:
            stream = client.stream("Many", message("2 HANG"))
            next(stream)
            if way == "close":
                stream.close()
            elif way == "with":
                with stream:
                    assert "1" == next(stream).service
            else:
                del stream
                gc.collect()

        assert echo.cancelled.wait(10)


def test_a_stream_that_was_closed_does_not_look_complete(client: EchoClient) -> None:
    """Its next response is an error, also in a thread that waits for it; a complete one may be closed."""
    stream = client.stream("Many", message("1 HANG"))
    next(stream)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            next(stream)
        except UnavailableError as exc:
            raised.append(exc)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.2)
    stream.close()
    waiting.join(10)

    assert [UnavailableError] == [type(exc) for exc in raised]
    with pytest.raises(UnavailableError, match="closed on this side"):
        next(stream)
    complete = client.stream("Many", message("1 OK"))
    assert ["0"] == texts(complete)
    complete.close()
    assert [] == list(complete)


def test_a_client_that_is_closed_ends_its_streams(port: int) -> None:
    """With the error that says so, which is not to be retried."""
    with EchoClient(port) as client:
        stream = client.stream("Many", message("1 HANG"))
        next(stream)
        client.close()
        with pytest.raises(UnavailableError, match="closed on this side") as raised:
            next(stream)
        with pytest.raises(UnavailableError, match="closed on this side"):
            client.stream("Many", message("1 OK"))

    assert not raised.value.retryable


@pytest.mark.parametrize("method", ["Collect", "Both"])
def test_what_the_requests_raise_reaches_the_caller(client: EchoClient, method: str) -> None:
    """As it is: gRPC would report a call that the server refused."""

    def requests() -> Iterator[Any]:
        yield message("a")
        raise LookupError("of the caller")

    with pytest.raises(LookupError, match="of the caller"):
        if method == "Collect":
            client.call(method, requests())
        else:
            list(client.stream(method, requests()))


def test_a_server_that_is_killed_within_a_stream() -> None:
    """Is an UnavailableError, after what had arrived; a new call finds that no server listens any more."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.echo"],
        cwd=_REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process, EchoClient(int(process.stdout.readline())) as client:
        stream = client.stream("Many", message("2 HANG"))
        received = [next(stream).service, next(stream).service]
        process.kill()
        with pytest.raises(UnavailableError) as raised:
            next(stream)
        process.wait()
        time.sleep(1.0)  # a server is diagnosed once a second
        with pytest.raises(UnavailableError, match="no server listens there"):
            client.call("One", message("1 OK"), deadline_seconds=2.0)

    assert ["0", "1"] == received
    assert raised.value.retryable


def test_a_server_that_is_stopped_within_a_stream() -> None:
    """Is an UnavailableError, and not one of the caller's: another server, or the same one later, may answer."""
    with serving() as port:
        client = EchoClient(port)
        stream = client.stream("Many", message("1 HANG"))
        next(stream)
    with client, pytest.raises(UnavailableError) as raised:
        next(stream)

    assert raised.value.retryable


# -- interceptors ------------------------------------------------------------------------------------------------------


class Doorman:
    by_certificate = False

    async def authenticate(self, call: Call) -> str:
        if call.token != "open-sesame":
            raise RefusedError(Refusal.UNAUTHENTICATED, "not the word")
        return "ali"


class Watching(Interceptor):
    """Notes the caller and the end of each call."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def scope(self, details: grpc.HandlerCallDetails) -> CallScope:
        import contextlib

        @contextlib.asynccontextmanager
        async def noted(context: Any) -> Any:
            try:
                yield
            finally:
                self.seen.append((details.method.rpartition("/")[2], caller.get()))

        return noted


def _all_kinds(client: EchoClient) -> list[Callable[[], object]]:
    return [
        lambda: client.call("One", message("1 OK")),
        lambda: list(client.stream("Many", message("1 OK"))),
        lambda: client.call("Collect", [message("a")]),
        lambda: list(client.stream("Both", [message("a")])),
    ]


def _secrets(tmp_path: Path, word: str, tls: TlsSettings | None = None) -> Security:
    token = tmp_path / f"token-{len(word)}"
    token.write_text(word)
    return Security(tls or TlsSettings(), TokenSettings(str(token)))


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
def test_tokens_decide_for_every_kind(tmp_path: Path, with_tls: bool) -> None:
    """Also over TLS: those who have none are refused before a message of theirs is read."""
    tls, trusting = None, None
    if with_tls:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        pair = str(tmp_path / "pair.pem")
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pair)
        tls, trusting = TlsSettings(certificate=pair, key=pair), TlsSettings(str(tmp_path / "ca.pem"))
    watching = Watching()
    with serving(authenticator=Doorman(), interceptors=[watching], tls=tls) as port:
        with EchoClient(port, security=_secrets(tmp_path, "open-sesame", trusting)) as known:
            for call in _all_kinds(known):
                call()
        with EchoClient(port, security=_secrets(tmp_path, "wrong", trusting)) as stranger:
            for call in _all_kinds(stranger):
                with pytest.raises(AccessDeniedError, match="not the word"):
                    call()

    methods = ["One", "Many", "Collect", "Both"]
    assert [(method, "ali") for method in methods] == watching.seen[:4]
    assert [(method, "") for method in methods] == watching.seen[4:]


class Broken:
    """Neither names a caller nor refuses the call."""

    by_certificate = False

    def __init__(self, result: object) -> None:
        self._result = result

    async def authenticate(self, call: Call) -> Any:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


@pytest.mark.parametrize("result", [ValueError("secret"), "", None], ids=["raises", "empty", "none"])
def test_an_authenticator_that_fails_admits_nobody(
    tmp_path: Path, result: object, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer is INTERNAL for every kind, without the reason, which is in the log."""
    with serving(authenticator=Broken(result)) as port, EchoClient(port) as client:
        for call in _all_kinds(client):
            with pytest.raises(BackendError, match="INTERNAL: the server could not authenticate the caller") as raised:
                call()
            assert "secret" not in str(raised.value)

    assert 4 == len([record for record in caplog.records if record.name.endswith("wire.authentication")])


def test_logs_and_metrics_see_every_kind(caplog: pytest.LogCaptureFixture) -> None:
    """With the status of each, also of one that fails within its stream and of one that is cancelled."""
    caplog.set_level("DEBUG", "modelexpress_core.server")
    metrics = ServerMetrics()
    echo = Echo()
    interceptors = [LoggingInterceptor(), MetricsInterceptor(metrics)]
    with serving(echo, interceptors=interceptors) as port, EchoClient(port) as client:
        for call in _all_kinds(client):
            call()
        with pytest.raises(NotFoundError):
            list(client.stream("Both", [message("a"), message("end NOT_FOUND")]))
        with client.stream("Many", message("1 HANG")) as stream:
            next(stream)
        assert echo.cancelled.wait(10)

    logged = sorted((vars(each)["method"], vars(each)["code"]) for each in caplog.records if hasattr(each, "method"))
    expected = [(method, "OK") for method in ("One", "Many", "Collect", "Both")]
    expected = sorted([*expected, ("Both", "NOT_FOUND"), ("Many", "CANCELLED")])
    assert expected == logged
    for method, code in expected:
        labels = {"service": "acme.Echo", "method": method, "code": code}
        assert 1.0 == metrics.registry.get_sample_value("mx_server_rpcs_total", labels)


def test_the_trace_context_goes_with_every_kind() -> None:
    """As ``traceparent`` in the metadata of each call."""
    seen: list[str] = []

    class Noting(Interceptor):
        def scope(self, details: grpc.HandlerCallDetails) -> None:
            seen.append(dict(details.invocation_metadata or ())["traceparent"])

    number = 0x0AF7651916CD43DD8448EB211C80319C
    span = trace.NonRecordingSpan(trace.SpanContext(number, 0xB7AD6B7169203331, is_remote=False))
    with serving(interceptors=[Noting()]) as port, EchoClient(port) as client, trace.use_span(span):
        for call in _all_kinds(client):
            call()

    assert [f"00-{number:032x}-b7ad6b7169203331-00"] * 4 == seen
