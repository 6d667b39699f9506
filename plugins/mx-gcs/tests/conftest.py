"""An emulator of GCS for all tests, a stand-in before it that checks tokens, and one for what gives tokens."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import jwt

from devtools.fake_gcs import FakeGcs
from devtools.http_proxy import HttpProxy
from devtools.tcp_proxy import Policy, TcpProxy
from modelexpress_core.uri import ModelURI
from mx_gcs._storage import GcsStorage, open_gcs
from tests.support import scripted_http
from tests.support.http_servers import server_context
from tests.support.scripted_http import Answer

BUCKET = "models"


@pytest.fixture(scope="session")
def server(gcs_server: FakeGcs) -> FakeGcs:
    return gcs_server


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None) -> None:
    pass


@pytest.fixture
def put(server: FakeGcs) -> Callable[..., str]:
    """Stores an object; its generation comes back."""
    return server.put


@pytest.fixture
def opened() -> Iterator[Callable[..., GcsStorage]]:
    """Opens storages with the given variables."""
    with contextlib.ExitStack() as stack:

        def opened(
            uri: str = f"gs://{BUCKET}", clock: Callable[[], float] | None = None, **variables: str
        ) -> GcsStorage:
            options: dict[str, Any] = {} if clock is None else {"clock": clock}
            return stack.enter_context(contextlib.closing(open_gcs(ModelURI.parse(uri), variables, **options)))

        yield opened


@pytest.fixture
def emulated(server: FakeGcs, opened: Callable[..., GcsStorage]) -> Callable[..., GcsStorage]:
    """Opens storages on the emulator."""

    def emulated(uri: str = f"gs://{BUCKET}", **variables: str) -> GcsStorage:
        return opened(uri, **{**server.environ(), **variables})

    return emulated


@pytest.fixture
def proxied(server: FakeGcs, opened: Callable[..., GcsStorage]) -> Iterator[Callable[..., Any]]:
    """Opens storages that reach the emulator through a proxy with the given policy."""
    with contextlib.ExitStack() as stack:

        def proxied(policy: Policy | None = None, **variables: str) -> tuple[GcsStorage, TcpProxy]:
            proxy = stack.enter_context(TcpProxy("127.0.0.1", server.port, policy))
            return opened(STORAGE_EMULATOR_HOST=f"127.0.0.1:{proxy.port}", **variables), proxy

        yield proxied


class Request(scripted_http.Request):
    """What a client sent, as GCS and the services for tokens read it."""

    @property
    def token(self) -> str:
        """The access token that it has; empty for none."""
        return str(self.headers.get("Authorization", "")).removeprefix("Bearer ")

    @property
    def query(self) -> dict[str, str]:
        """The parameters of its URL."""
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}

    @property
    def form(self) -> dict[str, str]:
        """The fields of its body."""
        return {name: values[0] for name, values in parse_qs(self.body.decode()).items()}


@contextlib.contextmanager
def serving(answer: Callable[[Request], Answer | None], context: ssl.SSLContext | None = None) -> Iterator[str]:
    """The URL of a server that gives each request the answer; None closes the connection without one."""

    def answered(request: scripted_http.Request) -> Answer | None:
        return answer(Request(request.method, request.path, request.headers, request.body))

    with scripted_http.serving(answered, context) as port:
        yield f"http{'s' if context else ''}://127.0.0.1:{port}"


@pytest.fixture(name="serving")
def _serving() -> Callable[..., contextlib.AbstractContextManager[str]]:
    return serving


@pytest.fixture
def scripted(opened: Callable[..., GcsStorage]) -> Iterator[Callable[..., GcsStorage]]:
    """Opens storages on a server that gives each request one answer: for what the emulator never does."""
    with contextlib.ExitStack() as stack:

        def scripted(answer: Answer | Callable[[Request], Answer | None], **variables: str) -> GcsStorage:
            url = stack.enter_context(serving(answer if callable(answer) else lambda _: answer))
            storage = opened(**{"STORAGE_EMULATOR_HOST": url, **variables})
            stack.callback(storage.close)
            return storage

        yield scripted


def refusal(status: int, reason: str, message: str, **headers: str) -> Answer:
    """An answer of the JSON API that refuses."""
    errors = [{"domain": "global", "reason": reason, "message": message}]
    body = json.dumps({"error": {"code": status, "message": message, "errors": errors}})
    return status, {"Content-Type": "application/json; charset=UTF-8", **headers}, body.encode()


@pytest.fixture(name="refusal")
def _refusal() -> Callable[..., Answer]:
    return refusal


class Google:
    """Stands for GCS, which checks tokens before the emulator gets the request, and for what gives tokens.

    Attributes:
        url: Where it is.
        tokens: The tokens that are valid now, and what each allows: ``"get"``, ``"list"``.
        given: Tokens that were given out so far.
        asked: What was asked for a token, in order: ``"oauth"``, ``"sts"``, ``"iam"``, ``"metadata"``.
        forms: The forms of these requests.
        requests: The requests to GCS.
        lifetime_seconds: How long new tokens are said to be valid.
        keeps_tokens: The same token is given until it is no longer valid.
        rights: What new tokens allow.
        refusals: Answers instead of a token, by what is asked.
        public: Requests without a token may get and list.
        payer: The project that may be billed, of a bucket with Requester Pays.
    """

    service_account = "loader@project.iam.gserviceaccount.com"
    target = "reader@project.iam.gserviceaccount.com"
    subject_token = "the-token-of-the-workload"
    refresh_token = "the-refresh-token"
    client_secret = "the-client-secret"

    def __init__(self, port: int, key: rsa.RSAPrivateKey) -> None:
        self._port = port
        self.key = key
        self._lock = threading.Lock()
        self.url = ""
        self.tokens: dict[str, frozenset[str]] = {}
        self.given: list[str] = []
        self.asked: list[str] = []
        self.forms: list[dict[str, str]] = []
        self.requests: list[Request] = []
        self.lifetime_seconds = 3600.0
        self.keeps_tokens = False
        self.rights = frozenset({"get", "list"})
        self.refusals: dict[str, Answer] = {}
        self.public = False
        self.payer = ""
        self.before: Callable[[Request], Answer | None] = lambda _: None

    # -- what is written into files -----------------------------------------------------------------------------------

    @property
    def private_key(self) -> str:
        """PEM."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    def key_file(self) -> dict[str, str]:
        return {
            "type": "service_account",
            "client_email": self.service_account,
            "private_key_id": "abc",
            "private_key": self.private_key,
            "token_uri": f"{self.url}/token",
        }

    def login_file(self) -> dict[str, str]:
        return {
            "type": "authorized_user",
            "client_id": "the-client",
            "client_secret": self.client_secret,
            "refresh_token": self.refresh_token,
            "quota_project_id": "the-quota-project",
        }

    def external_file(self, subject: Path, *, impersonated: bool) -> dict[str, Any]:
        info = {
            "type": "external_account",
            "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/x",
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": f"{self.url}/v1/token",
            "credential_source": {"file": str(subject)},
        }
        acting = {"service_account_impersonation_url": self._impersonation_url}
        return {**info, **(acting if impersonated else {})}

    def impersonated_file(self) -> dict[str, Any]:
        url = self._impersonation_url.replace(self.url, "https://iamcredentials.googleapis.com")
        return {
            "type": "impersonated_service_account",
            "service_account_impersonation_url": url,
            "source_credentials": self.login_file(),
        }

    @property
    def _impersonation_url(self) -> str:
        return f"{self.url}/v1/projects/-/serviceAccounts/{self.target}:generateAccessToken"

    # -- answers ------------------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Answer | None:
        path = urlsplit(request.path).path
        if path.startswith(("/storage/", "/download/")):
            self.requests.append(request)
            refused = self.before(request) or self._unpaid(request) or self.checked(request)
            return refused or scripted_http.pass_on(request, self._port)
        if path.startswith("/computeMetadata/"):
            return self._metadata(request, path)
        if path == "/token":
            return self.oauth(request.form)
        if path == "/v1/token":
            return self._sts(request.form)
        return self._iam(request) if path.endswith(f"{self.target}:generateAccessToken") else (404, {}, b"")

    def checked(self, request: Request) -> Answer | None:
        """What GCS answers to a token that does not suffice; None if it does."""
        right = "list" if request.path.partition("?")[0].endswith("/o") else "get"
        if self.public and not request.token:
            return None
        unpaid = self._unpaid(request)
        if unpaid is not None:
            return unpaid
        allowed = frozenset({"get", "list"}) if self.public and not request.token else self.tokens.get(request.token)
        if allowed is None and request.token:
            return refusal(401, "authError", "Invalid Credentials", **{"WWW-Authenticate": "Bearer"})
        permission = f"storage.objects.{right}"
        denied = f"does not have {permission} access to the Google Cloud Storage"
        if allowed is None:
            return refusal(401, "required", f"Anonymous caller {denied} bucket.")
        if right not in allowed:
            words = f"{self.service_account} {denied} object. Permission '{permission}' denied on resource (or it may "
            return refusal(403, "forbidden", f"{words}not exist).")
        return None

    def _unpaid(self, request: Request) -> Answer | None:
        """What GCS answers if nobody pays for the request; None if that is settled."""
        project = request.query.get("userProject") or request.headers.get("X-Goog-User-Project")
        if not self.payer or project == self.payer:
            return None
        if not project:
            return refusal(400, "required", "Bucket is a requester pays bucket but no user project provided.")
        words = f"{self.service_account} does not have serviceusage.services.use access to the Google Cloud project."
        return refusal(403, "forbidden", words)

    def _token(self, kind: str, prefix: str = "ya29") -> tuple[str, Answer | None]:
        with self._lock:
            self.asked.append(kind)
            if kind in self.refusals:
                return "", self.refusals[kind]
            if self.keeps_tokens and self.given:
                return self.given[-1], None
            token = f"{prefix}.token-{len(self.given)}-of-{kind}"
            self.given.append(token)
            if kind != "sts":
                self.tokens[token] = self.rights
            return token, None

    def oauth(self, form: dict[str, str]) -> Answer:
        self.forms.append(form)
        if form["grant_type"] == "refresh_token":
            known = (form["refresh_token"], form["client_secret"]) == (self.refresh_token, self.client_secret)
        else:
            public = self.key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            try:
                known = bool(jwt.decode(form["assertion"], certs=public))
            except ValueError:
                return _json(400, error="invalid_grant", error_description="Invalid JWT Signature.")
        if not known:
            return _json(400, error="invalid_grant", error_description="Token has been expired or revoked.")
        token, refused = self._token("oauth")
        return refused or _json(200, access_token=token, expires_in=self.lifetime_seconds, token_type="Bearer")

    def _sts(self, form: dict[str, str]) -> Answer:
        self.forms.append(form)
        if form["subject_token"] != self.subject_token:
            words = "The audience in ID Token does not match the expected audience."
            return _json(400, error="invalid_grant", error_description=words)
        token, refused = self._token("sts")
        if "iam" not in form["scope"] and "cloud-platform" not in form["scope"]:
            self.tokens[token] = self.rights  # it is used for GCS itself
        answer = {"access_token": token, "expires_in": self.lifetime_seconds, "token_type": "Bearer"}
        return refused or _json(200, issued_token_type="urn:ietf:params:oauth:token-type:access_token", **answer)

    def _iam(self, request: Request) -> Answer:
        if request.token not in self.given:
            return _json(401, error={"code": 401, "status": "UNAUTHENTICATED", "message": "no"})
        self.forms.append(json.loads(request.body))
        token, refused = self._token("iam")
        end = datetime.now(timezone.utc) + timedelta(seconds=self.lifetime_seconds)
        return refused or _json(200, accessToken=token, expireTime=end.strftime("%Y-%m-%dT%H:%M:%SZ"))

    def _metadata(self, request: Request, path: str) -> Answer:
        flavor = {"Metadata-Flavor": "Google"}
        if request.headers.get("Metadata-Flavor") != "Google":
            return 403, flavor, b"Missing Metadata-Flavor:Google header."
        if path.endswith("/email") and self.refusals.get("metadata", (200,))[0] == 200:
            return 200, flavor, self.service_account.encode()
        token, refused = self._token("metadata")
        status, headers, body = refused or _json(200, access_token=token, expires_in=self.lifetime_seconds)
        return status, {**headers, **flavor}, body


