"""A real S3 server for all tests, a proxy before it that misbehaves, and servers that follow a script."""

from __future__ import annotations

import contextlib
import json
import re
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from attrs import frozen

from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import Policy, TcpProxy
from modelexpress_core.uri import ModelURI
from mx_s3._storage import S3Storage, open_s3
from tests.support import scripted_http
from tests.support.scripted_http import Answer

BUCKET = "models"


@pytest.fixture(scope="session")
def server(s3_server: SeaweedFS) -> SeaweedFS:
    return s3_server


@pytest.fixture(scope="session")
def client(server: SeaweedFS) -> Iterator[Any]:
    with contextlib.closing(server.client()) as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None) -> None:
    pass


@pytest.fixture
def put(client: Any) -> Callable[..., str]:
    """Stores an object; its ETag comes back."""

    def put(key: str, body: bytes, bucket: str = BUCKET, **options: Any) -> str:
        return str(client.put_object(Bucket=bucket, Key=key, Body=body, **options)["ETag"])

    return put


@pytest.fixture
def opened(server: SeaweedFS) -> Iterator[Callable[..., S3Storage]]:
    """Opens storages on the server; variables replace those of the user, None takes one away."""
    with contextlib.ExitStack() as stack:

        def opened(
            uri: str = f"s3://{BUCKET}",
            user: str = "admin",
            clock: Callable[[], float] = time.monotonic,
            **variables: str | None,
        ) -> S3Storage:
            environ = {**server.environ(user), **variables}
            settings = {name: value for name, value in environ.items() if value is not None}
            return stack.enter_context(contextlib.closing(open_s3(ModelURI.parse(uri), settings, clock=clock)))

        yield opened


