"""Every kind of credential in every condition: what a load of an object sees, and what the doctor says of it.

SeaweedFS checks keys and what their users may do. It knows no session tokens, and keys do not run out there: such
answers are made up, by a server before it or in its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import define, field
from botocore.credentials import SSOProvider, SSOTokenProvider
from safetensors.torch import save

import modelexpress_core as mx
from devtools.credential_matrices import S3
from devtools.seaweedfs import SeaweedFS
from modelexpress_core.doctor import diagnose
from modelexpress_core.errors import AccessDeniedError
from modelexpress_core.uri import ModelURI
from mx_s3._storage import S3Storage, open_s3
from tests.support.network import CLOSED_PORT
from tests.support.scripted_http import Answer

_CONTENT = b"content"
_SESSION_TOKEN = "the-session-token"
_START_URL = "https://example.awsapps.com/start"
_WEIGHTS = {"weight": torch.arange(4.0)}
_OBJECTS = {"matrix/object": _CONTENT, "checkpoint/model.safetensors": save(_WEIGHTS)}

#: What refuses a kind that is wrong, in place of what gives credentials.
_WRONG: Mapping[str, Answer] = {
    "assumed role": (403, {}, b"<ErrorResponse><Error><Code>AccessDenied</Code></Error></ErrorResponse>"),
    "web identity (EKS: IRSA)": (
        400,
        {},
        b"<ErrorResponse><Error><Code>InvalidIdentityToken</Code></Error></ErrorResponse>",
    ),
    "single sign-on": (403, {"x-amzn-ErrorType": "ForbiddenException"}, b"{}"),
    "instance metadata (EC2)": (404, {}, b""),
}

_ROLES = {
    "web identity (EKS: IRSA)": "web identity",
    "container (ECS, EKS Pod Identity)": "container",
    "instance metadata (EC2)": "metadata",
}

_CONFIGS = {
    "assumed role": """
        [profile serving]
        role_arn = {role}
        source_profile = source
        [profile source]
        aws_access_key_id = AKIDSOURCE
        aws_secret_access_key = s0urce-secret
    """,
    "single sign-on": """
        [profile serving]
        sso_start_url = {start}
        sso_region = us-east-1
        sso_account_id = 123456789012
        sso_role_name = serving
        services = here
        [services here]
        sso =
          endpoint_url = {url}
    """,
    "`credential_process`": """
        [profile serving]
        credential_process = {program}
    """,
}


@define
class Case:
    """A load that is prepared.

    Attributes:
        environ: Its variables.
        uri: Its bucket.
        expire: Makes what S3 accepted so far invalid.
        made_up: How many answers of S3 were made up.
    """

    environ: dict[str, str] = field(factory=dict)
    uri: str = "s3://models"
    expire: Callable[[], None] = lambda: None
    made_up: list[Any] = field(factory=list)


def _error(status: int, code: str) -> Answer:
    return status, {}, f"<Error><Code>{code}</Code><Message>words of the server</Message></Error>".encode()


def _listing(directory: str) -> bytes:
    contents = "".join(
        f"<Contents><Key>{key}</Key><Size>{len(content)}</Size><ETag>&quot;1&quot;</ETag></Contents>"
        for key, content in _OBJECTS.items()
        if key.startswith(directory)
    )
    start = '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false</IsTruncated>'
    return f"{start}{contents}</ListBucketResult>".encode()


def _with_sessions(condition: str, made_up: list[Any]) -> Callable[[Any], Answer]:
    """S3 that checks session tokens."""

    def answer(request: Any) -> Answer:
        made_up.append(request)
        token = request.headers.get("X-Amz-Security-Token")
        listing = "list-type=2" in request.path
        if token is None:
            return _error(403, "InvalidAccessKeyId")
        if token != _SESSION_TOKEN:
            return _error(400, "InvalidToken")
        if condition == "expired":
            return _error(400, "ExpiredToken")
        if condition == ("may not list" if listing else "may not read"):
            return _error(403, "AccessDenied")
        return (200, {}, _listing(request)) if listing else _object(request)

    return answer


def _listing(request: Any) -> bytes:
    directory = re.findall(r"prefix=(\w+)", request.path)[0]
    contents = "".join(
        f"<Contents><Key>{key}</Key><Size>{len(content)}</Size><ETag>&quot;1&quot;</ETag></Contents>"
        for key, content in _OBJECTS.items()
        if key.startswith(directory)
    )
    start = '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false</IsTruncated>'
    return f"{start}{contents}</ListBucketResult>".encode()


def _object(request: Any) -> Answer:
    path = request.path.partition("?")[0]
    content = next((content for key, content in _OBJECTS.items() if path.endswith(key)), None)
    if content is None:
        return _error(403, "AccessDenied")  # as S3 says of what does not exist, without the right to list
    if request.method == "HEAD":
        return 200, {"ETag": '"1"', "Content-Length": str(len(content))}, b""
    begin, end = map(int, re.findall(r"\d+", request.headers["Range"]))
    end = min(end, len(content) - 1)
    return 206, {"ETag": '"1"', "Content-Range": f"bytes {begin}-{end}/{len(content)}"}, content[begin : end + 1]


class _Places:
    """The places where credentials are found: files of this test, and the stand-ins for services."""

    def __init__(self, server: SeaweedFS, services: Any, of_role: Any, directory: Path) -> None:
        environs = {user: server.environ(user) for user in ("admin", "reader", "fetcher", "lister")}
        self.keys = {user: (env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"]) for user, env in environs.items()}
        self.services = services
        self.of_role = of_role
        self.config, self.credentials, self.output, self.token, self.login = (
            directory / name for name in ("config", "credentials", "output", "token", "sso")
        )

    def supply(self, user: str) -> None:
        """Put the keys of the user into every place."""
        self.services.keys = access, secret = self.keys[user]
        self.credentials.write_text(f"[serving]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")
        self.output.write_text(json.dumps({"Version": 1, "AccessKeyId": access, "SecretAccessKey": secret}))
        login = {"accessToken": self.services.sso_token, "expiresAt": "2099-01-01T00:00:00Z", "startUrl": _START_URL}
        self.login.mkdir(exist_ok=True)
        self._login_file.write_text(json.dumps(login))

    @property
    def _login_file(self) -> Path:
        return self.login / f"{hashlib.sha1(_START_URL.encode()).hexdigest()}.json"

    def variables(self, kind: str, user: str) -> dict[str, str | None]:
        """Variables that replace those of the server."""
        nothing: dict[str, str | None] = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
        if kind == "access key":
            return dict(zip(nothing, self.keys[user], strict=True))
        if kind in _ROLES:
            return {**self.of_role(_ROLES[kind])}
        text = _CONFIGS.get(kind, "").format(
            role=self.services.role_arn, url=self.services.url, start=_START_URL, program=f"cat {self.output}"
        )
        self.config.write_text("\n".join(line.removeprefix(" " * 8) for line in text.splitlines()))
        given: dict[str, dict[str, str | None]] = {
            "anonymous": {"MX_S3_ANONYMOUS": "1"},
            "session token": {
                "AWS_ACCESS_KEY_ID": "ASIAEXAMPLE",
                "AWS_SECRET_ACCESS_KEY": "a-secret",
                "AWS_SESSION_TOKEN": _SESSION_TOKEN,
            },
            "keys of a profile": {"AWS_PROFILE": "serving", "AWS_SHARED_CREDENTIALS_FILE": str(self.credentials)},
        }
        of_config = {
            "AWS_PROFILE": "serving",
            "AWS_CONFIG_FILE": str(self.config),
            "AWS_ENDPOINT_URL_STS": self.services.url,
        }
        return {**nothing, **given.get(kind, of_config)}

    def take_away(self, kind: str, variables: dict[str, str | None]) -> None:
        """Take away what the kind is."""
        if kind == "access key":
            variables.update(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
        elif kind == "session token":
            variables["AWS_SESSION_TOKEN"] = None
        elif kind == "instance metadata (EC2)":
            variables["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = f"http://127.0.0.1:{CLOSED_PORT}"
        elif kind == "assumed role":
            self.config.write_text(self.config.read_text().replace("source_profile = source", "source_profile = x"))
        elif kind == "`credential_process`":
            self.config.write_text(self.config.read_text().replace("= cat", "= /no/such/program"))
        for file in (self.token, self._login_file, self.credentials):
            file.unlink(missing_ok=True)

    def spoil(self, kind: str, variables: dict[str, str | None]) -> None:
        """Replace the kind by a wrong one."""
        self.services.refusal = _WRONG.get(kind)
        if kind == "access key":
            variables["AWS_SECRET_ACCESS_KEY"] = "wr0ng-secret"
        elif kind == "session token":
            variables["AWS_SESSION_TOKEN"] = "another-token"
        self.credentials.write_text(self.credentials.read_text().replace(self.services.keys[1], "another-secret"))
        self.output.write_text("s3cret words")
        self.token.write_text("another-token")

    def end(self, kind: str) -> None:
        """Let what credentials are fetched with run out."""
        if kind == "web identity (EKS: IRSA)":
            body = b"<ErrorResponse><Error><Code>ExpiredTokenException</Code></Error></ErrorResponse>"
            self.services.refusal = (400, {}, body)
        elif kind == "single sign-on":
            self._login_file.write_text(self._login_file.read_text().replace("2099", "2001"))

    def expiring(self, case: Case, kind: str, *, again: bool) -> Callable[[Any], Answer | None]:
        """Answers of S3 that refuse keys once they ran out."""
        expired: set[str] = set()

        def refuse(request: Any) -> Answer | None:
            if request.access_key not in expired:
                return None
            case.made_up.append(request)
            return _error(400, "ExpiredToken")

        def expire() -> None:
            expired.update(self.keys[user][0] for user in (("reader", "admin") if again else ("reader",)))
            if not (again and kind == "keys of a profile"):  # nobody writes the file
                self.supply("admin")

        case.expire = expire
        return refuse


@pytest.fixture
def places(
    server: SeaweedFS,
    services: Any,
    of_role: Callable[[str], dict[str, str | None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> _Places:
    places = _Places(server, services, of_role, tmp_path)
    for provider in (SSOProvider, SSOTokenProvider):  # botocore reads HOME once, at import
        monkeypatch.setattr(provider, "_SSO_TOKEN_CACHE_DIR", str(places.login))
    return places


@pytest.fixture
def prepared(
    server: SeaweedFS,
    places: _Places,
    fronted: Callable[..., str],
    serving: Any,
    put: Callable[..., str],
) -> Iterator[Callable[[str, str], Case]]:
    """Gives the case of a kind in a condition."""
    for key, content in _OBJECTS.items():
        for bucket in ("models", "public"):
            put(key, content, bucket=bucket)
    stack = contextlib.ExitStack()

    def prepared(kind: str, condition: str) -> Case:
        case = Case(uri="s3://public" if (kind, condition) == ("anonymous", "valid") else "s3://models")
        user = {"may not list": "fetcher", "may not read": "lister"}.get(condition, "reader")
        places.supply(user)
        variables = places.variables(kind, user)
        if condition == "missing":
            places.take_away(kind, variables)
        elif condition == "wrong":
            places.spoil(kind, variables)
        elif condition == "expired":
            places.end(kind)
        if kind == "session token":
            port = stack.enter_context(serving(_with_sessions(condition, case.made_up)))
            variables["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        elif condition.startswith("expired, "):
            refuse = places.expiring(case, kind, again=condition == "expired, and refused again")
            variables["AWS_ENDPOINT_URL"] = fronted(refuse)
        environ = {**server.environ(), **variables}
        case.environ = {name: value for name, value in environ.items() if value is not None}
        return case

    with stack:
        yield prepared


def _load(case: Case, condition: str) -> bytes:
    """List, and read in two pieces, between which credentials may run out."""
    memory = bytearray(len(_CONTENT))
    with contextlib.closing(open_s3(ModelURI.parse(case.uri), case.environ)) as storage:
        path = "matrix/object"
        if condition != "may not read":
            (path,) = [info.path for info in storage.list("matrix")]
        storage.read_into(path, 0, memoryview(memory)[:3], version=None)
        case.expire()
        storage.read_into(path, 3, memoryview(memory)[3:], version=None)
    return bytes(memory)


def _checked_by(case: Case, services: Any, error: AccessDeniedError | None) -> str:
    """What answered, as devtools.credential_matrices names it."""
    if services.requests or services.unauthorized or case.made_up:
        return "stand-in"
    return "emulator" if error is None or "S3 answered" in str(error) else "no server"


@pytest.mark.parametrize(("kind", "condition"), S3.cases())
def test_what_a_load_sees(kind: str, condition: str, services: Any, prepared: Callable[[str, str], Case]) -> None:
    """The object's bytes, or one final error with cause and next step, and without a secret."""
    case = prepared(kind, condition)
    expected = S3.kind(kind).outcomes[condition]
    error = None
    begun = time.monotonic()

    try:
        content = _load(case, condition)
    except AccessDeniedError as exc:
        error = exc

    assert expected.checked_by == _checked_by(case, services, error)
    assert time.monotonic() - begun < 20
    if not expected.cause:
        assert error is None, error
        assert _CONTENT == content
        return
    assert error is not None
    assert expected.cause == error.cause, error
    assert error.hint
    assert not error.retryable
    assert [] == [secret for secret in _secrets(case, services) if secret in str(error)]


