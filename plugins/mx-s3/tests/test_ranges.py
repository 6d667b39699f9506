"""Reads of one object share a signature, and end as botocore's own requests would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    NotFoundError,
    SourceChangedError,
    ThrottledError,
    UnavailableError,
)
from mx_s3._storage import S3Storage

CONTENT = bytes(range(256)) * 400


class Seen:
    """What reads send; gives them an answer where there is one."""

    def __init__(self) -> None:
        self.answer: Any = None
        self.reads: list[Any] = []
        self._lock = threading.Lock()

    def __call__(self, request: Any) -> Any:
        if request.method != "GET" or "list-type" in request.path:
            return None
        with self._lock:
            self.reads.append(request)
        return self.answer

    def signatures(self) -> set[str]:
        return {request.headers["Authorization"] for request in self.reads}


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def storage(
    seen: Seen, fronted: Callable[..., str], opened: Callable[..., S3Storage], put: Callable[..., str]
) -> S3Storage:
    """A storage that has got its first answer from botocore."""
    put("ranges/object", CONTENT)
    storage = opened(AWS_ENDPOINT_URL=fronted(seen))
    storage.stat("ranges/object")
    return storage


def _read(storage: S3Storage, part: int = 0, key: str = "ranges/object", version: str | None = None) -> bytes:
    memory = bytearray(10_000)
    done = storage.read_into(key, part * 10_000, memoryview(memory), version=version)
    return bytes(memory[:done])


def test_the_reads_of_an_object_share_a_signature(storage: S3Storage, seen: Seen, put: Callable[..., str]) -> None:
    """They differ in what is not signed; another object's have another."""
    put("ranges/other", CONTENT)
    etag = storage.stat("ranges/object").version
    first = _read(storage, 0, version=etag)
    with ThreadPoolExecutor(4) as pool:
        parts = [first, *pool.map(lambda part: _read(storage, part, version=etag), range(1, 11))]

    assert CONTENT == b"".join(parts)
    assert 1 == len(seen.signatures())
    assert 11 == len({request.headers["Range"] for request in seen.reads})
    assert {etag} == {request.headers["If-Match"] for request in seen.reads}
    assert not any("range" in signature.lower() for signature in seen.signatures())

    assert CONTENT[:10_000] == _read(storage, key="ranges/other")
    assert 2 == len(seen.signatures())


def test_a_signature_is_used_for_a_minute(storage: S3Storage, seen: Seen) -> None:
    """S3 takes it for fifteen; clocks may differ by some."""
    now = [0.0]
    storage._ranges._clock = lambda: now[0]
    for now[0] in (0.0, 50.0, 61.0, 100.0):
        assert CONTENT[:10_000] == _read(storage)

    made = [request.headers["Amz-Sdk-Invocation-Id"] for request in seen.reads]  # one for each that botocore prepares
    assert made[0] == made[1] != made[2] == made[3]


ERROR = "<Error><Code>{}</Code><Message>as S3 says it</Message></Error>"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "NoSuchKey", NotFoundError),
        (412, "PreconditionFailed", SourceChangedError),
        (429, "TooManyRequests", ThrottledError),
        (500, "InternalError", UnavailableError),
        (503, "SlowDown", ThrottledError),
    ],
)
def test_what_only_s3_can_mend_is_asked_once(
    storage: S3Storage, seen: Seen, status: int, code: str, expected: type[BackendError]
) -> None:
    """Above all, a server that is asked too much is not asked again at once."""
    seen.answer = status, {"Retry-After": "7"}, ERROR.format(code).encode()

    with pytest.raises(expected) as caught:
        _read(storage)

    assert 1 == len(seen.reads)
    if expected is ThrottledError:
        assert 7 == caught.value.retry_after_seconds
    seen.answer = None
    assert CONTENT[:10_000] == _read(storage)


def test_what_other_credentials_may_mend_is_left_to_botocore(storage: S3Storage, seen: Seen) -> None:
    """It signs anew, and its error is the one that is told."""
    _read(storage)
    seen.answer = 403, {}, ERROR.format("AccessDenied").encode()

    with pytest.raises(AccessDeniedError):
        _read(storage)

    assert 3 == len(seen.reads)
    assert 2 == len({request.headers["Amz-Sdk-Invocation-Id"] for request in seen.reads})


def test_an_object_that_changed_is_noticed(storage: S3Storage, put: Callable[..., str]) -> None:
    """The version is compared by S3, though no signature covers it."""
    etag = storage.stat("ranges/object").version
    put("ranges/object", CONTENT[::-1])

    with pytest.raises(SourceChangedError):
        _read(storage, version=etag)


def test_without_a_way_to_its_connections_botocore_reads(storage: S3Storage, seen: Seen) -> None:
    """Should a version of it keep them elsewhere, reads are only slower."""
    storage._ranges._session = None

    assert CONTENT[:20_000] == _read(storage, 0) + _read(storage, 1)
    assert 2 == len(seen.signatures())


def test_an_anonymous_read_carries_no_signature(
    seen: Seen, fronted: Callable[..., str], opened: Callable[..., S3Storage], put: Callable[..., str]
) -> None:
    """Nor does it look for one."""
    put("ranges/object", CONTENT, bucket="public")
    storage = opened("s3://public", AWS_ENDPOINT_URL=fronted(seen), MX_S3_ANONYMOUS="1")
    storage.stat("ranges/object")

    assert CONTENT[:10_000] == _read(storage)
    assert [None] == [request.headers["Authorization"] for request in seen.reads]
