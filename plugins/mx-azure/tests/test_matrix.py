"""Every kind of credential in every condition: what a load of a blob sees, and what the doctor says of it.

Azurite knows no roles, so what an identity may not do is a made-up answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
import torch
import trustme
from attrs import define
from safetensors.torch import save

import modelexpress_core as mx
from devtools.azurite import Azurite
from devtools.credential_matrices import AZURE
from modelexpress_core.doctor import diagnose
from modelexpress_core.errors import AccessDeniedError, BackendError, NotFoundError
from modelexpress_core.uri import ModelURI
from mx_azure._storage import open_azure
from tests.support.azure_tokens import CLIENT, CONTENT, SECRET, TENANT, TokenServices, jwt, refusal
from tests.support.scripted_http import Answer, Request, serving

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("azure tokens")]

#: What Entra ID says of a wrong secret or certificate, of a token that no federated credential is for, and of what ran
#: out.
_ENTRA_CODES = {
    ("service principal with a secret", "wrong"): (7000215,),
    ("service principal with a secret", "expired"): (7000222,),
    ("service principal with a certificate", "wrong"): (700027,),
    ("workload identity (AKS)", "wrong"): (700213,),
    ("workload identity (AKS)", "expired"): (700024,),
}

_WEIGHTS = {"weight": torch.arange(4.0)}
_BLOBS = {"matrix/object": CONTENT, "checkpoint/model.safetensors": save(_WEIGHTS)}


def _without_role(condition: str) -> Callable[[Request], Answer]:
    """A made-up service that allows an identity to list or to read, and not both."""
    denied = 403, {"x-ms-error-code": "AuthorizationPermissionMismatch"}, b""

    def answer(request: Request) -> Answer:
        if "comp=list" in request.path:
            return denied if condition == "may not list" else (200, {}, _listing(request))
        return denied if condition == "may not read" else _blob(request)

    return answer


def _listing(request: Request) -> bytes:
    directory = re.findall(r"prefix=(\w+)", request.path)[0]
    blobs = "".join(
        f"<Blob><Name>{name}</Name><Properties><Etag>0x1</Etag><Content-Length>{len(content)}</Content-Length>"
        "<BlobType>BlockBlob</BlobType></Properties></Blob>"
        for name, content in _BLOBS.items()
        if name.startswith(directory)
    )
    return f"<EnumerationResults><Blobs>{blobs}</Blobs></EnumerationResults>".encode()


def _blob(request: Request) -> Answer:
    path = request.path.partition("?")[0]
    content = next((content for name, content in _BLOBS.items() if path.endswith(name)), None)
    if content is None:
        return 404, {"x-ms-error-code": "BlobNotFound"}, b""
    if request.method == "HEAD":
        return 200, {"ETag": '"0x1"', "Content-Length": str(len(content)), "x-ms-blob-type": "BlockBlob"}, b""
    asked = request.headers.get("x-ms-range") or request.headers["Range"]
    begin, end = map(int, re.findall(r"\d+", asked))
    end = min(end, len(content) - 1)
    return 206, {"ETag": '"0x1"', "Content-Range": f"bytes {begin}-{end}/{len(content)}"}, content[begin : end + 1]


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


@pytest.fixture(scope="module")
def certificate(authority: tuple[trustme.CA, Path]) -> Path:
    """File with a certificate and its key."""
    path = authority[1] / "principal.pem"
    authority[0].issue_cert(
        "principal.example.com", key_type=trustme.KeyType.RSA
    ).private_key_and_cert_chain_pem.write_to_path(str(path))
    return path


class _Cli:
    """Stands for the program ``az``, which prints a token.

    Attributes:
        asked: A file that is there once the program ran.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = directory / "asked"
        self._answer = directory / "answer"
        self._program = directory / "az"
        monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
        monkeypatch.setenv("AZURE_CONFIG_DIR", str(directory))  # as the program's users do; identities differ by it
        monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "AzureCliCredential")

    def log_in(self, number: int, **claims: Any) -> None:
        """Print this token from now on."""
        answer = {"accessToken": jwt(number, **claims), "expires_on": int(time.time()) + 3600}
        self._answer.write_text(json.dumps(answer))
        self._install(f'cat "{self._answer}"')

    def log_out(self) -> None:
        """Print what the program prints to those who are not logged in."""
        self._install("echo \"ERROR: Please run 'az login' to setup account.\" >&2; exit 1")

    def _install(self, command: str) -> None:
        self._program.write_text(f'#!/bin/sh\ntouch "{self.asked}"\n{command}\n')
        self._program.chmod(0o700)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], _Cli]:
    return lambda: _Cli(tmp_path, monkeypatch)


