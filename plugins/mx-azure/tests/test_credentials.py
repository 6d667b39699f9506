"""Each kind of credential: what it allows, where it comes from, and what is said where it fails.

Tokens are tried on a real server over https. Entra ID and the metadata service of machines cannot run here: stand-ins
give out tokens that the server accepts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
import torch
import trustme
from safetensors.torch import save_file

from devtools.azurite import Azurite
from modelexpress_core import load_state_dict
from modelexpress_core.errors import AccessDeniedError, BackendError, SettingsError, ThrottledError, UnavailableError
from modelexpress_core.settings import from_env
from modelexpress_core.storage.http import Proxies
from modelexpress_core.uri import ModelURI
from mx_azure._credentials import Identity
from mx_azure._errors import TokenError
from mx_azure._storage import AzureStorage, open_azure
from mx_azure.settings import AzureSettings
from tests.support.azure_tokens import ASSERTION, CLIENT, CONTENT, SECRET, TENANT, TokenServices, refusal
from tests.support.network import CLOSED_PORT
from tests.support.scripted_http import Answer
from tests.support.waiting import eventually

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("azure tokens")]


@pytest.fixture(params=["secret", "workload identity", "managed identity"])
def identity(
    request: pytest.FixtureRequest, services: TokenServices, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str | None]:
    """Variables with which tokens come from each kind of identity."""
    if request.param == "secret":
        return {"AZURE_CLIENT_SECRET": SECRET}
    if request.param == "workload identity":
        return {"AZURE_FEDERATED_TOKEN_FILE": str(token_file)}
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", services.machine)
    return {"AZURE_TENANT_ID": None}


def read(storage: AzureStorage) -> bytes:
    memory = bytearray(len(CONTENT))
    count = storage.read_into("object", 0, memoryview(memory), version=storage.stat("object").version)
    return bytes(memory[:count])


# -- keys, SAS tokens, and neither -------------------------------------------------------------------------------------


def test_a_connection_string_is_enough(secure: Azurite) -> None:
    """It holds account, endpoint and key."""
    string = f"AccountName={secure.account};AccountKey={secure.key};BlobEndpoint={secure.endpoint}"
    environ = {"AZURE_STORAGE_CONNECTION_STRING": string, "MX_AZURE_CA_BUNDLE": secure.environ()["MX_AZURE_CA_BUNDLE"]}

    with contextlib.closing(open_azure(ModelURI.parse("az://models"), environ)) as storage:
        assert CONTENT == read(storage)
        assert f"key of the account {secure.account}, from AZURE_STORAGE_CONNECTION_STRING" == storage.credentials()


@pytest.mark.parametrize("in_string", [True, False])
def test_a_sas_token_reads_and_lists(
    azurite: Azurite, opened: Callable[..., AzureStorage], put: Callable[..., Any], in_string: bool
) -> None:
    """In its own variable or in a connection string; its limits are shown, its signature is not."""
    put("sas/object", CONTENT)
    token = azurite.sas()
    variables = {"AZURE_STORAGE_SAS_TOKEN": f"?{token}"}
    if in_string:
        string = f"BlobEndpoint={azurite.endpoint}/;SharedAccessSignature={token}"
        variables = {"AZURE_STORAGE_CONNECTION_STRING": string}
    storage = opened(AZURE_STORAGE_ACCOUNT_KEY=None, **variables)
    memory = bytearray(9)

    (info,) = storage.list("sas")

    assert 9 == storage.read_into("sas/object", 3, memoryview(memory), version=info.version)
    assert CONTENT[3:12] == memory
    described = storage.credentials()
    assert "permissions rl" in described
    assert dict(parse_qsl(token))["sig"] not in described


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seconds": -60}, "ran out"),
        ({"permissions": "l"}, "lacks a permission: reading needs r"),
        ({"container": "public"}, "SAS token"),
    ],
)
def test_a_sas_token_that_does_not_suffice(
    azurite: Azurite,
    opened: Callable[..., AzureStorage],
    put: Callable[..., Any],
    options: dict[str, Any],
    says: str,
) -> None:
    """The error says what is wrong with it, and which variable to set; the token is in no message."""
    put("sas/object", CONTENT)
    token = azurite.sas(**options)
    storage = opened(AZURE_STORAGE_ACCOUNT_KEY=None, AZURE_STORAGE_SAS_TOKEN=token)

    for call in (
        lambda: storage.read_into("sas/object", 0, memoryview(bytearray(9)), version=None),
        lambda: storage.stat("sas/object"),
    ):
        with pytest.raises(AccessDeniedError, match=says) as caught:
            call()

        assert not caught.value.retryable
        assert "AZURE_STORAGE_SAS_TOKEN" in str(caught.value)
        assert dict(parse_qsl(token))["sig"] not in str(caught.value)
        assert "sig=" not in str(caught.value)


def test_a_token_without_the_right_to_list(
    azurite: Azurite, opened: Callable[..., AzureStorage], put: Callable[..., Any]
) -> None:
    """It reads a file that is named, and the error of a listing says what it lacks."""
    put("sas/object", CONTENT)
    storage = opened(AZURE_STORAGE_ACCOUNT_KEY=None, AZURE_STORAGE_SAS_TOKEN=azurite.sas(permissions="r"))

    assert 9 == storage.read_into("sas/object", 0, memoryview(bytearray(9)), version=None)
    with pytest.raises(AccessDeniedError, match="listing needs l"):
        list(storage.list("sas"))


def test_anonymous_requests(opened: Callable[..., AzureStorage], put: Callable[..., Any]) -> None:
    """They read and list a public container, and the error of another one says what to do."""
    put("object", CONTENT, "public")
    put("object", CONTENT)
    storage = opened("az://public", MX_AZURE_ANONYMOUS="1")

    assert ["object"] == [info.path for info in storage.list("")]
    assert CONTENT == read(storage)
    assert "none" in storage.credentials()
    with pytest.raises(BackendError, match="not public") as caught:
        opened("az://models", MX_AZURE_ANONYMOUS="1").stat("object")
    assert caught.value.hint


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_each_identity_reads_with_one_token(
    with_tokens: Callable[..., AzureStorage], services: TokenServices, identity: dict[str, str | None]
) -> None:
    """The token is fetched once for all storages and threads of the process, for storage and nothing else."""
    storages = [with_tokens(**identity) for _ in range(3)]

    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(lambda number: read(storages[number % 3]), range(24)))

    assert {CONTENT} == set(results)
    assert "object" in [info.path for info in storages[0].list("")]
    assert 1 == len(services.tokens)
    last = services.requests[-1]
    assert last.get("scope", last.get("resource", "")).startswith("https://storage.azure.com")
    assert CLIENT == last["client_id"]
    described = storages[0].credentials()
    assert f"application {CLIENT} of the tenant {TENANT}" in described
    assert services.tokens[0] not in described


def test_a_workload_identity_sends_the_token_of_the_file(
    with_tokens: Callable[..., AzureStorage], services: TokenServices, token_file: Path
) -> None:
    """As a client assertion (RFC 7523), to the tenant of the variable."""
    read(with_tokens(AZURE_FEDERATED_TOKEN_FILE=str(token_file)))

    asked = services.requests[-1]
    assert ASSERTION == asked["client_assertion"]
    assert "client_credentials" == asked["grant_type"]


def test_a_system_assigned_identity_has_no_client(
    with_tokens: Callable[..., AzureStorage], services: TokenServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without AZURE_CLIENT_ID, the machine's own identity is asked for, with the header that the service demands."""
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", services.machine)

    assert CONTENT == read(with_tokens(AZURE_TENANT_ID=None, AZURE_CLIENT_ID=None))

    assert "client_id" not in services.requests[-1]
    assert "true" == services.requests[-1]["metadata"]


