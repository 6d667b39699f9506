"""Buckets in another region than the configured one are found, and remembered."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme

from modelexpress_core.errors import BackendError
from mx_s3._storage import S3Storage

CONTENT = os.urandom(64 * 10_000)

#: How S3 says that a bucket is elsewhere: status, code, whether the header and the body name the region.
WAYS = [
    pytest.param((301, "PermanentRedirect", True, False), id="301"),
    pytest.param((400, "AuthorizationHeaderMalformed", False, True), id="400 with the region in the body"),
    pytest.param((400, "AuthorizationHeaderMalformed", True, True), id="400 with the region in both"),
    pytest.param((400, "IllegalLocationConstraintException", True, False), id="400 of an opt-in region"),
]


class OtherRegion:
    """An answer to requests that are signed for another region than the bucket's."""

    def __init__(self, region: str, way: tuple[int, str, bool, bool]) -> None:
        self.region = region
        self.redirects = 0
        self.requests = 0
        self._way = way
        self._lock = threading.Lock()

    def __call__(self, request: Any) -> Any:
        return self.asked_at(request.region, request)

    def asked_at(self, region: str, request: Any) -> Any:
        with self._lock:
            self.requests += 1
            if region == self.region:
                return None
            self.redirects += 1
        status, code, in_header, in_body = self._way
        region = f"<Region>{self.region}</Region>" if in_body else ""
        body = f"<Error><Code>{code}</Code><Message>elsewhere</Message>{region}</Error>"
        # A HEAD has no body, and S3 names the region in its header.
        headers = {"x-amz-bucket-region": self.region} if in_header or request.method == "HEAD" else {}
        return status, headers, b"" if request.method == "HEAD" else body.encode()


def _read(storage: S3Storage, part: int) -> bytes:
    memory = bytearray(10_000)
    storage.read_into("regions/object", part * 10_000, memoryview(memory), version=None)
    return bytes(memory)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", ["list", "stat", "read"])
def test_a_bucket_in_another_region_is_found_and_remembered(
    fronted: Callable[..., str], opened: Callable[..., S3Storage], put: Callable[..., str], way: Any, first: str
) -> None:
    """Whatever is asked first is led to the region, once; what comes later goes there at once, in all threads."""
    put("regions/object", CONTENT)
    answer = OtherRegion("eu-west-3", way)
    storage = opened(AWS_ENDPOINT_URL=fronted(answer))
    calls: dict[str, Callable[[], object]] = {
        "list": lambda: [info.path for info in storage.list("regions")],
        "stat": lambda: storage.stat("regions/object").size,
        "read": lambda: _read(storage, 0),
    }
    expected: dict[str, object] = {"list": ["regions/object"], "stat": len(CONTENT), "read": CONTENT[:10_000]}

    answered = {first: calls[first](), **{name: call() for name, call in calls.items() if name != first}}
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda part: _read(storage, part), range(64)))

    assert expected == answered
    assert CONTENT == b"".join(parts)
    assert 1 == answer.redirects
    assert 1 + 3 + 64 == answer.requests


def test_many_threads_that_ask_first(
    fronted: Callable[..., str], opened: Callable[..., S3Storage], put: Callable[..., str]
) -> None:
    """Each of them is redirected once at most."""
    put("regions/object", CONTENT)
    answer = OtherRegion("eu-west-3", (301, "PermanentRedirect", True, False))
    storage = opened(AWS_ENDPOINT_URL=fronted(answer))
    barrier = threading.Barrier(16)

    def read(part: int) -> bytes:
        if part < 16:
            barrier.wait(10)
        return _read(storage, part)

    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(read, range(64)))

    assert CONTENT == b"".join(parts)
    assert 1 <= answer.redirects <= 16


class Amazon:
    """Stands for S3 on AWS, behind a proxy that tunnels to it whatever host is asked for.

    Attributes:
        hosts: The hosts that requests were for, in order.
    """

    def __init__(self, region: str, way: tuple[int, str, bool, bool]) -> None:
        self.hosts: list[str] = []
        self._other = OtherRegion(region, way)
        self._lock = threading.Lock()

    def answer(self, request: Any) -> Any:
        host = request.headers["Host"]
        with self._lock:
            self.hosts.append(host)
        place = re.fullmatch(r"models\.s3\.(?:([a-z0-9-]+)\.)?amazonaws\.com", host)
        region = (place and place[1]) or "us-east-1"
        elsewhere = self._other.asked_at(region, request)
        if elsewhere is not None:
            return elsewhere
        if request.region not in {"", region}:
            return 403, {}, b"<Error><Code>SignatureDoesNotMatch</Code></Error>"
        if request.path.startswith("/?list-type=2"):
            size = len(CONTENT)
            listing = f"<Contents><Key>regions/object</Key><Size>{size}</Size><ETag>&quot;v1&quot;</ETag></Contents>"
            return 200, {}, f"<ListBucketResult>{listing}</ListBucketResult>".encode()
        if request.method == "HEAD":
            return 200, {"Content-Length": str(len(CONTENT)), "ETag": '"v1"'}, b""
        first, last = map(int, re.findall(r"\d+", request.headers["Range"]))
        headers = {"Content-Range": f"bytes {first}-{last}/{len(CONTENT)}", "ETag": '"v1"'}
        return 206, headers, CONTENT[first : last + 1]


