"""The error tables: made-up exceptions of botocore, for answers that the test server cannot produce."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import pytest
from botocore import exceptions as boto

from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    ModelExpressError,
    NotFoundError,
    SourceChangedError,
    ThrottledError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.storage.http.failures import (
    AuthoritiesError,
    BadAnswerError,
    ConnectTimeoutError,
    ProxyError,
)
from modelexpress_core.uri import ModelURI
from mx_s3._errors import translated
from mx_s3._storage import S3Storage, open_s3

URI, OPERATION = "s3://bucket/key", "read bytes 0-9"


def _answer(code: str, status: int, message: str = "", headers: dict[str, str] | None = None, **error: str) -> Any:
    response: Any = {
        "Error": {"Code": code, "Message": message, **error},
        "ResponseMetadata": {"HTTPStatusCode": status, "RequestId": "REQ1", "HTTPHeaders": headers or {}},
    }
    return boto.ClientError(response, "GetObject")


def _translated(exc: Exception) -> BackendError:
    return translated(exc, uri=URI, operation=OPERATION, endpoint="https://s3.example.com")


@pytest.mark.parametrize(
    ("code", "status", "expected", "retryable", "says"),
    [
        ("NoSuchBucket", 404, NotFoundError, False, "misspelt"),
        ("NoSuchKey", 404, NotFoundError, False, "deleted"),
        ("404", 404, NotFoundError, False, "the bucket or the key"),
        ("AccessDenied", 403, AccessDeniedError, False, "s3:GetObject"),
        ("403", 403, AccessDeniedError, False, "s3:ListBucket"),
        ("InvalidAccessKeyId", 403, AccessDeniedError, False, "AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, AccessDeniedError, False, "AWS_SECRET_ACCESS_KEY"),
        ("ExpiredToken", 400, AccessDeniedError, False, "ran out"),
        ("InvalidToken", 400, AccessDeniedError, False, "AWS_SESSION_TOKEN"),
        ("RequestTimeTooSkewed", 403, AccessDeniedError, False, "clock"),
        ("InvalidObjectState", 403, UnsupportedError, False, "Glacier"),
        ("PreconditionFailed", 412, SourceChangedError, False, "replaced"),
        ("412", 412, SourceChangedError, False, "replaced"),
        ("InvalidRange", 416, SourceChangedError, False, "shorter"),
        ("PermanentRedirect", 301, BackendError, False, "another region"),
        ("301", 301, BackendError, False, "another region"),
        ("IllegalLocationConstraintException", 400, BackendError, False, "another region"),
        ("AuthorizationHeaderMalformed", 400, BackendError, False, "another region"),
        ("400", 400, BackendError, False, "AWS_SESSION_TOKEN"),
        ("SlowDown", 503, ThrottledError, True, "MX_CONCURRENCY"),
        ("ServiceUnavailable", 503, ThrottledError, True, "at a time"),
        ("InternalError", 500, UnavailableError, True, "passing fault"),
        ("RequestTimeout", 400, UnavailableError, True, "too slowly"),
        ("TooManyRequests", 429, ThrottledError, True, "at a time"),
        ("429", 429, ThrottledError, True, "at a time"),
        ("502", 502, UnavailableError, True, "passing fault"),
        ("NotImplemented", 501, UnsupportedError, False, "lacks this part"),
    ],
)
def test_made_up_answers_are_classified(
    code: str, status: int, expected: type[BackendError], retryable: bool, says: str
) -> None:
    """Each code has its class, says whether trying again helps, and names cause and next step."""
    exc = _answer(code, status)

    error = _translated(exc)

    assert expected is type(error)
    assert retryable is error.retryable
    assert f"could not read bytes 0-9 of s3://bucket/key: S3 answered HTTP {status}" in str(error)
    assert "request REQ1" in str(error)
    assert says in str(error)
    assert error.cause
    assert error.hint
    assert "mx-s3" == error.provider


def test_a_made_up_answer_that_is_in_no_table_is_quoted() -> None:
    """Code and words of the server are all there is to say."""
    error = _translated(_answer("StrangeThing", 400, "The moon is\n in the wrong phase"))

    assert BackendError is type(error)
    assert "HTTP 400, StrangeThing, request REQ1: The moon is in the wrong phase" in str(error)
    assert error.cause is None


@pytest.mark.parametrize(
    "exc",
    [
        _answer("PermanentRedirect", 301, headers={"x-amz-bucket-region": "eu-west-3"}),
        _answer("400", 400, headers={"x-amz-bucket-region": "eu-west-3"}),
        _answer("AuthorizationHeaderMalformed", 400, Region="eu-west-3"),
    ],
)
def test_made_up_answers_from_another_region_name_it(exc: Exception) -> None:
    """Where S3 says which region it is, the next step can be copied."""
    assert "set AWS_REGION=eu-west-3, or add ?region=eu-west-3 to the URI" == _translated(exc).hint


@pytest.mark.parametrize(("text", "expected"), [("3", 3.0), ("0.5", 0.5), ("", None), ("soon", None), ("nan", None)])
def test_made_up_retry_after_in_seconds(text: str, expected: float | None) -> None:
    """Retry-After is passed on as a number; nonsense is passed over."""
    assert expected == _translated(_answer("SlowDown", 503, headers={"retry-after": text})).retry_after_seconds


def test_made_up_retry_after_as_a_date() -> None:
    """The other form that RFC 9110 allows."""
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60), usegmt=True)

    seconds = _translated(_answer("SlowDown", 503, headers={"retry-after": date})).retry_after_seconds

    assert seconds is not None
    assert 50 < seconds <= 60


@pytest.mark.parametrize(
    ("exc", "expected", "retryable", "says"),
    [
        (
            ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
            UnavailableError,
            True,
            "https://s3.example.com refused the connection [ConnectionRefusedError]",
        ),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), UnavailableError, False, "does not resolve"),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), UnavailableError, True, "resolv.conf"),
        (ConnectTimeoutError("timed out"), DeadlineError, True, "firewall"),
        (TimeoutError("timed out"), DeadlineError, True, "READ_TIMEOUT"),
        (BadAnswerError("what was received is no answer"), UnavailableError, True, "broke [BadAnswerError]"),
        (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), BackendError, False, "IncompleteReadError"),
        (
            ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)),
            UnavailableError,
            True,
            "broke [ConnectionResetError]",
        ),
        (ssl.SSLCertVerificationError(1, "self"), UnavailableError, False, "AWS_CA_BUNDLE"),
        (ssl.SSLEOFError(8, "EOF"), UnavailableError, True, "TLS connection"),
        (ssl.SSLError(1, "wrong version"), UnavailableError, False, "scheme and port of AWS_ENDPOINT_URL"),
        (AuthoritiesError("no file"), UnavailableError, False, "AWS_CA_BUNDLE"),
        (ProxyError("http://proxy:3128 cannot be reached"), UnavailableError, True, "HTTPS_PROXY"),
        (ProxyError("http://proxy:3128 answered HTTP 502", 502), UnavailableError, True, "HTTPS_PROXY"),
        (ProxyError("http://proxy:3128 answered HTTP 403", 403), UnavailableError, False, "NO_PROXY"),
        (ProxyError("http://proxy:3128 answered HTTP 407", 407), AccessDeniedError, False, "HTTPS_PROXY"),
        (boto.HTTPClientError(error=ValueError("header")), BackendError, False, "AWS_SESSION_TOKEN"),
        (boto.NoCredentialsError(), AccessDeniedError, False, "MX_S3_ANONYMOUS"),
        (boto.PartialCredentialsError(provider="env", cred_var="x"), AccessDeniedError, False, "set both"),
        (boto.CredentialRetrievalError(provider="p", error_msg="m"), AccessDeniedError, False, "get-caller-identity"),
        (boto.SSOTokenLoadError(error_msg="m"), AccessDeniedError, False, "aws sso login"),
        (boto.ProfileNotFound(profile="p"), AccessDeniedError, False, "AWS_PROFILE"),
        (boto.ParamValidationError(report="r"), NotFoundError, False, "correct the URI"),
    ],
)
def test_made_up_exceptions_are_classified(
    exc: Exception, expected: type[BackendError], retryable: bool, says: str
) -> None:
    """What comes up before S3 answers has its class too; the innermost exception says most."""
    error = _translated(exc)

    assert expected is type(error)
    assert retryable is error.retryable
    assert says in str(error)


def test_an_earlier_failure_does_not_colour_the_next() -> None:
    """Where a try follows in the handler of another, the first failure is only context."""
    second = ConnectionResetError(errno.ECONNRESET, "reset")
    second.__context__ = ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    assert "broke" in str(_translated(second))


SECRETS = ("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "FwoGZXIvYXdzEXAMPLE//////token" * 4)


@pytest.mark.parametrize(
    "exc",
    [
        _answer("InvalidAccessKeyId", 403, f"The key {SECRETS[0]} does not exist", AWSAccessKeyId=SECRETS[0]),
        _answer("SignatureDoesNotMatch", 403, f"signed with {SECRETS[1]}"),
        _answer("ExpiredToken", 400, f"The token {SECRETS[2]} expired"),
        _answer("AccessDenied", 403, f"{SECRETS[0]} / {SECRETS[1]} / {SECRETS[2]} may not"),
    ],
)
def test_made_up_answers_that_repeat_credentials_are_not_quoted(exc: Exception) -> None:
    """Whatever a server puts into its message, keys and tokens do not reach ours."""
    error = _translated(exc)

    for secret in SECRETS:
        assert secret not in str(error)
        assert secret not in repr(error)


@pytest.mark.parametrize(
    "variables",
    [
        {"AWS_SECRET_ACCESS_KEY": "a-wrong-secret-0123456789"},
        {"AWS_ACCESS_KEY_ID": "AKIAWRONGWRONGWRONG0"},
        {"AWS_SESSION_TOKEN": "a-session-token-0123456789"},
        {"AWS_SECRET_ACCESS_KEY": None},
        {"AWS_PROFILE": "no-such-profile"},
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"},
        {"AWS_ENDPOINT_URL": "http://no-such-host.invalid"},
        {"AWS_ENDPOINT_URL": "https://someone:a-password-0123456789@127.0.0.1:1"},
        {"AWS_ENDPOINT_URL": "someone:a-password-0123456789@127.0.0.1"},
        {"AWS_REGION": "no region"},
        {"MX_S3_ADDRESSING_STYLE": "sideways"},
    ],
    ids=lambda variables: " ".join(f"{k}={v}" for k, v in variables.items()),
)
def test_no_failure_shows_a_credential_and_each_says_what_to_do(
    opened: Callable[..., S3Storage], server: Any, variables: dict[str, str | None]
) -> None:
    """Neither our message nor those behind it hold a key, a secret, a token or a password."""
    secrets = [
        *(v for k, v in server.environ().items() if "KEY" in k),
        *(v for k, v in variables.items() if v and ("KEY" in k or "TOKEN" in k)),
        "a-password-0123456789",
    ]

    with pytest.raises(ModelExpressError) as caught:
        list(opened("s3://no-such-bucket/model", **variables).list("model"))

    error: BaseException | None = caught.value
    assert caught.value.hint
    while error is not None:
        for secret in secrets:
            assert secret not in f"{error} {error!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_part_of_the_credentials_is_reported_when_opening() -> None:
    """An access key without its secret, or the other way round, is never sent."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        with pytest.raises(AccessDeniedError, match="only a part of the credentials"):
            open_s3(ModelURI.parse("s3://bucket"), {name: "x"})


def test_an_unknown_profile_is_reported_when_opening() -> None:
    """AWS_PROFILE that no file holds."""
    with pytest.raises(AccessDeniedError, match="the profile is not in the configuration files"):
        open_s3(ModelURI.parse("s3://bucket"), {"AWS_PROFILE": "no-such-profile"})