def test_no_proxy_sees_the_tokens_of_the_machine(
    with_tokens: Callable[..., AzureStorage], services: TokenServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metadata service is on the machine itself, whatever HTTP_PROXY says."""
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", services.machine)

    storage = with_tokens(AZURE_TENANT_ID=None, HTTP_PROXY=f"http://127.0.0.1:{CLOSED_PORT}")

    assert CONTENT == read(storage)


def test_an_unknown_authority_gets_no_token(
    with_tokens: Callable[..., AzureStorage], services: TokenServices, tmp_path: Path
) -> None:
    """Neither Entra ID nor the Blob service, if its certificate is not trusted."""
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))

    with pytest.raises(AccessDeniedError, match="SSLCertVerificationError"):
        read(with_tokens(AZURE_CLIENT_SECRET=SECRET, MX_AZURE_CA_BUNDLE=str(other)))
    with pytest.raises(UnavailableError, match="MX_AZURE_CA_BUNDLE") as caught:
        with_tokens(AZURE_STORAGE_ACCOUNT_KEY="a2V5", MX_AZURE_CA_BUNDLE=str(other)).stat("object")

    assert "is not trusted" in str(caught.value)
    assert [] == services.requests


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (refusal(401, 7000215), "secret is not one of the application"),
        (refusal(401, 7000222), "the secret ran out"),
        (refusal(400, 700016, error="unauthorized_client"), "no such application"),
        (refusal(400, 90002, error="invalid_request"), "no such tenant"),
        (refusal(400, 4711), "does not accept"),
    ],
)
def test_what_entra_id_refuses(
    with_tokens: Callable[..., AzureStorage], services: TokenServices, answer: Answer, says: str
) -> None:
    """Its number is translated; its words, which may repeat secrets, are not shown."""
    services.refusal = answer
    storage = with_tokens(AZURE_CLIENT_SECRET=SECRET)

    for call in (lambda: storage.stat("object"), storage.credentials, lambda: list(storage.list(""))):
        with pytest.raises(AccessDeniedError, match=says) as caught:
            call()

        assert not caught.value.retryable
        assert SECRET not in str(caught.value)
        assert ASSERTION not in str(caught.value)
        assert services.host in str(caught.value)


def test_a_workload_identity_without_a_federation(
    with_tokens: Callable[..., AzureStorage], services: TokenServices, token_file: Path
) -> None:
    """The error names the federated credentials of the application."""
    services.refusal = refusal(401, 700213)

    with pytest.raises(AccessDeniedError, match="no federated credential"):
        read(with_tokens(AZURE_FEDERATED_TOKEN_FILE=str(token_file)))


def test_a_token_file_that_is_missing(with_tokens: Callable[..., AzureStorage], tmp_path: Path) -> None:
    """The file is named."""
    missing = tmp_path / "missing"

    with pytest.raises(AccessDeniedError, match="AZURE_FEDERATED_TOKEN_FILE") as caught:
        read(with_tokens(AZURE_FEDERATED_TOKEN_FILE=str(missing)))

    assert str(missing) in str(caught.value)


def test_a_principal_without_its_tenant(with_tokens: Callable[..., AzureStorage]) -> None:
    """The variables to check are named."""
    with pytest.raises(AccessDeniedError, match="AZURE_TENANT_ID"):
        read(with_tokens(AZURE_CLIENT_SECRET=SECRET, AZURE_TENANT_ID=None))


def test_an_entra_id_that_cannot_be_reached(with_tokens: Callable[..., AzureStorage]) -> None:
    """It may be tried again, and the host is named."""
    with pytest.raises(AccessDeniedError, match=r"no connection to 127\.0\.0\.1:1 ") as caught:
        read(with_tokens(AZURE_CLIENT_SECRET=SECRET, AZURE_AUTHORITY_HOST=f"127.0.0.1:{CLOSED_PORT}"))

    assert caught.value.retryable


def test_an_endless_answer_with_a_token_is_given_up(
    with_tokens: Callable[..., AzureStorage], services: TokenServices
) -> None:
    """One MiB is read of it."""
    services.refusal = (200, {"Content-Type": "application/json"}, b" " * (2 << 20))

    with pytest.raises(AccessDeniedError, match="BadAnswerError"):
        read(with_tokens(AZURE_CLIENT_SECRET=SECRET))


def test_a_token_that_no_header_can_hold_is_refused(
    with_tokens: Callable[..., AzureStorage], services: TokenServices
) -> None:
    """It would add a header of its own."""
    given = b'{"access_token": "a\\r\\nX-Evil: b", "token_type": "Bearer", "expires_in": 3600}'
    services.refusal = (200, {"Content-Type": "application/json"}, given)

    with pytest.raises(AccessDeniedError, match="no token from the service principal"):
        read(with_tokens(AZURE_CLIENT_SECRET=SECRET))


def test_a_silent_service_is_given_up(with_tokens: Callable[..., AzureStorage], services: TokenServices) -> None:
    """After the read timeout."""
    services.gate.clear()
    started = time.monotonic()
    try:
        with pytest.raises(AccessDeniedError, match="TimeoutError"):
            read(with_tokens(AZURE_CLIENT_SECRET=SECRET, MX_AZURE_READ_TIMEOUT_SECONDS="0.3"))
        assert time.monotonic() - started < 8
    finally:
        services.gate.set()


def test_a_machine_without_an_identity(
    with_tokens: Callable[..., AzureStorage], services: TokenServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metadata service's 400 says so."""
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", services.machine)
    services.refusal = refusal(400, error="invalid_request")

    with pytest.raises(AccessDeniedError, match="no managed identity") as caught:
        read(with_tokens(AZURE_TENANT_ID=None))

    assert "AZURE_CLIENT_ID" in str(caught.value)
    assert not caught.value.retryable


def test_no_credentials_at_all(with_tokens: Callable[..., AzureStorage]) -> None:
    """Every way to set some is named."""
    with pytest.raises(AccessDeniedError, match="no credentials were found") as caught:
        read(with_tokens(AZURE_TENANT_ID=None, AZURE_CLIENT_ID=None))

    for name in ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "managed identity", "MX_AZURE_ANONYMOUS"):
        assert name in str(caught.value)