@pytest.fixture
def proxied(server: SeaweedFS, opened: Callable[..., S3Storage]) -> Iterator[Callable[..., Any]]:
    """Opens storages that reach the server through a proxy with the given policy."""
    with contextlib.ExitStack() as stack:

        def proxied(policy: Policy | None = None, **options: Any) -> tuple[S3Storage, TcpProxy]:
            port = urlsplit(server.endpoint).port
            assert port is not None
            proxy = stack.enter_context(TcpProxy("127.0.0.1", port, policy))
            options.setdefault("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            return opened(**options), proxy

        yield proxied


@frozen
class Request(scripted_http.Request):
    """What a client sent, and signed."""

    @property
    def access_key(self) -> str:
        """Whose signature it has."""
        return self._scope[0]

    @property
    def region(self) -> str:
        """The region that it was signed for."""
        return self._scope[2]

    @property
    def _scope(self) -> list[str]:
        match = re.search(r"Credential=([^,]*)", self.headers.get("Authorization", ""))
        return match[1].split("/") if match else ["", "", ""]


def serving(
    answer: Callable[[Request], Answer | None], context: ssl.SSLContext | None = None
) -> contextlib.AbstractContextManager[int]:
    """The port of a server that gives each request the answer; None closes the connection without one."""

    def answer_signed(request: scripted_http.Request) -> Answer | None:
        return answer(Request(request.method, request.path, request.headers, request.body))

    return scripted_http.serving(answer_signed, context)


@pytest.fixture(name="serving")
def _serving() -> Callable[..., contextlib.AbstractContextManager[int]]:
    return serving


@pytest.fixture
def scripted(opened: Callable[..., S3Storage]) -> Iterator[Callable[..., S3Storage]]:
    """Opens storages on a server that gives each request one answer: for what the real server never does."""
    with contextlib.ExitStack() as stack:

        def scripted(answer: Answer, **options: Any) -> S3Storage:
            port = stack.enter_context(serving(lambda _: answer))
            storage = opened(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", **options)
            stack.callback(storage.close)
            return storage

        yield scripted


@pytest.fixture
def fronted(server: SeaweedFS) -> Iterator[Callable[[Callable[[Request], Answer | None]], str]]:
    """Gives the URL of a server that answers what the given function does, and passes on what that leaves to S3."""
    port = urlsplit(server.endpoint).port
    assert port is not None
    with contextlib.ExitStack() as stack:

        def fronted(answer: Callable[[Request], Answer | None]) -> str:
            def answer_or_pass_on(request: Request) -> Answer:
                return answer(request) or scripted_http.pass_on(request, port)

            return f"http://127.0.0.1:{stack.enter_context(serving(answer_or_pass_on))}"

        yield fronted


class AwsServices:
    """Stands for what gives credentials: STS, single sign-on, the metadata service, the agent of containers.

    Attributes:
        keys: The access key and its secret that are given out from now on.
        lifetime_seconds: How long they are said to be valid.
        requests: What was asked for, in order: ``"sts"``, ``"sso"``, ``"metadata"``, ``"container"``.
        unauthorized: How many requests had not the token that they need.
        refusal: The answer that is given instead of credentials.
        delay_seconds: How long each answer takes.
        web_identity: The form of the last request to STS.
    """

    role_arn = "arn:aws:iam::123456789012:role/serving"
    container_token = "the-token-of-the-container"
    web_identity_token = "the-token-of-the-service-account"
    sso_token = "the-token-of-the-login"

    def __init__(self, keys: tuple[str, str]) -> None:
        self.keys = keys
        self.lifetime_seconds = 3600
        self.requests: list[str] = []
        self.unauthorized = 0
        self.refusal: Answer | None = None
        self.delay_seconds = 0.0
        self.web_identity: dict[str, str] = {}
        self.url = ""

    def answer(self, request: Request) -> Answer:
        if request.path == "/latest/api/token":
            return (200, {}, b"metadata-token") if request.method == "PUT" else (405, {}, b"")
        kinds = {"/latest": "metadata", "/v1/cre": "container", "/federa": "sso"}
        kind = kinds.get(request.path[:7], "sts")
        wanted = {
            "metadata": ("x-aws-ec2-metadata-token", "metadata-token"),
            "container": ("Authorization", self.container_token),
            "sso": ("x-amz-sso_bearer_token", self.sso_token),
        }
        if kind in wanted and request.headers.get(wanted[kind][0]) != wanted[kind][1]:
            self.unauthorized += 1
            return 401, {}, b"who are you"
        if request.path.endswith("/security-credentials/"):
            return 200, {}, b"serving"
        self.requests.append(kind)
        if kind == "sts":
            self.web_identity = dict(parse_qsl(request.body.decode()))
        time.sleep(self.delay_seconds)
        return self.refusal or self._credentials(kind)

    def _credentials(self, kind: str) -> Answer:
        end = datetime.now(timezone.utc) + timedelta(seconds=self.lifetime_seconds)
        expiration = end.strftime("%Y-%m-%dT%H:%M:%SZ")
        access, secret = self.keys
        if kind == "sts":
            action = self.web_identity["Action"]
            answer = _STS_ANSWER.format(action=action, access=access, secret=secret, expiration=expiration)
            return 200, {}, answer.encode()
        # No session token, for the keys are real ones of the test server, which knows no sessions.
        if kind == "sso":
            role = {"accessKeyId": access, "secretAccessKey": secret, "sessionToken": ""}
            role = {**role, "expiration": int(end.timestamp() * 1000)}
            return 200, {}, json.dumps({"roleCredentials": role}).encode()
        body = {"AccessKeyId": access, "SecretAccessKey": secret, "Token": "", "Expiration": expiration}
        return 200, {}, json.dumps(body).encode()


_STS_ANSWER = """<{action}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<{action}Result><Credentials>
<AccessKeyId>{access}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey><SessionToken></SessionToken>
<Expiration>{expiration}</Expiration></Credentials></{action}Result>
</{action}Response>"""


@pytest.fixture
def services(server: SeaweedFS) -> Iterator[AwsServices]:
    """Services that give out the real keys of the user ``reader``."""
    environ = server.environ("reader")
    services = AwsServices((environ["AWS_ACCESS_KEY_ID"], environ["AWS_SECRET_ACCESS_KEY"]))
    with serving(services.answer) as port:
        services.url = f"http://127.0.0.1:{port}"
        yield services


@pytest.fixture
def of_role(services: AwsServices, tmp_path: Path) -> Callable[[str], dict[str, str | None]]:
    """Variables with which credentials come from a role, for each of the ways that variables name."""
    token = tmp_path / "token"

    def of_role(way: str) -> dict[str, str | None]:
        variables: dict[str, str | None] = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
        if way == "web identity":
            token.write_text(services.web_identity_token)
            return {
                **variables,
                "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
                "AWS_ROLE_ARN": services.role_arn,
                "AWS_ROLE_SESSION_NAME": "test",
                "AWS_ENDPOINT_URL_STS": services.url,
            }
        if way == "metadata":
            return {
                **variables,
                "AWS_EC2_METADATA_DISABLED": "false",
                "AWS_EC2_METADATA_SERVICE_ENDPOINT": services.url,
            }
        token.write_text(services.container_token)
        return {
            **variables,
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{services.url}/v1/credentials",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(token),
        }

    return of_role


@pytest.fixture(params=["web identity", "metadata", "container"])
def from_role(request: pytest.FixtureRequest, of_role: Callable[[str], dict[str, str | None]]) -> dict[str, str | None]:
    """Variables with which credentials come from a role, in each of these ways."""
    return of_role(request.param)


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Waits for a condition, ten seconds at most."""

    def until(condition: Callable[[], object]) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)

    return until