def _json(status: int, **content: Any) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


@pytest.fixture(scope="session")
def key() -> rsa.RSAPrivateKey:
    """Of a service account; making one takes a while."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, str]:
    """TLS under Google's names, and the file with the authority that vouches for it."""
    names = ("storage", "oauth2", "iamcredentials")
    return server_context(tmp_path_factory.mktemp("tls"), *(f"{name}.googleapis.com" for name in names))


@pytest.fixture
def google(server: FakeGcs, key: rsa.RSAPrivateKey) -> Iterator[Google]:
    google = Google(server.port, key)
    with serving(google.answer) as google.url:
        yield google


@pytest.fixture
def tunnel(google: Google, authority: tuple[ssl.SSLContext, str]) -> Iterator[HttpProxy]:
    """A proxy that leads from Google's host names to the stand-in."""
    with serving(google.answer, authority[0]) as url:
        port = urlsplit(url).port
        assert port is not None
        with HttpProxy(route=lambda _host, _port: ("127.0.0.1", port)) as proxy:
            yield proxy


@pytest.fixture
def variables(
    google: Google, tunnel: HttpProxy, authority: tuple[ssl.SSLContext, str], tmp_path: Path
) -> Callable[[str], dict[str, str]]:
    """Variables with which credentials come from a place, for each kind that there is."""

    def variables(kind: str) -> dict[str, str]:
        subject = tmp_path / "subject"
        subject.write_text(google.subject_token)
        contents = {
            "key": google.key_file(),
            "login": google.login_file(),
            "external": google.external_file(subject, impersonated=False),
            "external impersonated": google.external_file(subject, impersonated=True),
            "impersonated": google.impersonated_file(),
        }
        # The services for logins have fixed names.
        proxy, endpoint = f"http://127.0.0.1:{tunnel.port}", {"MX_GCS_ENDPOINT": google.url}
        tunnelled = {**endpoint, "HTTPS_PROXY": proxy, "MX_GCS_CA_BUNDLE": authority[1]}
        if kind == "metadata":
            host = google.url.removeprefix("http://")
            return {**tunnelled, "GCE_METADATA_HOST": host, "NO_GCE_CHECK": "false"}
        if kind == "gcloud":
            (tmp_path / "application_default_credentials.json").write_text(json.dumps(google.login_file()))
            return {**tunnelled, "CLOUDSDK_CONFIG": str(tmp_path)}
        file = tmp_path / "credentials.json"
        file.write_text(json.dumps(contents[kind]))
        return {**tunnelled, "GOOGLE_APPLICATION_CREDENTIALS": str(file)}

    return variables
