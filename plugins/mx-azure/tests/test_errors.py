"""What each answer of the service means: class, cause, next step, and whether it may be tried again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from devtools.azurite import Azurite
from devtools.tcp_proxy import Fault, TcpProxy
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
from mx_azure._storage import AzureStorage
from tests.support.network import CLOSED_PORT
from tests.support.scripted_http import Answer

SIGNATURE = "c2VjcmV0LXNpZ25hdHVyZQ=="

#: How requests of each kind of credential are made on a made-up server.
KINDS: dict[str, dict[str, str | None]] = {
    "key": {},
    "sas": {"AZURE_STORAGE_ACCOUNT_KEY": None, "AZURE_STORAGE_SAS_TOKEN": f"sv=1&sp=r&sig={SIGNATURE}"},
    "anonymous": {"MX_AZURE_ANONYMOUS": "1"},
}


def refusal(status: int, code: str = "", detail: str = "", **headers: str) -> Answer:
    """An answer as the service writes it; the detail repeats the signature, as that of the service does."""
    if code:
        headers = {"x-ms-error-code": code, "x-ms-request-id": "12345678-0000-0000-0000-000000000000", **headers}
    text = f"<AuthenticationErrorDetail>{detail} {SIGNATURE}</AuthenticationErrorDetail>" if detail else ""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>words {SIGNATURE}</Message>{text}</Error>"
    return status, headers, body.encode()


@pytest.mark.parametrize(
    ("kind", "answer", "error", "cause", "hint"),
    [
        ("key", refusal(404, "BlobNotFound"), NotFoundError, "misspelt", "az storage blob list"),
        ("key", refusal(404, "ContainerNotFound"), NotFoundError, "in another account", "az storage container list"),
        ("key", refusal(404), NotFoundError, "misspelt", "the account's name"),
        ("key", refusal(409, "ContainerBeingDeleted"), NotFoundError, "being deleted", "check the URI"),
        ("key", refusal(400, "InvalidResourceName"), NotFoundError, "can have this name", "correct the URI"),
        ("anonymous", refusal(404, "ResourceNotFound"), NotFoundError, "not public", "set credentials"),
        ("anonymous", refusal(409, "PublicAccessNotPermitted"), AccessDeniedError, "not public", "MX_AZURE_ANONYMOUS"),
        ("anonymous", refusal(401, "NoAuthenticationInformation"), AccessDeniedError, "not public", "set credentials"),
        ("anonymous", refusal(403, "AuthorizationFailure"), AccessDeniedError, "not public", "set credentials"),
        ("key", refusal(403, "AuthenticationFailed"), AccessDeniedError, "rotated", "AZURE_STORAGE_ACCOUNT_KEY"),
        ("key", refusal(403), AccessDeniedError, "rotated", "AZURE_STORAGE_ACCOUNT_KEY"),
        (
            "key",
            refusal(403, "AuthenticationFailed", "Request date header too old: 'Fri'"),
            AccessDeniedError,
            "clock",
            "chronyc",
        ),
        ("key", refusal(403, "AuthorizationFailure"), AccessDeniedError, "firewall of the account", "Networking"),
        ("key", refusal(403, "KeyBasedAuthenticationNotPermitted"), AccessDeniedError, "account keys", "identity"),
        ("key", refusal(403, "AccountIsDisabled"), AccessDeniedError, "is disabled", "subscription"),
        (
            "sas",
            refusal(403, "AuthenticationFailed", "Signature not valid in the specified time frame: Start"),
            AccessDeniedError,
            "ran out",
            "AZURE_STORAGE_SAS_TOKEN",
        ),
        ("sas", refusal(403, "AuthenticationFailed"), AccessDeniedError, "was cut", "AZURE_STORAGE_SAS_TOKEN"),
        ("sas", refusal(403, "AuthorizationFailure"), AccessDeniedError, "another container", "sp=rl"),
        ("sas", refusal(403, "AuthorizationPermissionMismatch"), AccessDeniedError, "listing needs l", "sp=rl"),
        ("sas", refusal(403, "AuthorizationSourceIPMismatch"), AccessDeniedError, "other addresses", "this machine"),
        ("sas", refusal(403, "AuthorizationProtocolMismatch"), AccessDeniedError, "https only", "https endpoint"),
        ("sas", refusal(403, "AuthorizationServiceMismatch"), AccessDeniedError, "another service", "ss=b"),
        ("sas", refusal(403, "AuthorizationResourceTypeMismatch"), AccessDeniedError, "kind of resource", "srt=co"),
        ("key", refusal(409, "BlobArchived"), UnsupportedError, "archive tier", "change its tier"),
        ("key", refusal(409, "BlobBeingRehydrated"), UnsupportedError, "archive tier", "wait"),
        ("key", refusal(409, "BlobUsesCustomerSpecifiedEncryption"), UnsupportedError, "customer", "copy the blob"),
        ("key", refusal(416, "InvalidRange"), SourceChangedError, "shorter", "start the load again"),
        ("key", refusal(400, "InvalidUri"), BackendError, "form", "http://127.0.0.1:10000/account"),
        ("key", refusal(400, "SomethingNew"), BackendError, "", ""),
        ("key", refusal(503, "ServerBusy", **{"Retry-After": "7"}), ThrottledError, "more requests", "MX_CONCURRENCY"),
        ("key", refusal(429), ThrottledError, "more requests", "MX_CONCURRENCY"),
        ("key", refusal(500, "InternalError"), UnavailableError, "passing fault", "try again later"),
        ("key", refusal(500, "OperationTimedOut"), UnavailableError, "passing fault", "try again later"),
        ("key", refusal(502), UnavailableError, "passing fault", "try again later"),
        ("key", (302, {"Location": "https://evil.example.com"}, b""), BackendError, "", ""),
    ],
)
def test_what_a_made_up_answer_means(
    scripted: Callable[..., AzureStorage],
    kind: str,
    answer: Answer,
    error: type[BackendError],
    cause: str,
    hint: str,
) -> None:
    """The error names the object, the operation, the code and the request, and repeats no word of the service."""
    storage = scripted(answer, **KINDS[kind])

    with pytest.raises(BackendError) as caught:
        storage.read_into("dir/object", 0, memoryview(bytearray(9)), version=None)

    found = caught.value
    text = str(found)
    assert error is type(found), text
    assert cause in (found.cause or "")
    assert hint in (found.hint or "")
    assert "could not read bytes 0-8 of az://models/dir/object" in text
    assert f"HTTP {answer[0]}" in text
    assert answer[1].get("x-ms-error-code", "") in text
    assert answer[1].get("x-ms-request-id", "") in text
    assert SIGNATURE not in text
    assert "{" not in text
    assert (error in {ThrottledError, UnavailableError}) == found.retryable
    if "Retry-After" in answer[1]:
        assert 7.0 == found.retry_after_seconds


@pytest.mark.parametrize(
    ("code", "detail", "cause", "hint"),
    [
        ("AuthorizationPermissionMismatch", "", "Storage Blob Data Reader", "role Storage Blob Data Reader"),
        ("AuthorizationFailure", "", "firewall", "Networking"),
        ("InvalidAuthenticationInfo", "Audience validation failed.", "another service", "AZURE_AUTHORITY_HOST"),
        ("InvalidAuthenticationInfo", "Issuer validation failed.", "another tenant", "AZURE_TENANT_ID"),
        ("AuthenticationFailed", "Lifetime validation failed. The token is expired.", "ran out", "clock"),
    ],
)
def test_what_a_made_up_answer_to_a_token_means(code: str, detail: str, cause: str, hint: str) -> None:
    """The role that lets an identity read is named."""
    from modelexpress_core.storage.http import Refusal, Request
    from modelexpress_core.uri import ModelURI
    from mx_azure._errors import AzureFailures

    failures = AzureFailures(
        ModelURI.parse("az://models"), endpoint=lambda: "", closed=lambda: False, kind="token", variable=""
    )
    status, headers, content = refusal(403, code, detail)
    request = Request.to_url("GET", "https://models1.blob.core.windows.net/models/object")

    error = failures.of_answer(Refusal(request, status, "", headers, content), "object", "read the size")

    assert AccessDeniedError is type(error)
    assert cause in (error.cause or "")
    assert hint in (error.hint or "")


def test_the_codes_of_a_head_are_in_its_headers(scripted: Callable[..., AzureStorage]) -> None:
    """It has no body."""
    with pytest.raises(AccessDeniedError, match="KeyBasedAuthenticationNotPermitted"):
        scripted((403, {"x-ms-error-code": "KeyBasedAuthenticationNotPermitted"}, b"")).stat("object")


# -- the real server, and the way to it --------------------------------------------------------------------------------


def test_a_wrong_key(opened: Callable[..., AzureStorage]) -> None:
    """The variable is named, the key is not shown."""
    with pytest.raises(AccessDeniedError, match="AZURE_STORAGE_ACCOUNT_KEY") as caught:
        opened(AZURE_STORAGE_ACCOUNT_KEY="d3Jvbmcta2V5").stat("object")

    assert "d3Jvbmcta2V5" not in str(caught.value)


def test_a_container_that_does_not_exist(opened: Callable[..., AzureStorage]) -> None:
    """For every operation, by its name."""
    storage = opened("az://no-such-container")

    for call in (
        lambda: list(storage.list("")),
        lambda: storage.read_into("object", 0, memoryview(bytearray(9)), version=None),
    ):
        with pytest.raises(NotFoundError, match="ContainerNotFound"):
            call()


def test_an_endpoint_without_the_account(azurite: Azurite, opened: Callable[..., AzureStorage]) -> None:
    """The usual slip with emulators; the error says how to write it."""
    storage = opened(AZURE_STORAGE_ENDPOINT=f"http://127.0.0.1:{azurite.port}")

    with pytest.raises(BackendError) as caught:
        storage.stat("object")

    assert caught.value.hint


def test_an_account_that_does_not_exist(opened: Callable[..., AzureStorage]) -> None:
    """Its host name does not resolve, and the cause says what that means."""
    storage = opened(AZURE_STORAGE_ENDPOINT="https://no-such-account.invalid")

    with pytest.raises(UnavailableError, match="does not resolve") as caught:
        storage.stat("object")

    assert "storage account" in str(caught.value)
    assert "AZURE_STORAGE_ENDPOINT" in str(caught.value)


def test_a_refused_connection(opened: Callable[..., AzureStorage]) -> None:
    """It may be tried again."""
    with pytest.raises(UnavailableError, match="refused the connection") as caught:
        opened(AZURE_STORAGE_ENDPOINT=f"http://127.0.0.1:{CLOSED_PORT}/mxaccount").stat("object")

    assert caught.value.retryable


def test_https_where_the_server_speaks_http(azurite: Azurite, opened: Callable[..., AzureStorage]) -> None:
    """The scheme of the endpoint is the thing to check."""
    with pytest.raises(UnavailableError, match="AZURE_STORAGE_ENDPOINT"):
        opened(AZURE_STORAGE_ENDPOINT=azurite.endpoint.replace("http:", "https:")).stat("object")


@pytest.mark.parametrize("kind", ["reset", "truncate"])
def test_a_connection_that_breaks_gives_a_short_count(
    proxied: Callable[..., tuple[AzureStorage, TcpProxy]], put: Callable[..., Any], kind: Any
) -> None:
    """The bytes before the break count and are right, and the next call goes on where they end."""
    content = bytes(range(256)) * 8192
    put("faults/object", content)
    fault = Fault(kind, after_bytes=1_500_000)
    storage, _ = proxied(lambda number, _: fault if number == 0 else None)
    memory = bytearray(len(content))

    done = storage.read_into("faults/object", 0, memoryview(memory), version=None)

    assert 1_000_000 < done < 1_500_000
    rest = storage.read_into("faults/object", done, memoryview(memory)[done:], version=None)
    assert len(content) - done == rest
    assert content == memory


@pytest.mark.parametrize("operation", ["list", "stat", "read"])
def test_silence_is_a_deadline(proxied: Callable[..., tuple[AzureStorage, TcpProxy]], operation: str) -> None:
    """After the read timeout, which the error names."""
    storage, _ = proxied(lambda _number, _head: Fault("stall"), MX_AZURE_READ_TIMEOUT_SECONDS="0.3")
    calls: dict[str, Callable[[], Any]] = {
        "list": lambda: list(storage.list("")),
        "stat": lambda: storage.stat("object"),
        "read": lambda: storage.read_into("object", 0, memoryview(bytearray(9)), version=None),
    }

    with pytest.raises(DeadlineError, match="MX_AZURE_READ_TIMEOUT_SECONDS") as caught:
        calls[operation]()

    assert caught.value.retryable


def test_close_ends_everything(opened: Callable[..., AzureStorage]) -> None:
    """Later calls fail at once, and are not to be tried again."""
    storage = opened()
    storage.close()

    with pytest.raises(BackendError, match="was closed") as caught:
        storage.stat("object")

    assert not caught.value.retryable
