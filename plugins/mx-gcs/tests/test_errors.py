"""What refusals of GCS mean: made-up answers, as the documentation of the API describes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from devtools.tcp_proxy import Fault
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    NotFoundError,
    SourceChangedError,
    ThrottledError,
    UnavailableError,
    UnsupportedError,
)
from mx_gcs._storage import GcsStorage
from tests.support.http_servers import server_context
from tests.support.network import CLOSED_PORT

NO_READ = (
    "loader@p.iam.gserviceaccount.com does not have storage.objects.get access to the Google Cloud Storage object."
)


def read(storage: GcsStorage, version: str | None = "1") -> int:
    return storage.read_into("model/a", 0, memoryview(bytearray(10)), version=version)


def refused(storage: GcsStorage) -> BackendError:
    with pytest.raises(BackendError) as caught:
        read(storage)
    return caught.value


def raised(call: Callable[[], Any]) -> BackendError:
    """The error of a call, which has cause and next step."""
    with pytest.raises(BackendError) as caught:
        call()
    assert caught.value.cause
    assert caught.value.hint
    assert "gs://models" in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("status", "reason", "message", "kind", "retryable", "says"),
    [
        (
            400,
            "required",
            "Bucket is a requester pays bucket but no user project provided.",
            AccessDeniedError,
            False,
            "MX_GCS_USER_PROJECT",
        ),
        (400, "userProjectMissing", "Bucket is requester pays", AccessDeniedError, False, "MX_GCS_USER_PROJECT"),
        (
            400,
            "userProjectInvalid",
            "User project specified in the request is invalid.",
            AccessDeniedError,
            False,
            "may not bill",
        ),
        (
            403,
            "forbidden",
            "a@b does not have serviceusage.services.use access to the Google Cloud project.",
            AccessDeniedError,
            False,
            "Service Usage Consumer",
        ),
        (403, "forbidden", NO_READ, AccessDeniedError, False, "Storage Object Viewer"),
        (
            403,
            "forbidden",
            "Request is prohibited by organization's policy. vpcServiceControlsUniqueIdentifier: a1",
            AccessDeniedError,
            False,
            "VPC Service Controls",
        ),
        (
            403,
            "forbidden",
            "Permission denied on Cloud KMS key. Please ensure that your Cloud Storage service account",
            AccessDeniedError,
            False,
            "cryptoKeyEncrypterDecrypter",
        ),
        (
            403,
            "insufficientPermissions",
            "Request had insufficient authentication scopes.",
            AccessDeniedError,
            False,
            "cloud-platform",
        ),
        (403, "accountDisabled", "The account for bucket has been disabled.", AccessDeniedError, False, "billing"),
        (
            403,
            "userRateLimitExceeded",
            "The total number of changes exceeds the rate limit",
            ThrottledError,
            True,
            "MX_CONCURRENCY",
        ),
        (
            400,
            "resourceIsEncryptedWithCustomerEncryptionKey",
            "The target object is encrypted by a customer-supplied encryption key.",
            UnsupportedError,
            False,
            "CSEK",
        ),
        (401, "authError", "Invalid Credentials", AccessDeniedError, False, "no credentials"),
        (404, "notFound", "The specified bucket does not exist.", NotFoundError, False, "bucket's name"),
        (404, "notFound", "No such object: models/model/a", NotFoundError, False, "gcloud storage ls"),
        (
            412,
            "conditionNotMet",
            "At least one of the pre-conditions you specified did not hold.",
            SourceChangedError,
            False,
            "replaced",
        ),
        (
            416,
            "requestedRangeNotSatisfiable",
            "The requested range cannot be satisfied.",
            SourceChangedError,
            False,
            "shorter",
        ),
        (408, "", "Request Timeout", UnavailableError, True, "passing"),
        (429, "rateLimitExceeded", "The rate of requests exceeds the limit.", ThrottledError, True, "MX_CONCURRENCY"),
        (
            500,
            "internalError",
            "We encountered an internal error. Please try again.",
            UnavailableError,
            True,
            "passing",
        ),
        (502, "", "Bad Gateway", UnavailableError, True, "passing"),
        (503, "backendError", "Backend Error", UnavailableError, True, "passing"),
    ],
)
def test_a_refusal_is_explained(
    status: int,
    reason: str,
    message: str,
    kind: type[BackendError],
    retryable: bool,
    says: str,
    scripted: Callable[..., GcsStorage],
    refusal: Callable[..., Any],
) -> None:
    """In reads, metadata and listings; the error has the class that core judges by, and the words of GCS."""
    storage = scripted(refusal(status, reason, message, **{"Retry-After": "3"}))

    for call in (lambda: read(storage), lambda: storage.stat("model/a"), lambda: list(storage.list("model"))):
        error = raised(call)
        assert kind is type(error)
        assert retryable is error.retryable
        assert (3.0 if retryable else None) == error.retry_after_seconds
        assert f"HTTP {status}" in str(error)
        assert "gs://models/model" in error.uri
        listed_404 = status == 404 and "list" in str(error)
        assert (says if not listed_404 else "bucket's name") in str(error)
        assert status == 401 or message[:40] in str(error)


@pytest.mark.parametrize(
    ("status", "content", "kind", "says"),
    [
        (404, b"No such object: models/model/a", NotFoundError, "No such object"),
        (404, b"", NotFoundError, "HTTP 404"),
        (403, b"<html>Access denied by the proxy</html>", AccessDeniedError, "HTTP 403"),
        (502, b"<html>bad gateway</html>", UnavailableError, "HTTP 502"),
        (503, b'{"error": null}', UnavailableError, "HTTP 503"),
        (503, b'{"error": {"errors": "x", "message": 5}}', UnavailableError, "HTTP 503"),
        (500, b"[" * 100_000, UnavailableError, "HTTP 500"),
        (302, b"", BackendError, "HTTP 302"),
    ],
)
def test_other_contents_of_refusals(
    status: int, content: bytes, kind: type[BackendError], says: str, scripted: Callable[..., GcsStorage]
) -> None:
    """Downloads are refused in plain text; proxies answer HTML, which is not shown."""
    error = refused(scripted((status, {"Location": "http://127.0.0.1:1/"}, content)))

    assert kind is type(error)
    assert says in str(error)
    assert "<html>" not in str(error)
    assert "[[[" not in str(error)


def test_tokens_in_the_words_of_a_server_are_hidden(
    scripted: Callable[..., GcsStorage], refusal: Callable[..., Any]
) -> None:
    """Whatever it repeats."""
    storage = scripted(refusal(400, "invalid", "Bad token ya29.a0Short and " + "A1b2" * 20))

    error = refused(storage)

    assert "ya29" not in str(error)
    assert "A1b2A1b2" not in str(error)
    assert "***" in str(error)


@pytest.mark.parametrize(
    ("headers", "kind", "says"),
    [
        ({}, UnsupportedError, "x-goog-generation"),
        ({"X-Goog-Generation": "2"}, SourceChangedError, "another version, 2"),
        ({"X-Goog-Generation": "1", "Content-Range": "bytes 5-14/100"}, UnsupportedError, "other bytes"),
        ({"X-Goog-Generation": "1", "Content-Encoding": "gzip"}, UnsupportedError, "encoded: gzip"),
        ({"X-Goog-Generation": "1", "X-Goog-Stored-Content-Encoding": "gzip"}, UnsupportedError, "encoded: gzip"),
    ],
)
def test_an_answer_with_other_bytes_is_refused(
    headers: dict[str, str], kind: type[BackendError], says: str, scripted: Callable[..., GcsStorage]
) -> None:
    """Of no generation or another one, of another range, encoded, or decoded on the way, as GCS answers with 200."""
    for status in (200, 206):
        if status == 200 and "Content-Range" in headers:
            continue
        given = {"Content-Range": "bytes 0-9/100", **headers}
        error = raised(lambda given=given, status=status: read(scripted((status, given, bytes(10)))))  # type: ignore[misc]

        assert kind is type(error)
        assert says in str(error)


def test_a_range_of_an_ignored_request_is_refused(scripted: Callable[..., GcsStorage]) -> None:
    """The whole object in place of its middle."""
    storage = scripted((200, {"X-Goog-Generation": "1"}, bytes(100)))

    with pytest.raises(UnsupportedError, match="other bytes: the whole object"):
        storage.read_into("model/a", 50, memoryview(bytearray(10)), version="1")


@pytest.mark.parametrize("fault", ["reset", "truncate", "stall"])
def test_a_connection_that_breaks(fault: Any, proxied: Callable[..., Any], put: Callable[..., str]) -> None:
    """Before the first byte it is an error that may be tried again; behind it, the bytes that came are kept."""
    version = put("model/a", bytes(range(200)))
    for after, expected in ((0, None), (50, 50)):
        storage, _ = proxied(
            lambda _number, _head, after=after: Fault(fault, after_bytes=after, of_body=True),
            MX_GCS_READ_TIMEOUT_SECONDS="0.3",
        )
        buffer = bytearray(200)
        if expected is None:
            error = raised(lambda storage=storage: read(storage, version))  # type: ignore[misc]
            assert isinstance(error, (UnavailableError, DeadlineError))
            assert error.retryable
        else:
            assert expected == storage.read_into("model/a", 0, memoryview(buffer), version=version)
            assert bytes(range(50)) == buffer[:50]


def test_a_server_that_is_not_there(opened: Callable[..., GcsStorage]) -> None:
    """The endpoint and its variable are named."""
    error = raised(lambda: read(opened(STORAGE_EMULATOR_HOST=f"127.0.0.1:{CLOSED_PORT}")))

    assert isinstance(error, UnavailableError)
    assert f"http://127.0.0.1:{CLOSED_PORT}" in str(error)
    assert "MX_GCS_ENDPOINT" in str(error.hint)


def test_a_name_that_does_not_resolve(opened: Callable[..., GcsStorage]) -> None:
    """Another attempt would not help."""
    error = raised(lambda: read(opened(MX_GCS_ENDPOINT="https://no-such-host.invalid", MX_GCS_ANONYMOUS="1")))

    assert "no-such-host.invalid does not resolve" in str(error)
    assert not error.retryable


def test_certificates_are_verified(
    opened: Callable[..., GcsStorage], serving: Any, tmp_path: Any, put: Callable[..., str]
) -> None:
    """An unknown authority is refused, and so is another name; the error says what to set."""
    put("model/a", b"content")
    context, authority = server_context(tmp_path, "localhost")
    with serving(lambda _: (404, {}, b""), context) as url:
        local = url.replace("127.0.0.1", "localhost")
        stranger = opened(MX_GCS_ENDPOINT=local, MX_GCS_ANONYMOUS="1")
        renamed = opened(MX_GCS_ENDPOINT=url, MX_GCS_ANONYMOUS="1", MX_GCS_CA_BUNDLE=authority)
        right = opened(MX_GCS_ENDPOINT=local, MX_GCS_ANONYMOUS="1", MX_GCS_CA_BUNDLE=authority)

        error = raised(lambda: stranger.stat("model/a"))
        assert "MX_GCS_CA_BUNDLE" in str(error.hint)
        assert not error.retryable
        assert "is for another host" in str(raised(lambda: renamed.stat("model/a")))
        assert isinstance(raised(lambda: right.stat("model/a")), NotFoundError)
