"""Servers in the place of S3 that lie, dawdle or never end: errors within bounds of time and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from modelexpress_core.errors import BackendError, DeadlineError, UnsupportedError
from modelexpress_core.fetch import RetryBudget, RetryingStorage, RetryPolicy
from mx_s3._storage import S3Storage
from tests.support.http_attacks import OPERATIONS, READ_TIMEOUT_SECONDS, HttpAttacks, bounded, sends
from tests.support.http_servers import ByteServer, answering

Attacked = Callable[..., "contextlib.AbstractContextManager[tuple[S3Storage, ByteServer]]"]
Operation = Callable[[S3Storage], Any]


class TestAttacks(HttpAttacks):
    """By all that it inherits."""

    timeout_variable = "MX_S3_READ_TIMEOUT_SECONDS"
    listing = (b"<ListBucketResult>", b"<Contents><Key>model/a</Key></Contents>")

    @pytest.fixture
    def open_at(self, opened: Callable[..., S3Storage]) -> Callable[[str], S3Storage]:
        """By the endpoint."""
        return lambda url: opened(AWS_ENDPOINT_URL=url, MX_S3_READ_TIMEOUT_SECONDS=str(READ_TIMEOUT_SECONDS))

    @pytest.fixture
    def open_with_credentials_from(
        self, from_role: dict[str, str | None], services: Any, opened: Callable[..., S3Storage]
    ) -> Callable[[str], S3Storage]:
        """From each service that gives those of a role."""

        def open_with_credentials_from(url: str) -> S3Storage:
            variables = {name: value and value.replace(services.url, url) for name, value in from_role.items()}
            return opened(**{**variables, "MX_S3_READ_TIMEOUT_SECONDS": str(READ_TIMEOUT_SECONDS)})

        return open_with_credentials_from


@pytest.fixture
def attacked(opened: Callable[..., S3Storage]) -> Attacked:
    """Opens storages on a server that sends bytes; the block has to end in bounds of time and memory."""

    @contextlib.contextmanager
    def attacked(
        answer: Any,
        *,
        limit_bytes: int = 96 << 20,
        read_timeout_seconds: float = READ_TIMEOUT_SECONDS,
        **options: Any,
    ) -> Iterator[tuple[S3Storage, ByteServer]]:
        with answering(answer, **options) as server:
            storage = opened(
                AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.port}",
                MX_S3_READ_TIMEOUT_SECONDS=str(read_timeout_seconds),
            )
            with bounded(limit_bytes), contextlib.closing(storage):
                yield storage, server

    return attacked


def test_the_head_of_an_object_may_have_a_body(attacked: Attacked) -> None:
    """Which no answer to HEAD has: it is not read."""
    start = b'HTTP/1.1 200 OK\r\nETag: "v"\r\nContent-Length: 4000000000\r\n\r\n'
    with attacked(b"-", piece=sends(start, bytes(1 << 16))) as (storage, _):
        assert 4_000_000_000 == storage.stat("model/a").size


# -- pages -------------------------------------------------------------------------------------------------------------


def _page(keys: list[str], token: str) -> bytes:
    entries = "".join(f"<Contents><Key>{key}</Key><Size>1</Size><ETag>&quot;v&quot;</ETag></Contents>" for key in keys)
    body = (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>{entries}"
        "</ListBucketResult>"
    ).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


class _Pages:
    """Answers each request with another page.

    Args:
        keys: The keys of a page, by its number.
        token: Where the next page begins, by the number of this one.
    """

    def __init__(self, keys: Callable[[int], list[str]], token: Callable[[int], str] = str) -> None:
        self._keys = keys
        self._token = token
        self.sent = 0

    def __call__(self, _: bytes) -> bytes:
        self.sent += 1
        return _page(self._keys(self.sent), self._token(self.sent))


def _retrying(storage: S3Storage) -> RetryingStorage:
    return RetryingStorage(storage, RetryPolicy(attempts=3), RetryBudget(1.0))


def test_a_page_that_says_it_is_followed_by_itself(attacked: Attacked) -> None:
    """The server ignores where the next page begins."""
    pages = _Pages(lambda _: ["model/a"], lambda _: "again")
    with attacked(pages) as (storage, _), pytest.raises(UnsupportedError, match="same page"):
        list(storage.list("model"))

    assert pages.sent < 5


def test_pages_that_repeat_themselves(attacked: Attacked) -> None:
    """Under new names for the next page, so that only their objects tell."""
    pages = _Pages(lambda _: [f"model/{key}" for key in range(500)])
    with attacked(pages) as (storage, _), pytest.raises(BackendError, match="again and again") as caught:
        list(_retrying(storage).list("model"))

    assert not caught.value.retryable
    assert pages.sent < 10


def test_pages_without_an_object(attacked: Attacked) -> None:
    """S3 may send a few such pages; these never end."""
    with attacked(_Pages(lambda _: [])) as (storage, _), pytest.raises(DeadlineError, match="has not ended") as caught:
        list(_retrying(storage).list("model"))

    assert not caught.value.retryable
    assert "AWS_ENDPOINT_URL" in str(caught.value)


def test_pages_of_huge_names(attacked: Attacked) -> None:
    """Each page has another one, so that nothing but their size grows without end."""
    pages = _Pages(lambda number: [f"model/{number}{'x' * 4_000_000}"])
    with (
        # 64 MiB of names, and pages on their way; time that a busy machine needs for these.
        attacked(pages, limit_bytes=256 << 20, read_timeout_seconds=3.0) as (storage, _),
        pytest.raises(BackendError, match="below it"),
    ):
        list(_retrying(storage).list("model"))

    assert pages.sent < 20


# -- versions and encodings --------------------------------------------------------------------------------------------


def _listing(etag: str) -> bytes:
    body = f"<ListBucketResult><Contents><Key>model/a</Key><Size>9</Size>{etag}</Contents></ListBucketResult>".encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%%s\r\n" % len(body) + body


_OBJECT = b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-8/9\r\nContent-Length: 9\r\n%s\r\n123456789"
_ETAG = b'ETag: "v"\r\n'


@pytest.mark.parametrize(
    ("operation", "answer"),
    [
        (OPERATIONS["list"], _listing("") % b""),
        (OPERATIONS["list"], _listing("<ETag></ETag>") % b""),
        (OPERATIONS["stat"], _OBJECT % b""),
        (OPERATIONS["read"], _OBJECT % b""),
    ],
)
def test_an_answer_without_etag_is_refused(attacked: Attacked, operation: Operation, answer: bytes) -> None:
    """Without it, two versions could be mixed where no digest is published."""
    with attacked(answer) as (storage, _), pytest.raises(UnsupportedError) as caught:
        operation(storage)

    message = str(caught.value).lower()
    assert "etag" in message
    assert "s3://models/model" in message
    assert caught.value.operation
    assert "AWS_ENDPOINT_URL" in str(caught.value.hint)


@pytest.mark.parametrize("encoding", ["gzip", "br", "aws-chunked, gzip", "identity, deflate"])
@pytest.mark.parametrize(
    ("operation", "answer"),
    [
        (OPERATIONS["list"], _listing("<ETag>v</ETag>")),
        (OPERATIONS["stat"], _OBJECT.replace(b"%s", b"%s" + _ETAG)),
        (OPERATIONS["read"], _OBJECT.replace(b"%s", b"%s" + _ETAG)),
    ],
    ids=["list", "stat", "read"],
)
def test_an_encoding_that_nobody_asked_for_is_refused(
    attacked: Attacked, operation: Operation, answer: bytes, encoding: str
) -> None:
    """Every request says that it accepts none."""
    line = f"Content-Encoding: {encoding}\r\n".encode()
    with attacked(answer % line) as (storage, server), pytest.raises(UnsupportedError, match=encoding) as caught:
        operation(storage)

    assert {"identity"} == set(server.header("Accept-Encoding"))
    assert caught.value.operation
    assert "AWS_ENDPOINT_URL" in str(caught.value.hint)


@pytest.mark.parametrize("encoding", ["aws-chunked", "identity"])
def test_an_encoding_that_means_nothing_is_ignored(attacked: Attacked, encoding: str) -> None:
    """Some servers show how the object was uploaded."""
    line = f"Content-Encoding: {encoding}\r\n".encode() + _ETAG
    with attacked(_OBJECT % line) as (storage, _):
        assert 9 == OPERATIONS["read"](storage)
        assert 9 == storage.stat("model/a").size