@contextlib.contextmanager
def _tunnels(port: int) -> Iterator[str]:
    """URL of a proxy that leads every tunnel to ``port``."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def pump(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while piece := source.recv(1 << 16):
                    target.sendall(piece)
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)

        def tunnel(client: socket.socket) -> None:
            with client, socket.create_connection(("127.0.0.1", port)) as server:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(1 << 16)
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=pump, args=(server, client), daemon=True)
                back.start()
                pump(client, server)
                back.join()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=tunnel, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        stack.callback(listener.shutdown, socket.SHUT_RDWR)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def amazon(
    opened: Callable[..., S3Storage], serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., tuple[S3Storage, Amazon]]]:
    """Opens storages that reach the stand-in for AWS under AWS's own names."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    names = [f"*.s3.{place}amazonaws.com" for place in ("", "us-east-1.", "us-west-2.", "eu-west-3.")]
    authority.issue_cert(*names).configure_cert(context)
    with contextlib.ExitStack() as stack:

        def amazon(region: str, way: Any, **options: Any) -> tuple[S3Storage, Amazon]:
            stand_in = Amazon(region, way)
            port = stack.enter_context(serving(stand_in.answer, context))
            monkeypatch.setenv("HTTPS_PROXY", stack.enter_context(_tunnels(port)))
            storage = opened(AWS_ENDPOINT_URL=None, AWS_CA_BUNDLE=str(tmp_path / "ca.pem"), **options)
            stack.callback(storage.close)
            return storage, stand_in

        yield amazon


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", ["list", "stat", "read"])
def test_the_other_regions_own_host_is_asked(
    amazon: Callable[..., tuple[S3Storage, Amazon]], way: Any, first: str
) -> None:
    """On AWS each region has a host of its own; after one redirect everything goes there, doctors included."""
    storage, stand_in = amazon("eu-west-3", way, AWS_REGION="us-west-2")
    calls: dict[str, Callable[[], object]] = {
        "list": lambda: [info.path for info in storage.list("regions")],
        "stat": lambda: storage.stat("regions/object").size,
        "read": lambda: _read(storage, 0),
    }

    before = storage.endpoint().host
    calls[first]()
    answered = {name: call() for name, call in calls.items()}

    assert {"list": ["regions/object"], "stat": len(CONTENT), "read": CONTENT[:10_000]} == answered
    assert "models.s3.us-west-2.amazonaws.com" == before
    assert ["models.s3.us-west-2.amazonaws.com"] + 4 * ["models.s3.eu-west-3.amazonaws.com"] == stand_in.hosts
    assert "models.s3.eu-west-3.amazonaws.com" == storage.endpoint().host
    assert storage.endpoint().proxy


def test_anonymous_requests_follow_to_the_other_region(amazon: Callable[..., tuple[S3Storage, Amazon]]) -> None:
    """The host alone says which region is meant."""
    storage, stand_in = amazon("eu-west-3", (301, "PermanentRedirect", True, False), MX_S3_ANONYMOUS="1")

    parts = [_read(storage, part) for part in range(2)]

    assert CONTENT[:20_000] == b"".join(parts)
    assert ["models.s3.amazonaws.com"] + 2 * ["models.s3.eu-west-3.amazonaws.com"] == stand_in.hosts


@pytest.mark.parametrize("way", WAYS)
def test_an_endpoint_that_leads_to_one_region_only(
    fronted: Callable[..., str], opened: Callable[..., S3Storage], way: Any
) -> None:
    """Where signing for the other region does not help, both are named that have to change."""
    answer = OtherRegion("eu-west-3", way)
    storage = opened(AWS_ENDPOINT_URL=fronted(lambda request: answer.asked_at("us-east-1", request)))
    calls: list[Callable[[], object]] = [
        lambda: list(storage.list("any")),
        lambda: storage.stat("any"),
        lambda: _read(storage, 0),
    ]

    for call in calls:
        with pytest.raises(BackendError, match="the bucket is in another region") as caught:
            call()

        assert not caught.value.retryable
        assert "AWS_REGION=eu-west-3" in str(caught.value)
        assert "AWS_ENDPOINT_URL" in str(caught.value)


def test_a_redirect_to_nowhere(fronted: Callable[..., str], opened: Callable[..., S3Storage]) -> None:
    """A server that does not say which region it means is not followed, and the message says what to set."""
    body = b"<Error><Code>PermanentRedirect</Code><Message>elsewhere</Message></Error>"
    storage = opened(AWS_ENDPOINT_URL=fronted(lambda request: (301, {}, b"" if request.method == "HEAD" else body)))

    with pytest.raises(BackendError, match="set AWS_REGION to the bucket's region") as caught:
        _read(storage, 0)

    assert not caught.value.retryable