def test_tokens_are_sent_by_https_only(azurite: Azurite) -> None:
    """An http endpoint is refused when the storage is opened."""
    environ = {"AZURE_STORAGE_ENDPOINT": azurite.endpoint}

    with pytest.raises(SettingsError, match="unencrypted"):
        open_azure(ModelURI.parse("az://models"), environ)


# -- throttling, and tokens that end -----------------------------------------------------------------------------------


@pytest.fixture
def clock() -> list[float]:
    return [time.time()]


@pytest.fixture
def principal(secure: Azurite, services: TokenServices, clock: list[float]) -> Identity:
    """A service principal, by a clock of the test's own."""
    environ = {
        "AZURE_TENANT_ID": TENANT,
        "AZURE_CLIENT_ID": CLIENT,
        "AZURE_CLIENT_SECRET": SECRET,
        "AZURE_AUTHORITY_HOST": services.host,
        "MX_AZURE_CA_BUNDLE": secure.environ()["MX_AZURE_CA_BUNDLE"],
    }
    return Identity(from_env(AzureSettings, environ), Proxies(), lambda: clock[0])


def test_a_throttled_service_is_left_alone(principal: Identity, services: TokenServices, clock: list[float]) -> None:
    """Many threads cause one request, none follows in the time that it asks for, and then it is asked again."""
    services.refusal = refusal(429, error="too_many_requests", **{"Retry-After": "40"})

    def refused(_: int) -> TokenError:
        with pytest.raises(TokenError) as caught:
            principal.token()
        return caught.value

    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(refused, range(24)))

    assert 1 == len(services.requests)
    assert {(429, "40")} == {(error.attempts[-1].status, error.attempts[-1].retry_after) for error in errors}
    services.refusal = None
    clock[0] += 39
    refused(0)
    clock[0] += 2
    assert principal.token()
    assert 2 == len(services.requests)