@define
class Case:
    """A load that is prepared.

    Attributes:
        environ: Its variables.
        uri: Its container.
        renew: Lets tokens be valid again.
        cli: Set if the program ``az`` gives tokens.
        made_up: The service is a made-up one.
    """

    environ: dict[str, str]
    uri: str = "az://models"
    renew: Callable[[], None] = lambda: None
    cli: _Cli | None = None
    made_up: bool = False


@pytest.fixture
def identities(
    services: TokenServices, token_file: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, str]]:
    """Variables of identities of Entra ID."""
    principal = {"AZURE_TENANT_ID": TENANT, "AZURE_CLIENT_ID": CLIENT, "AZURE_AUTHORITY_HOST": services.host}
    known = {
        "service principal with a secret": {**principal, "AZURE_CLIENT_SECRET": SECRET},
        "service principal with a certificate": {**principal, "AZURE_CLIENT_CERTIFICATE_PATH": str(certificate)},
        "workload identity (AKS)": {**principal, "AZURE_FEDERATED_TOKEN_FILE": str(token_file)},
        "user-assigned managed identity": {"AZURE_CLIENT_ID": CLIENT},
    }

    def identities(kind: str) -> dict[str, str]:
        if "managed identity" in kind:
            monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", services.machine)
        return known.get(kind, {})

    return identities


def _give_tokens(case: Case, kind: str, condition: str, services: TokenServices) -> None:
    """Let the stand-ins give tokens, or refuse to."""
    claims = {"exp": int(time.time()) - 60} if condition.startswith("expired") else {}
    program = case.cli
    if program is None:
        services.claims = claims
        case.renew = claims.clear
        refused = condition in {"wrong", "expired"}
        services.refusal = refusal(400, *_ENTRA_CODES.get((kind, condition), ())) if refused else None
    elif condition == "wrong":
        program.log_out()
    else:
        program.log_in(1, **claims)
        case.renew = lambda: program.log_in(2)


@pytest.fixture
def prepared(
    secure: Azurite,
    services: TokenServices,
    identities: Callable[[str], dict[str, str]],
    cli: Callable[[], _Cli],
    without_role: Callable[[str], str],
) -> Callable[[str, str], Case]:
    """Gives the case of a kind in a condition."""
    with contextlib.closing(secure.client()) as client:
        for container in ("models", "public"):
            for name, content in _BLOBS.items():
                client.get_blob_client(container, name).upload_blob(content, overwrite=True)
    where = {name: value for name, value in secure.environ().items() if name != "AZURE_STORAGE_ACCOUNT_KEY"}

    def prepared(kind: str, condition: str) -> Case:
        if kind == "anonymous":
            uri = "az://public" if condition == "valid" else "az://models"
            return Case({**where, "MX_AZURE_ANONYMOUS": "1"}, uri)
        if condition == "missing":
            files = {"AZURE_CLIENT_CERTIFICATE_PATH", "AZURE_FEDERATED_TOKEN_FILE"}
            given = {} if "managed identity" in kind else identities(kind)
            lost = {name: f"{value}-is-not-here" for name, value in given.items() if name in files}
            # Where no variable names a file, nothing is set, and nothing answers in place of a metadata service.
            return Case({**where, **({**given, **lost} if lost else {})})
        if kind in {"account key", "connection string", "SAS token"}:
            return Case(_with_account(secure, where, kind, condition))
        case = Case({**where, **identities(kind)}, cli=cli() if kind == "login of the Azure CLI" else None)
        if condition.startswith("may not"):
            case.environ["AZURE_STORAGE_ENDPOINT"], case.made_up = without_role(condition), True
        _give_tokens(case, kind, condition, services)
        return case

    return prepared


def _load(case: Case, condition: str) -> bytes:
    """List, and read; tokens may run out before."""
    memory = bytearray(9)
    with contextlib.closing(open_azure(ModelURI.parse(case.uri), case.environ)) as storage:
        if condition == "expired, and renewed":
            assert storage._identity is not None
            storage._identity.token()
            case.renew()
        path, version = "matrix/object", None
        if condition != "may not read":
            ((path, version),) = [(info.path, info.version) for info in storage.list("matrix")]
        storage.read_into(path, 0, memoryview(memory), version=version)
    return bytes(memory)


def _checked_by(case: Case, services: TokenServices, error: BackendError | None) -> str:
    """What answered, as devtools.credential_matrices names it."""
    if services.requests or case.made_up or (case.cli is not None and case.cli.asked.exists()):
        return "stand-in"
    return "emulator" if error is None or "the service answered" in str(error) else "no server"