@pytest.mark.parametrize(("kind", "condition"), [case for case in S3.cases(doctor=True) if ", and" not in case[1]])
def test_the_doctor_says_the_same(
    kind: str, condition: str, services: Any, prepared: Callable[[str, str], Case]
) -> None:
    """The step that fails has the cause of the error; those before it succeed."""
    case = prepared(kind, condition)
    cause = S3.kind(kind).outcomes[condition].cause

    steps = {step.name: step for step in diagnose(f"{case.uri}/matrix", environ=case.environ)}

    shown = " ".join(f"{step.seen} {step.facts}" for step in steps.values())
    assert [] == [secret for secret in _secrets(case, services) if secret in shown]
    if not cause:
        assert ["ok"] * 3 == [steps[name].status for name in ("credentials", "listing", "read")]
        return
    failed = next(step for step in steps.values() if step.status == "failed")
    assert failed.name in {"plugin", "credentials", "listing", "read"}
    assert cause == failed.cause, failed
    assert failed.hint


@pytest.mark.parametrize(("kind", "condition"), [case for case in S3.cases(doctor=True) if ", and" not in case[1]])
def test_a_checkpoint_ends_alike(kind: str, condition: str, prepared: Callable[[str, str], Case]) -> None:
    """The error of a whole load has the same cause; a checkpoint of the usual names loads without the right to list."""
    case = prepared(kind, condition)
    cause = S3.kind(kind).outcomes[condition].cause

    if not cause or (condition == "may not list" and kind != "anonymous"):
        state = mx.load_state_dict(f"{case.uri}/checkpoint", environ=case.environ)
        assert torch.equal(_WEIGHTS["weight"], state["weight"])
        return
    with pytest.raises(AccessDeniedError) as caught:
        mx.load_state_dict(f"{case.uri}/checkpoint", environ=case.environ)
    assert cause == caught.value.cause, caught.value