def test_a_throttled_metadata_service_may_be_asked_again(
    with_tokens: Callable[..., AzureStorage], services: TokenServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Core waits as long as it asks for."""
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", services.machine)
    services.refusal = refusal(429, error="too_many_requests", **{"Retry-After": "40"})

    with pytest.raises(ThrottledError, match="HTTP 429") as caught:
        read(with_tokens(AZURE_TENANT_ID=None))

    assert caught.value.retryable
    assert caught.value.retry_after_seconds == 40


def test_a_token_is_renewed_before_it_ends(principal: Identity, services: TokenServices, clock: list[float]) -> None:
    """One thread fetches another, and the others go on with the old one meanwhile."""
    first = principal.token()
    clock[0] += 3400  # of 3600 seconds
    services.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        renewing = pool.submit(principal.token)
        eventually(lambda: len(services.requests) == 2)

        assert first == principal.token()
        services.gate.set()
        second = renewing.result(10)

    assert second != first
    assert second == principal.token()
    assert 2 == len(services.tokens)


def test_a_token_that_cannot_be_renewed_is_used_to_its_end(
    principal: Identity, services: TokenServices, clock: list[float]
) -> None:
    """It is not tried for each read; after the end, the error is raised."""
    first = principal.token()
    clock[0] += 3400
    services.refusal = refusal(503, error="temporarily_unavailable")

    assert {first} == {principal.token() for _ in range(20)}
    assert 2 == len(services.requests)
    clock[0] += 200
    with pytest.raises(TokenError):
        principal.token()


def test_a_refused_token_is_replaced_once_for_all_reads(
    secure: Azurite, with_tokens: Callable[..., AzureStorage], services: TokenServices, token_file: Path
) -> None:
    """A token that the server takes for another service is followed by one that it accepts, within the same read."""
    services.claims = {"aud": "https://graph.microsoft.com"}
    storage = with_tokens(AZURE_FEDERATED_TOKEN_FILE=str(token_file))
    assert storage._identity is not None
    storage._identity.token()
    services.claims = {}

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: read(storage), range(16)))

    assert {CONTENT} == set(results)
    assert 2 == len(services.tokens)


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"iss": "https://login.example.com/"}, "of another tenant"),
        ({"aud": "https://graph.microsoft.com"}, "for another service"),
    ],
)
def test_a_refused_token_and_a_refused_new_one(
    with_tokens: Callable[..., AzureStorage],
    services: TokenServices,
    token_file: Path,
    claims: dict[str, str],
    says: str,
) -> None:
    """The error says why; that of a HEAD, whose answer has no words, that another was tried."""
    services.claims = claims
    storage = with_tokens(AZURE_FEDERATED_TOKEN_FILE=str(token_file))

    calls: dict[str, Callable[[], Any]] = {
        "a new token was fetched": lambda: storage.stat("object"),
        says: lambda: storage.read_into("object", 0, memoryview(bytearray(9)), version=None),
    }
    for words, call in calls.items():
        with pytest.raises(AccessDeniedError, match=words) as caught:
            call()

        assert not any(token in str(caught.value) for token in services.tokens)


def test_a_checkpoint_loads_with_a_token(
    secure: Azurite, services: TokenServices, with_tokens: Callable[..., AzureStorage], tmp_path: Path
) -> None:
    """From the settings to the tensors, over https."""
    tensors = {"weight": torch.arange(1000, dtype=torch.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    uri = secure.upload(tmp_path, "models", "checkpoint")
    environ = {
        **secure.environ(),
        "AZURE_TENANT_ID": TENANT,
        "AZURE_CLIENT_ID": CLIENT,
        "AZURE_CLIENT_SECRET": SECRET,
        "AZURE_AUTHORITY_HOST": services.host,
    }
    del environ["AZURE_STORAGE_ACCOUNT_KEY"]

    loaded = load_state_dict(uri, environ=environ)

    assert torch.equal(tensors["weight"], loaded["weight"])