@pytest.mark.parametrize(("kind", "condition"), AZURE.cases())
def test_what_a_load_sees(
    kind: str, condition: str, services: TokenServices, prepared: Callable[[str, str], Case]
) -> None:
    """The bytes of the blob, or one final error with cause and next step, and without a secret."""
    case = prepared(kind, condition)
    expected = AZURE.kind(kind).outcomes[condition]
    error = None

    try:
        content = _load(case, condition)
    except (AccessDeniedError, NotFoundError) as exc:
        error = exc

    assert expected.checked_by == _checked_by(case, services, error)
    if not expected.cause:
        assert error is None, error
        assert CONTENT[:9] == content
        assert len(services.tokens) in {0, 2 if condition == "expired, and renewed" else 1}
        return
    assert error is not None
    assert expected.cause == error.cause, error
    assert error.hint
    assert not error.retryable
    assert [] == [secret for secret in _secrets(case.environ, services) if secret in str(error)]


@pytest.mark.parametrize(("kind", "condition"), [case for case in AZURE.cases(doctor=True) if ", and" not in case[1]])
def test_the_doctor_says_the_same(
    kind: str, condition: str, services: TokenServices, prepared: Callable[[str, str], Case]
) -> None:
    """The step that fails has the cause of the error; those before it succeed."""
    case = prepared(kind, condition)
    cause = AZURE.kind(kind).outcomes[condition].cause

    steps = {step.name: step for step in diagnose(f"{case.uri}/matrix", environ=case.environ)}

    assert "ok" == steps["connection"].status
    assert "ok" == steps["tls"].status
    shown = " ".join(f"{step.seen} {step.facts}" for step in steps.values())
    assert [] == [secret for secret in _secrets(case.environ, services) if secret in shown]
    if not cause:
        assert ["ok"] * 3 == [steps[name].status for name in ("credentials", "listing", "read")]
        return
    failed = next(step for step in steps.values() if step.status == "failed")
    assert failed.name in {"credentials", "listing", "read"}
    assert cause == failed.cause, failed
    assert failed.hint


@pytest.mark.parametrize(("kind", "condition"), [case for case in AZURE.cases(doctor=True) if ", and" not in case[1]])
def test_a_checkpoint_ends_alike(kind: str, condition: str, prepared: Callable[[str, str], Case]) -> None:
    """The error of a whole load has the same cause; a checkpoint of the usual names loads without the right to list."""
    case = prepared(kind, condition)
    cause = AZURE.kind(kind).outcomes[condition].cause

    if not cause or (condition == "may not list" and kind != "anonymous"):
        state = mx.load_state_dict(f"{case.uri}/checkpoint", environ=case.environ)
        assert torch.equal(_WEIGHTS["weight"], state["weight"])
        return
    with pytest.raises((AccessDeniedError, NotFoundError)) as caught:
        mx.load_state_dict(f"{case.uri}/checkpoint", environ=case.environ)
    assert cause == caught.value.cause, caught.value


def test_the_order_of_the_lookup(
    secure: Azurite, services: TokenServices, identities: Callable[[str], dict[str, str]]
) -> None:
    """Each place in the list of docs/credentials.md counts if those before it have nothing."""
    where = {name: value for name, value in secure.environ().items() if name != "AZURE_STORAGE_ACCOUNT_KEY"}
    string = f"AccountName={secure.account};AccountKey={secure.key};BlobEndpoint={secure.endpoint}"
    kinds = (
        "service principal with a secret",
        "service principal with a certificate",
        "workload identity (AKS)",
        "user-assigned managed identity",
    )
    places = {
        "MX_AZURE_ANONYMOUS": {"MX_AZURE_ANONYMOUS": "1"},
        "AZURE_STORAGE_CONNECTION_STRING": {"AZURE_STORAGE_CONNECTION_STRING": string},
        "AZURE_STORAGE_ACCOUNT_KEY": {"AZURE_STORAGE_ACCOUNT_KEY": secure.key},
        "AZURE_STORAGE_SAS_TOKEN": {"AZURE_STORAGE_SAS_TOKEN": secure.sas()},
        "AZURE_CLIENT_SECRET": identities(kinds[0]),
        "AZURE_CLIENT_CERTIFICATE_PATH": identities(kinds[1]),
        "AZURE_FEDERATED_TOKEN_FILE": identities(kinds[2]),
        "a managed identity or a developer tool": identities(kinds[3]),
    }
    order = list(places)

    def first_of(names: list[str]) -> str:
        environ = {**where, **{name: value for place in names for name, value in places[place].items()}}
        with contextlib.closing(open_azure(ModelURI.parse("az://models"), environ)) as storage:
            said = storage.credentials()
        return next((name for name in order if name in said), said)

    assert order == [first_of(order[number:]) for number in range(len(order))]
    assert 4 == len(services.tokens)
    assert len(AZURE.order) == len(order)


def _secrets(environ: Mapping[str, str], services: TokenServices) -> list[str]:
    signature = dict(parse_qsl(environ.get("AZURE_STORAGE_SAS_TOKEN", ""))).get("sig")
    key = environ.get("AZURE_STORAGE_ACCOUNT_KEY")
    return [secret for secret in (signature, key, SECRET, *services.tokens) if secret]
