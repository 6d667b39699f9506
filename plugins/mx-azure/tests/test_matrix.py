"""Every kind of credential in every condition: what a load of a blob sees, and what the doctor says of it.

Azurite knows no roles, so what an identity may not do is a made-up answer.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
import trustme

from devtools.azurite import Azurite
from modelexpress_core.doctor import diagnose
from modelexpress_core.errors import AccessDeniedError
from modelexpress_core.uri import ModelURI
from mx_azure._storage import open_azure
from tests.support.azure_tokens import CLIENT, CONTENT, SECRET, TENANT, TokenServices, refusal
from tests.support.scripted_http import Answer, Request, serving

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("azure tokens")]

_NOTHING = "no variable holds a credential"
_ROLE = "the identity has no role that lets it read data: Storage Blob Data Reader is missing"
_AGAIN = "a new token was fetched in the middle of the load, and the service refuses that too"
_PERMISSION = "the SAS token lacks a permission"

#: Kind of credential -> condition -> how the likely cause begins; empty where the load succeeds. An account key allows
#: everything and does not run out.
MATRIX: Mapping[str, Mapping[str, str]] = {
    "account key": {
        "valid": "",
        "missing": _NOTHING,
        "wrong": "the key is not one of this account",
    },
    "connection string": {
        "valid": "",
        "missing": _NOTHING,
        "wrong": "the key is not one of this account",
    },
    "SAS token": {
        "valid": "",
        "missing": _NOTHING,
        "wrong": "the SAS token is for another container or operation",
        "expired": "the SAS token ran out",
        "may not list": _PERMISSION,
        "may not read": _PERMISSION,
    },
    **{
        kind: {
            "valid": "",
            "missing": missing,
            "wrong": wrong,
            "expired, and renewed": "",
            "expired, and refused again": _AGAIN,
            "may not list": _ROLE,
            "may not read": _ROLE,
        }
        for kind, missing, wrong in (
            ("service principal", _NOTHING, "the secret is not one of the application"),
            ("workload identity", "the file is not mounted here", "the application has no federated credential"),
            ("managed identity", _NOTHING, "this machine has no managed identity, or not the one"),
        )
    },
}

#: What Entra ID says of a wrong secret, and of a token that no federated credential is for.
_ENTRA_CODES = {"service principal": (7000215,), "workload identity": (700213,)}

_CASES = [(kind, condition) for kind, conditions in MATRIX.items() for condition in conditions]

_LISTING = (
    b"<EnumerationResults><Blobs><Blob><Name>matrix/object</Name><Properties><Etag>0x1</Etag>"
    b"<Content-Length>9</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob></Blobs></EnumerationResults>"
)


def _without_role(condition: str) -> Callable[[Request], Answer]:
    """A made-up service that allows an identity to list or to read, and not both."""
    denied = 403, {"x-ms-error-code": "AuthorizationPermissionMismatch"}, b""

    def answer(request: Request) -> Answer:
        if "comp=list" in request.path:
            return denied if condition == "may not list" else (200, {}, _LISTING)
        if "/matrix/object" not in request.path:
            return 404, {"x-ms-error-code": "BlobNotFound"}, b""
        return denied if condition == "may not read" else (206, {"Content-Range": "bytes 0-8/9"}, CONTENT[:9])

    return answer


def _with_account(server: Azurite, where: dict[str, str], kind: str, condition: str) -> dict[str, str]:
    """Variables with a key or a SAS token."""
    key = "d3Jvbmc=" if condition == "wrong" else server.key
    if kind == "account key":
        return {**where, "AZURE_STORAGE_ACCOUNT_KEY": key}
    if kind == "connection string":
        string = f"AccountName={server.account};AccountKey={key};BlobEndpoint={server.endpoint}"
        return {"MX_AZURE_CA_BUNDLE": where["MX_AZURE_CA_BUNDLE"], "AZURE_STORAGE_CONNECTION_STRING": string}
    options: dict[str, dict[str, Any]] = {
        "wrong": {"container": "public"},
        "expired": {"seconds": -60},
        "may not list": {"permissions": "r"},
        "may not read": {"permissions": "l"},
    }
    return {**where, "AZURE_STORAGE_SAS_TOKEN": server.sas(**options.get(condition, {}))}


@pytest.fixture
def without_role(secure: Azurite, authority: tuple[trustme.CA, Path]) -> Iterator[Callable[[str], str]]:
    """Gives the endpoint of the made-up service."""
    with contextlib.ExitStack() as stack:

        def without_role(condition: str) -> str:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority[0].issue_cert("127.0.0.1").configure_cert(context)
            port = stack.enter_context(serving(_without_role(condition), context))
            return f"https://127.0.0.1:{port}/{secure.account}"

        yield without_role


@pytest.fixture
def prepared(
    secure: Azurite,
    services: TokenServices,
    token_file: Path,
    without_role: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, str], dict[str, str]]:
    """Variables for a kind of credential, in a condition."""
    with contextlib.closing(secure.client()) as client:
        client.get_blob_client("models", "matrix/object").upload_blob(CONTENT, overwrite=True)
    where = {name: value for name, value in secure.environ().items() if name != "AZURE_STORAGE_ACCOUNT_KEY"}
    principal = {"AZURE_TENANT_ID": TENANT, "AZURE_CLIENT_ID": CLIENT, "AZURE_AUTHORITY_HOST": services.host}
    identities = {
        "service principal": {**principal, "AZURE_CLIENT_SECRET": SECRET},
        "workload identity": {**principal, "AZURE_FEDERATED_TOKEN_FILE": str(token_file)},
        "managed identity": {"AZURE_CLIENT_ID": CLIENT},
    }

    def prepared(kind: str, condition: str) -> dict[str, str]:
        if kind == "workload identity" and condition == "missing":
            token_file.unlink()
        elif condition == "missing":
            return where  # where nothing answers in the place of a metadata service
        if kind not in identities:
            return _with_account(secure, where, kind, condition)
        if kind == "managed identity":
            monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", services.machine)
        if condition == "wrong":
            services.refusal = refusal(400, *_ENTRA_CODES.get(kind, ()))
        if condition.startswith("expired"):
            services.claims = {"exp": int(time.time()) - 60}
        endpoint = {"AZURE_STORAGE_ENDPOINT": without_role(condition)} if condition.startswith("may not") else {}
        return {**where, **identities[kind], **endpoint}

    return prepared


@pytest.mark.parametrize(("kind", "condition"), _CASES)
def test_what_a_load_sees(
    kind: str, condition: str, services: TokenServices, prepared: Callable[[str, str], dict[str, str]]
) -> None:
    """The bytes of the blob, or one final error with cause and next step, and without a secret."""
    environ = prepared(kind, condition)
    cause = MATRIX[kind][condition]
    memory = bytearray(9)

    with contextlib.closing(open_azure(ModelURI.parse("az://models"), environ)) as storage:
        if condition == "expired, and renewed":
            assert storage._identity is not None
            storage._identity.token()
            services.claims = {}
        if not cause:
            (info,) = storage.list("matrix")
            assert 9 == storage.read_into(info.path, 0, memoryview(memory), version=info.version)
            assert CONTENT[:9] == memory
            assert len(services.tokens) == {"valid": min(1, len(services.tokens))}.get(condition, 2)
            return
        with pytest.raises(AccessDeniedError) as caught:
            list(storage.list("matrix"))
            storage.read_into("matrix/object", 0, memoryview(memory), version=None)

    assert str(caught.value.cause).startswith(cause), caught.value
    assert caught.value.hint
    assert not caught.value.retryable
    assert [] == [secret for secret in _secrets(environ, services) if secret in str(caught.value)]


@pytest.mark.parametrize(
    ("kind", "condition"),
    [
        (kind, condition)
        for kind in ("account key", "SAS token", "service principal", "managed identity")
        for condition in MATRIX[kind]
        if not condition.startswith("expired,")
    ],
)
def test_the_doctor_says_the_same(
    kind: str, condition: str, services: TokenServices, prepared: Callable[[str, str], dict[str, str]]
) -> None:
    """The step that fails has the cause of the error; those before it succeed."""
    environ = prepared(kind, condition)

    steps = {step.name: step for step in diagnose("az://models/matrix", environ=environ)}

    assert "ok" == steps["connection"].status
    assert "ok" == steps["tls"].status
    shown = " ".join(f"{step.seen} {step.facts}" for step in steps.values())
    assert [] == [secret for secret in _secrets(environ, services) if secret in shown]
    if condition == "valid":
        assert ["ok"] * 3 == [steps[name].status for name in ("credentials", "listing", "read")]
        return
    failed = next(step for step in steps.values() if step.status == "failed")
    assert failed.name in {"credentials", "listing", "read"}
    assert str(failed.cause).startswith(MATRIX[kind][condition]), failed
    assert failed.hint


def _secrets(environ: Mapping[str, str], services: TokenServices) -> list[str]:
    signature = dict(parse_qsl(environ.get("AZURE_STORAGE_SAS_TOKEN", ""))).get("sig")
    key = environ.get("AZURE_STORAGE_ACCOUNT_KEY")
    return [secret for secret in (signature, key, SECRET, *services.tokens) if secret]