def test_the_order_of_the_lookup(places: _Places, opened: Callable[..., S3Storage]) -> None:
    """Each place in the list of docs/credentials.md counts if those before it have nothing."""
    places.supply("reader")
    by_variables: dict[str, dict[str, str | None]] = {
        "MX_S3_ANONYMOUS": {"MX_S3_ANONYMOUS": "1"},
        "explicit": {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "a-secret"},
        "assume-role-with-web-identity": places.of_role("web identity"),
        "shared-credentials-file": {"AWS_SHARED_CREDENTIALS_FILE": str(places.credentials)},
        "container-role": {
            **places.of_role("container"),
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": None,
            "AWS_CONTAINER_AUTHORIZATION_TOKEN": places.services.container_token,
        },
        "iam-role": places.of_role("metadata"),
    }
    places.token.write_text(places.services.web_identity_token)
    sso = {"start_url": _START_URL, "region": "us-east-1", "account_id": "123456789012", "role_name": "serving"}
    by_profile = {
        "assume-role": [f"role_arn = {places.services.role_arn}", "source_profile = source"],
        "sso": ["services = here", *(f"sso_{name} = {value}" for name, value in sso.items())],
        "custom-process": [f"credential_process = cat {places.output}"],
        "config-file": ["aws_access_key_id = AKIDCONFIG", "aws_secret_access_key = a-secret"],
    }
    others = f"""
[profile source]
aws_access_key_id = AKIDSOURCE
aws_secret_access_key = a-secret
[services here]
sso =
  endpoint_url = {places.services.url}
"""
    order = [
        "MX_S3_ANONYMOUS",
        "explicit",
        "assume-role",
        "assume-role-with-web-identity",
        "sso",
        "shared-credentials-file",
        "custom-process",
        "config-file",
        "container-role",
        "iam-role",
    ]

    def first_of(methods: list[str]) -> str:
        lines = [line for method in methods for line in by_profile.get(method, ())]
        places.config.write_text("\n".join(["[profile serving]", *lines, others]))
        variables: dict[str, str | None] = {"AWS_PROFILE": "serving", "AWS_CONFIG_FILE": str(places.config)}
        variables["AWS_ENDPOINT_URL_STS"] = places.services.url
        for method in ("iam-role", *reversed(methods)):
            variables.update(by_variables.get(method, {}))
        return opened(**variables).credentials().rpartition("(")[2].rstrip(")")

    assert order == [first_of(order[number:]) for number in range(len(order))]
    assert len(S3.order) == len(order)


def _secrets(case: Case, services: Any) -> list[str]:
    names = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    given = [case.environ[name] for name in names if name in case.environ]
    return [
        *given,
        services.keys[1],
        services.sso_token,
        services.web_identity_token,
        services.container_token,
        "s3cret",
    ]
