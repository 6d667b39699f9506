"""Small requests over HTTP: the whole answer within bounds, and the session that stands in for an SDK's."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from modelexpress_core.storage.http import (
    BadAnswerError,
    BoundedSession,
    ConnectionPool,
    Proxies,
    Request,
    WholeAnswer,
    exchange,
    request_of_sdk,
)
from modelexpress_core.storage.http.failures import EncodedAnswerError
from tests.support.http_servers import answering


def _answer(content: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n{more}\r\n".encode() + content


def _exchanged(answer: bytes, *, method: str = "GET", max_bytes: int = 100, **options: Any) -> WholeAnswer:
    pool = ConnectionPool(connect_timeout_seconds=5.0)
    with answering(answer) as server, contextlib.closing(pool):
        request = Request.to_url(method, f"http://127.0.0.1:{server.port}/token")
        return exchange(pool, request, read_timeout_seconds=5.0, max_bytes=max_bytes, **options)


@pytest.fixture
def session() -> Iterator[BoundedSession]:
    """A session whose proxy cannot be reached."""
    proxies = Proxies.from_environ({"http_proxy": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1"})
    session = BoundedSession(connect_timeout_seconds=5.0, read_timeout_seconds=5.0, proxies=proxies)
    yield session
    session.close()


def test_a_success_is_read_whole() -> None:
    """With its headers."""
    answer = _exchanged(_answer(b"x" * 100, more="ETag: v\r\n"))

    assert answer.succeeded
    assert (200, "OK", "v", b"x" * 100) == (answer.status, answer.reason, answer.headers["etag"], answer.content)


def test_a_longer_success_is_refused() -> None:
    """It is not cut without a word."""
    with pytest.raises(BadAnswerError, match="more than 99 bytes"):
        _exchanged(_answer(b"x" * 100), max_bytes=99)


def test_a_refusal_is_cut() -> None:
    """A MiB of it is read, whatever a success may have; it names its request."""
    answer = _exchanged(_answer(b"x" * (2 << 20), "403 No"), max_bytes=99)

    assert (403, 1 << 20) == (answer.status, len(answer.content))
    assert not answer.succeeded
    request = Request.to_url("GET", "http://127.0.0.1/")
    refusal = answer.as_refusal(request)
    assert (request, 403, "No", answer.content) == (refusal.request, refusal.status, refusal.reason, refusal.content)


def test_an_encoded_success_is_refused() -> None:
    """Unless the service only shows how an object was uploaded, or the answer has no content."""
    answer = _answer(b"x", more="Content-Encoding: gzip\r\n")

    with pytest.raises(EncodedAnswerError, match="gzip"):
        _exchanged(answer)
    assert b"x" == _exchanged(answer, ignored_encodings=("gzip",)).content
    assert b"" == _exchanged(answer, method="HEAD", ignored_encodings=None).content


def test_of_an_encoded_refusal_the_status_counts() -> None:
    """Its content is left out, so that nothing reads it as text."""
    answer = _exchanged(_answer(b"x", "503 Busy", "Content-Encoding: gzip\r\n"))

    assert (503, b"") == (answer.status, answer.content)


def test_local_services_are_asked_without_proxy(session: BoundedSession) -> None:
    """The proxy would see their credentials. Others are asked through it."""
    with answering(_answer(b"{}")) as server:
        answer = session.send(Request.to_url("GET", f"http://127.0.0.1:{server.port}/token"))

    assert b"{}" == answer.content
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1 cannot be reached"):
        session.send(Request.to_url("GET", "http://token.example/"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1/", True),
        ("http://localhost:8080/", True),
        ("http://169.254.169.254/", True),
        ("http://[fe80::1%25eth0]/", True),
        ("http://metadata.example/", True),
        ("https://127.0.0.1/", False),
        ("https://metadata.example/", False),
        ("http://10.0.0.1/", False),
        ("http://127.0.0.1.example/", False),
    ],
)
def test_what_is_local(url: str, expected: bool) -> None:
    """Plain HTTP that no router passes on, and the names that are given."""
    session = BoundedSession(
        connect_timeout_seconds=1.0, read_timeout_seconds=1.0, metadata_hosts=("metadata.example",)
    )

    assert expected == session.is_local(Request.to_url("GET", url.replace("%25", "%")).origin)


def test_closing_a_session_ends_what_waits(session: BoundedSession) -> None:
    """The thread that waits for an answer fails, and so do later requests."""
    asked, failures = threading.Event(), []
    with answering(lambda _: asked.set() or b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n") as server:  # type: ignore[func-returns-value]
        request = Request.to_url("GET", f"http://127.0.0.1:{server.port}/token")

        def ask() -> None:
            try:
                session.send(request)
            except OSError as exc:
                failures.append(exc)

        thread = threading.Thread(target=ask)
        thread.start()
        assert asked.wait(10.0)
        session.close()
        thread.join(10.0)

        assert 1 == len(failures)
        with pytest.raises(ConnectionAbortedError):
            session.send(request)


@pytest.mark.parametrize(
    ("body", "expected"),
    [(None, b""), ("text", b"text"), (b"bytes", b"bytes"), (io.BytesIO(b"file"), b"file"), ({"a": "b c"}, b"a=b+c")],
    ids=["none", "text", "bytes", "file", "form"],
)
def test_a_request_of_an_sdk(body: Any, expected: bytes) -> None:
    """SDKs give headers as text, bytes or numbers, and a body in several forms; its length is ours."""
    headers = {"X-Text": "a", "X-Bytes": b"b", "X-Number": 3, "content-length": "999", "Connection": "keep-alive"}

    request = request_of_sdk("POST", "https://token.example/v1?q=1", headers.items(), body, left_out=("connection",))

    sent = (("X-Text", "a"), ("X-Bytes", "b"), ("X-Number", "3"), ("Content-Length", str(len(expected))))
    assert (sent, expected) == (request.headers, request.content)


def test_a_get_has_no_length() -> None:
    """Nor a HEAD."""
    assert () == request_of_sdk("GET", "https://token.example/", ()).headers
