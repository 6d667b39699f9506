"""Failures of loads that can be repeated on this machine, and the words that a message about each should have.

Real servers (SeaweedFS, fake-gcs-server, Azurite) fail where they do it by themselves. Else a proxy before them injects
the fault, or a server that follows a script gives the answer of the cloud's service.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import ssl
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import attrs
import trustme
from attrs import field, frozen
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from devtools.azurite import Azurite
from devtools.fake_gcs import FakeGcs
from devtools.http_proxy import HttpProxy
from devtools.network import full_port
from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import Fault, TcpProxy
from tests.support.scripted_http import Answer, Request, pass_on, serving

__all__ = [
    "FAILURES",
    "MODEL_DIGEST",
    "SERVERS",
    "Failure",
    "Scene",
    "Site",
    "azure_site",
    "file_site",
    "gcs_site",
    "s3_site",
]

_BUCKET = "models"
_CLOSED = "127.0.0.1:1"  # tcpmux, which nothing uses

#: Bytes of the largest tensor: more than the read that fetches headers.
_WEIGHT_BYTES = 1 << 20

#: The imperative verbs with which a next step may begin.
_IMPERATIVES = (
    "add|allow|ask|assign|attach|change|check|configure|convert|copy|correct|enable|export|fix|get|give|grant|install|"
    "log in|lower|make|name|point|raise|read|reduce|remove|renew|replace|restore|run|set|start|take|try|unset|update|"
    "upload|use|verify|wait|write"
)


def _step(words: str) -> str:
    """The pattern of a next step: an imperative, and after it in the same line what it is about."""
    return rf"\b(?:{_IMPERATIVES})\b[^\n]*?(?:{words})"


@frozen
class Site:
    """A store that scenes are built on.

    Attributes:
        store: As tables show it.
        scratch: Directory for files.
        port: Of the server; 0 where none runs.
        credentials: Variables with valid credentials, for ours.
        runai_credentials: The same for runai-model-streamer.
        put: Stores an object below the bucket, with options of the store's own.
        server: The server; None where none runs.
        close: Closes the client that stores objects.
    """

    store: str
    scratch: Path
    port: int
    credentials: Mapping[str, str]
    runai_credentials: Mapping[str, str]
    put: Callable[..., object]
    server: Any = field(default=None, repr=False)
    close: Callable[[], object] = field(default=lambda: None, repr=False)

    def uri(self, slug: str) -> str:
        """Of the model of a failure."""
        if self.store == "file":
            return f"file://{self.scratch / slug}"
        return f"{_SCHEMES[self.store]}://{_BUCKET}/errors/{slug}"

    def at(self, url: str) -> tuple[dict[str, str], dict[str, str]]:
        """Variables for access through ``url``, a server without a path: ours, and those of runai-model-streamer."""
        ours, theirs = dict(self.credentials), dict(self.runai_credentials)
        if self.store == "S3":
            ours["AWS_ENDPOINT_URL"] = theirs["AWS_ENDPOINT_URL"] = url
        elif self.store == "GCS":
            ours |= (
                {"MX_GCS_ENDPOINT": url, "MX_GCS_ANONYMOUS": "1"}
                if url.startswith("https")
                else {"STORAGE_EMULATOR_HOST": url}
            )
            theirs["CLOUD_STORAGE_EMULATOR_ENDPOINT"] = url
        elif self.store == "Azure":
            ours["AZURE_STORAGE_ENDPOINT"] = f"{url}/{Azurite.account}"
        return ours, theirs


_SCHEMES = {"S3": "s3", "GCS": "gs", "Azure": "az"}


@frozen
class Scene:
    """A failure that waits for a load.

    Attributes:
        uri: What is loaded.
        environ: Variables of our load.
        runai_environ: Variables of runai-model-streamer.
        runai_path: The file that runai-model-streamer loads; empty where it cannot be brought into this situation.
        runai_absent: Why, then.
    """

    uri: str
    environ: Mapping[str, str]
    runai_environ: Mapping[str, str] = field(factory=dict)
    runai_path: str = ""
    runai_absent: str = ""


@frozen
class Failure:
    """One failure, and what a message about it should say.

    The patterns ignore case, and are the same for all who are scored. They say what the failure is and what mends it,
    in the words of the field and of the store.

    Attributes:
        slug: Its name in files and tests.
        store: ``"S3"``, ``"GCS"``, ``"Azure"`` or ``"file"``.
        what: The failure in a few words, for tables.
        error: Name of our class.
        cause: Pattern of the cause.
        next_step: Pattern of the next step.
        scene: Brings it about.
        doctor: Whether ``mx doctor`` can see it: it is there before and after a load.
        needs_server: Whether the real server runs.
    """

    slug: str
    store: str
    what: str
    error: str
    cause: str
    next_step: str
    scene: Callable[[Site, str], AbstractContextManager[Scene]]
    doctor: bool = True
    needs_server: bool = True


# -- the model ---------------------------------------------------------------------------------------------------------


def _file(data: bytes, **shapes: list[int]) -> bytes:
    header: dict[str, Any] = {}
    position = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [position, position + shape[0]]}
        position += shape[0]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_SMALL = bytes(range(256)) * 4
_MODEL = _file(
    _SMALL + bytes((i * 7 + (i >> 8)) & 0xFF for i in range(_WEIGHT_BYTES)), norm=[1024], weight=[_WEIGHT_BYTES]
)
_OTHER_MODEL = _file(_SMALL + bytes(_WEIGHT_BYTES), norm=[1024], weight=[_WEIGHT_BYTES])
_NAME = "model.safetensors"

#: SHA-256 of the tensors' bytes, in the order of their names.
MODEL_DIGEST = hashlib.sha256(_MODEL[-len(_SMALL) - _WEIGHT_BYTES :]).hexdigest()


# -- the sites ---------------------------------------------------------------------------------------------------------


def s3_site(scratch: Path, server: SeaweedFS | None) -> Site:
    """S3; without a server for failures of the network."""
    if server is None:
        environ = {
            "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        return Site("S3", scratch, 0, environ, _of_runai_s3(environ), _nothing)
    client: Any = server.client()

    def put(key: str, content: bytes, **options: str) -> object:
        return client.put_object(Bucket=_BUCKET, Key=key, Body=content, **options)

    environ = server.environ()
    return Site(
        "S3",
        scratch,
        int(urlsplit(server.endpoint).port or 0),
        environ,
        _of_runai_s3(environ),
        put,
        server,
        client.close,
    )


def _of_runai_s3(environ: Mapping[str, str]) -> dict[str, str]:
    return {**environ, "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"}


def gcs_site(scratch: Path, server: FakeGcs | None) -> Site:
    """GCS; without a server for failures of the network."""
    theirs = {"RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS": "1"}
    if server is None:
        return Site("GCS", scratch, 0, {}, theirs, _nothing)
    return Site("GCS", scratch, server.port, server.environ(), theirs, server.put, server)


def azure_site(scratch: Path, server: Azurite | None) -> Site:
    """Azure; without a server for failures of the network."""
    if server is None:
        environ = {"AZURE_STORAGE_ACCOUNT_NAME": Azurite.account, "AZURE_STORAGE_ACCOUNT_KEY": "a2V5"}
        return Site("Azure", scratch, 0, environ, environ, _nothing)
    client: Any = server.client()

    def put(name: str, content: bytes, **options: object) -> object:
        blob = client.get_blob_client(_BUCKET, name)
        blob.upload_blob(content, overwrite=True, **options)
        return blob

    theirs = {"AZURE_STORAGE_ACCOUNT_NAME": server.account, "AZURE_STORAGE_ACCOUNT_KEY": server.key}
    return Site("Azure", scratch, server.port, server.environ(), theirs, put, server, client.close)


def file_site(scratch: Path, _server: object = None) -> Site:
    """Files of this machine."""

    def put(name: str, content: bytes) -> object:
        path = scratch / name.removeprefix("errors/")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.write_bytes(content)

    return Site("file", scratch, 0, {}, {}, put)


def _nothing(*_: object, **__: object) -> None:
    message = "no server runs"
    raise AssertionError(message)


#: Store -> its site, and the server that the site is for.
SERVERS: Mapping[str, tuple[Callable[[Path, Any], Site], Callable[[], AbstractContextManager[Any]] | None]] = {
    "S3": (s3_site, lambda: SeaweedFS(_BUCKET)),
    "GCS": (gcs_site, lambda: FakeGcs(_BUCKET)),
    "Azure": (azure_site, lambda: Azurite(_BUCKET)),
    "file": (file_site, None),
}


# -- what scenes are made of -------------------------------------------------------------------------------------------

_HTTPS_ONLY = "it reads Azure by https only, and trusts no authorities but those of the system"


def _scene(site: Site, slug: str, ours: Mapping[str, str], theirs: Mapping[str, str], uri: str = "") -> Scene:
    uri = uri or site.uri(slug)
    if site.store == "Azure" and "AZURE_STORAGE_ENDPOINT_SUFFIX" not in theirs:
        return Scene(uri, ours, runai_absent=_HTTPS_ONLY)
    return Scene(uri, ours, theirs, f"{uri.removeprefix('file://')}/{_NAME}")


def _behind(url: Callable[[], AbstractContextManager[str]]) -> Callable[[Site, str], AbstractContextManager[Scene]]:
    """Loads from the server with this URL."""

    @contextlib.contextmanager
    def scene(site: Site, slug: str) -> Iterator[Scene]:
        with url() as where:
            yield _scene(site, slug, *site.at(where))

    return scene


@contextlib.contextmanager
def _unknown_host(site: Site, slug: str) -> Iterator[Scene]:
    ours, theirs = site.at("https://storage.no-such-host.invalid")
    if site.store == "Azure":
        ours["AZURE_STORAGE_ENDPOINT"] = f"https://{Azurite.account}.blob.no-such-host.invalid"
        theirs["AZURE_STORAGE_ENDPOINT_SUFFIX"] = "blob.no-such-host.invalid"
    yield _scene(site, slug, ours, theirs)


@contextlib.contextmanager
def _deaf() -> Iterator[str]:
    """A port whose queue of connections is full, so that further ones wait."""
    with full_port() as port:
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _mute() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _with_certificate(
    name: str, *, trusted: bool, expired: bool = False
) -> Callable[[Site, str], AbstractContextManager[Scene]]:
    """Loads from a server with a certificate for ``name``."""

    @contextlib.contextmanager
    def scene(site: Site, slug: str) -> Iterator[Scene]:
        authority = trustme.CA()
        ends = datetime.now(timezone.utc) - timedelta(days=1) if expired else None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name, not_after=ends).configure_cert(context)
        file = site.scratch / f"{slug}.pem"
        authority.cert_pem.write_to_path(str(file))
        with serving(lambda _: (200, {}, b""), context) as port:
            ours, theirs = site.at(f"https://127.0.0.1:{port}")
            if trusted:
                ours[{"S3": "AWS_CA_BUNDLE", "GCS": "MX_GCS_CA_BUNDLE", "Azure": "MX_AZURE_CA_BUNDLE"}[site.store]] = (
                    str(file)
                )
                theirs |= {"AWS_CA_BUNDLE": str(file), "SSL_CERT_FILE": str(file)}
            yield _scene(site, slug, ours, theirs)

    return scene


@contextlib.contextmanager
def _plain_port() -> Iterator[str]:
    """An https URL of a port that speaks http."""
    with serving(lambda _: (200, {}, b"")) as port:
        yield f"https://127.0.0.1:{port}"


_PORTAL = b"<!DOCTYPE html><html><head><title>Sign in to the network</title></head><body>Sign in</body></html>"


def _through(
    proxy: Callable[[], AbstractContextManager[str]], url: str
) -> Callable[[Site, str], AbstractContextManager[Scene]]:
    """Loads through a proxy."""

    @contextlib.contextmanager
    def scene(site: Site, slug: str) -> Iterator[Scene]:
        with proxy() as where:
            ours, theirs = site.at(url)
            variables = {"HTTP_PROXY": where, "HTTPS_PROXY": where}
            lower = {name.lower(): value for name, value in variables.items()}
            if site.store == "Azure":
                theirs["AZURE_STORAGE_ENDPOINT_SUFFIX"] = "blob.storage.test"
            yield _scene(site, slug, {**ours, **variables}, {**theirs, **variables, **lower})

    return scene


@contextlib.contextmanager
def _portal() -> Iterator[str]:
    with serving(lambda _: (200, {"Content-Type": "text/html"}, _PORTAL)) as port:
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _http_proxy(**options: Any) -> Iterator[str]:  # noqa: ANN401 - passed on
    with HttpProxy(**options) as proxy:
        yield proxy.url


def _stored(
    content: bytes = _MODEL,
    name: str = _NAME,
    **options: Any,  # noqa: ANN401 - passed on
) -> Callable[[Site, str], None]:
    """Stores an object."""

    def store(site: Site, slug: str) -> None:
        site.put(f"errors/{slug}/{name}", content, **options)

    return store


def _real(
    *stored: Callable[[Site, str], None],
    ours: Mapping[str, str | None] | None = None,
    theirs: Mapping[str, str] | None = None,
    user: str = "",
    uri: str = "",
) -> Callable[[Site, str], AbstractContextManager[Scene]]:
    """Loads from the real server, with other variables."""

    @contextlib.contextmanager
    def scene(site: Site, slug: str) -> Iterator[Scene]:
        for store in stored:
            store(site, slug)
        mine, other = dict(site.credentials), dict(site.runai_credentials)
        if site.port:
            mine, other = site.at(f"http://127.0.0.1:{site.port}")
        if user:
            mine |= site.server.environ(user)
            other |= site.server.environ(user)
        mine = {name: value for name, value in {**mine, **(ours or {})}.items() if value is not None}
        yield _scene(site, slug, mine, {**other, **(theirs or {})}, uri)

    return scene


def _fronted(
    answer: Callable[[Request], Answer | None], content: bytes = _MODEL, **variables: str
) -> Callable[[Site, str], AbstractContextManager[Scene]]:
    """Loads from a server that gives ``answer``, and passes on to the real one where that is None."""

    @contextlib.contextmanager
    def scene(site: Site, slug: str) -> Iterator[Scene]:
        _stored(content)(site, slug)
        with serving(lambda request: answer(request) or pass_on(request, site.port)) as port:
            ours, theirs = site.at(f"http://127.0.0.1:{port}")
            yield _scene(site, slug, {**ours, **variables}, theirs)

    return scene


def _is_weight(request: bytes) -> bool:
    """Whether it asks for bytes after the header of the file."""
    found = re.search(rb"\r\n(?:x-ms-)?range: *bytes=(\d+)-", request, re.IGNORECASE)
    return request.startswith(b"GET ") and found is not None and int(found[1]) > 0


def _faulty(
    kind: Literal["reset", "truncate", "stall", "flip"],
    **options: Any,  # noqa: ANN401 - passed on
) -> Callable[[Site, str], AbstractContextManager[Scene]]:
    """Loads over a network that breaks each answer with weights: the first amid its body, the others at its start."""

    @contextlib.contextmanager
    def scene(site: Site, slug: str) -> Iterator[Scene]:
        _stored(**options)(site, slug)
        struck = 0

        def policy(_number: int, request: bytes) -> Fault | None:
            nonlocal struck
            if not _is_weight(request):
                return None
            struck += 1
            return Fault(kind, after_bytes=1000 if struck == 1 or kind == "flip" else 0, of_body=True)

        with TcpProxy("127.0.0.1", site.port, policy) as proxy:
            yield _scene(site, slug, *site.at(f"http://127.0.0.1:{proxy.port}"))

    return scene


@contextlib.contextmanager
def _changing(site: Site, slug: str) -> Iterator[Scene]:
    """The object is replaced when its weights are asked for."""
    store, replace = _stored(), _stored(_OTHER_MODEL)
    store(site, slug)
    replaced = False

    def policy(_number: int, request: bytes) -> None:
        nonlocal replaced
        if _is_weight(request) and not replaced:
            replaced = True
            replace(site, slug)

    with TcpProxy("127.0.0.1", site.port, policy) as proxy:
        yield _scene(site, slug, *site.at(f"http://127.0.0.1:{proxy.port}"))


@contextlib.contextmanager
def _ignoring_ranges(site: Site, slug: str) -> Iterator[Scene]:
    """A server, or a proxy, that answers every read with the whole object."""
    _stored()(site, slug)

    def answer(request: Request) -> Answer:
        status, headers, body = pass_on(request, site.port)
        if status == 206:
            headers = {name: value for name, value in headers.items() if name.lower() != "content-range"}
            return 200, {**headers, "Content-Length": str(len(_MODEL))}, _MODEL
        return status, headers, body

    with serving(answer) as port:
        yield _scene(site, slug, *site.at(f"http://127.0.0.1:{port}"))


# -- answers of the clouds' services -----------------------------------------------------------------------------------


def _s3_error(status: int, code: str, words: str, more: str = "", **headers: str) -> Callable[[Request], Answer]:
    body = f"<Error><Code>{code}</Code><Message>{words}</Message>{more}<RequestId>4442587FB7D0A2F9</RequestId></Error>"

    def answer(request: Request) -> Answer:
        return (
            status,
            {**headers, "Content-Type": "application/xml"},
            b"" if request.method == "HEAD" else body.encode(),
        )

    return answer


def _gcs_error(status: int, reason: str, words: str) -> Callable[[Request], Answer]:
    body = {"error": {"code": status, "message": words, "errors": [{"reason": reason, "message": words}]}}
    return lambda _: (status, {"Content-Type": "application/json"}, json.dumps(body).encode())


def _azure_error(status: int, code: str, detail: str = "") -> Callable[[Request], Answer]:
    more = f"<AuthenticationErrorDetail>{detail}</AuthenticationErrorDetail>" if detail else ""
    body = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{code}</Message>{more}</Error>'
    return lambda _: (status, {"x-ms-error-code": code, "Content-Type": "application/xml"}, body.encode())


def _reads(answer: Callable[[Request], Answer]) -> Callable[[Request], Answer | None]:
    """The answer to reads of the object alone; listings and sizes are given."""

    def of_reads(request: Request) -> Answer | None:
        return answer(request) if request.method == "GET" and _NAME in request.path.partition("?")[0] else None

    return of_reads


def _google(
    tokens: Callable[[Request], Answer], storage: Callable[[Request], Answer | None] = lambda _: None
) -> Callable[[Site, str], AbstractContextManager[Scene]]:
    """Loads with the key of a service account, from stand-ins for GCS and the service that gives tokens."""

    @contextlib.contextmanager
    def scene(site: Site, slug: str) -> Iterator[Scene]:
        _stored()(site, slug)

        def answer(request: Request) -> Answer:
            if request.path == "/token":
                return tokens(request)
            return storage(request) or pass_on(request, site.port)

        with serving(answer) as port:
            url = f"http://127.0.0.1:{port}"
            file = site.scratch / f"{slug}.json"
            private = rsa.generate_private_key(65537, 2048).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            content = {
                "type": "service_account",
                "client_email": "reader@project.iam.gserviceaccount.com",
                "private_key_id": "abc",
                "private_key": private.decode(),
                "token_uri": f"{url}/token",
            }
            file.write_text(json.dumps(content))
            ours = {"MX_GCS_ENDPOINT": url, "GOOGLE_APPLICATION_CREDENTIALS": str(file)}
            theirs = {
                "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
                "GOOGLE_APPLICATION_CREDENTIALS": str(file),
                "RUNAI_STREAMER_GCS_CREDENTIAL_FILE": str(file),
            }
            yield _scene(site, slug, ours, theirs)

    return scene


@contextlib.contextmanager
def _no_google_credentials(site: Site, slug: str) -> Iterator[Scene]:
    _stored()(site, slug)
    url = f"http://127.0.0.1:{site.port}"
    ours = {"MX_GCS_ENDPOINT": url, "NO_GCE_CHECK": "true", "CLOUDSDK_CONFIG": str(site.scratch / "no-gcloud")}
    yield _scene(site, slug, ours, {"CLOUD_STORAGE_EMULATOR_ENDPOINT": url, "NO_GCE_CHECK": "true"})


def _a_token(_: Request) -> Answer:
    content = {"access_token": "ya29.a-token", "expires_in": 3600, "token_type": "Bearer"}
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _no_token(error: str, words: str) -> Callable[[Request], Answer]:
    body = json.dumps({"error": error, "error_description": words}).encode()
    return lambda _: (400, {"Content-Type": "application/json"}, body)


@contextlib.contextmanager
def _virtual_hosts(site: Site, slug: str) -> Iterator[Scene]:
    """The bucket is in the host's name, and the server expects it in the path."""
    _stored()(site, slug)
    with HttpProxy(route=lambda _host, _port: ("127.0.0.1", site.port)) as proxy:
        ours, theirs = site.at("http://storage.test")
        ours |= {"MX_S3_ADDRESSING_STYLE": "virtual", "HTTP_PROXY": proxy.url}
        theirs |= {"RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "1", "HTTP_PROXY": proxy.url, "http_proxy": proxy.url}
        yield _scene(site, slug, ours, theirs)


def _sas(**options: Any) -> Callable[[Site, str], AbstractContextManager[Scene]]:  # noqa: ANN401 - passed on
    """Loads with a SAS token in place of the account's key."""

    @contextlib.contextmanager
    def scene(site: Site, slug: str) -> Iterator[Scene]:
        _stored()(site, slug)
        ours, theirs = site.at(f"http://127.0.0.1:{site.port}")
        del ours["AZURE_STORAGE_ACCOUNT_KEY"]
        ours["AZURE_STORAGE_SAS_TOKEN"] = site.server.sas(_BUCKET, **options)
        yield _scene(site, slug, ours, theirs)

    return scene


@contextlib.contextmanager
def _no_azure_credentials(site: Site, slug: str) -> Iterator[Scene]:
    """A machine without a managed identity: nothing answers where its metadata service would be."""
    with _with_certificate("127.0.0.1", trusted=True)(site, slug) as scene:
        ours = {name: value for name, value in scene.environ.items() if name != "AZURE_STORAGE_ACCOUNT_KEY"}
        yield attrs.evolve(scene, environ=ours)


@contextlib.contextmanager
def _archived_blob(site: Site, slug: str) -> Iterator[Scene]:
    blob: Any = site.put(f"errors/{slug}/{_NAME}", _MODEL)
    blob.set_standard_blob_tier("Archive")
    yield _scene(site, slug, *site.at(f"http://127.0.0.1:{site.port}"))
    blob.delete_blob()  # an archived blob cannot be replaced


@contextlib.contextmanager
def _encoded_blob(site: Site, slug: str) -> Iterator[Scene]:
    from azure.storage.blob import ContentSettings

    _stored(gzip.compress(_MODEL), content_settings=ContentSettings(content_encoding="gzip"))(site, slug)
    yield _scene(site, slug, *site.at(f"http://127.0.0.1:{site.port}"))


@contextlib.contextmanager
def _pipe(site: Site, slug: str) -> Iterator[Scene]:
    directory = site.scratch / slug
    directory.mkdir(parents=True)
    os.mkfifo(directory / _NAME)
    yield Scene(f"{site.uri(slug)}/{_NAME}", {}, {}, str(directory / _NAME))
    shutil.rmtree(directory)


_INDEX = json.dumps(
    {"metadata": {}, "weight_map": {"norm": _NAME, "weight": "model-00002-of-00002.safetensors"}}
).encode()
_HUGE_HEADER = struct.pack("<Q", 1 << 50) + _MODEL[8:]


# -- the failures ------------------------------------------------------------------------------------------------------

_RESOLVES = r"resolve|no such (?:host|name)|unknown host|name or service not known|dns"
_REFUSED = r"refused"
_SILENT = r"time[d ]?-?out|in time|no answer|sent nothing|silen|stall|for \d+(?:\.\d+)? s\b"
_UNTRUSTED = r"(?:not trusted|unknown authority|unable to get local issuer|self.signed)|authority that"
_OTHER_NAME = r"another host|hostname mismatch|does(?: not|n't) match|name .{0,40}certificate"
_BROKE = r"broke|reset|dropped|closed|aborted"
_BUSY = r"slow ?down|too many requests|throttl|more (?:requests )?than it serves|rate"
_DENIED = r"may not|not allowed|denied|permission|policy|role"
_NETWORK = _step(r"network|firewall|endpoint|again|server|port")

FAILURES: tuple[Failure, ...] = (
    # the network
    *(
        Failure(
            f"unknown-host-{store.lower()}",
            store,
            "unknown host",
            "UnavailableError",
            _RESOLVES,
            _step(variable),
            _unknown_host,
            needs_server=False,
        )
        for store, variable in (("S3", "AWS_ENDPOINT_URL"), ("GCS", "MX_GCS_ENDPOINT"), ("Azure", "account|ENDPOINT"))
    ),
    *(
        Failure(
            f"refused-{store.lower()}",
            store,
            "connection refused",
            "UnavailableError",
            _REFUSED,
            _step(f"{variable}|port|server|host"),
            _behind(lambda: contextlib.nullcontext(f"http://{_CLOSED}")),
            needs_server=False,
        )
        for store, variable in (("S3", "AWS_ENDPOINT_URL"), ("GCS", "MX_GCS_ENDPOINT"), ("Azure", "ENDPOINT"))
    ),
    *(
        Failure(
            f"connect-timeout-{store.lower()}",
            store,
            "no connection in time",
            "DeadlineError",
            f"{_SILENT}|firewall",
            _step("firewall|network|host|endpoint"),
            _behind(_deaf),
            needs_server=False,
        )
        for store in ("S3", "GCS")
    ),
    Failure(
        "no-answer-azure",
        "Azure",
        "connected, no answer",
        "DeadlineError",
        _SILENT,
        _NETWORK,
        _behind(_mute),
        needs_server=False,
    ),
    *(
        Failure(
            f"unknown-authority-{store.lower()}",
            store,
            "certificate of an unknown authority",
            "UnavailableError",
            _UNTRUSTED,
            _step(variable),
            _with_certificate("127.0.0.1", trusted=False),
            needs_server=False,
        )
        for store, variable in (
            ("S3", "AWS_CA_BUNDLE"),
            ("GCS", "MX_GCS_CA_BUNDLE"),
            ("Azure", "MX_AZURE_CA_BUNDLE"),
        )
    ),
    Failure(
        "wrong-name-s3",
        "S3",
        "certificate for another name",
        "UnavailableError",
        _OTHER_NAME,
        _step("name|host|endpoint|one that it has"),
        _with_certificate("other.example", trusted=True),
        needs_server=False,
    ),
    Failure(
        "expired-certificate-gcs",
        "GCS",
        "expired certificate",
        "UnavailableError",
        "expired",
        _step("clock|certificate|it"),
        _with_certificate("127.0.0.1", trusted=True, expired=True),
        needs_server=False,
    ),
    Failure(
        "plain-port-azure",
        "Azure",
        "https to a port that speaks http",
        "UnavailableError",
        "plain|not encrypted|wrong version|unencrypted",
        _step("scheme|port|http"),
        _behind(_plain_port),
        needs_server=False,
    ),
    *(
        Failure(
            f"portal-{store.lower()}",
            store,
            "proxy answers with a page of HTML",
            "UnavailableError",
            "html|proxy|something (?:else|in front)|not of the .* protocol|another server",
            _step("proxy|HTTPS?_PROXY|endpoint|ENDPOINT"),
            _through(_portal, "http://storage.test"),
            needs_server=False,
        )
        for store in ("S3", "GCS", "Azure")
    ),
    Failure(
        "no-proxy-azure",
        "Azure",
        "proxy refuses the connection",
        "UnavailableError",
        "proxy",
        _step("proxy"),
        _through(lambda: contextlib.nullcontext(f"http://{_CLOSED}"), "https://storage.test"),
        needs_server=False,
    ),
    Failure(
        "proxy-password-s3",
        "S3",
        "proxy asks for a password",
        "AccessDeniedError",
        "proxy[^\n]*(?:credentials|password|authenticat)|407",
        _step("proxy"),
        _through(lambda: _http_proxy(authorization="Basic eA=="), "https://storage.test"),
        needs_server=False,
    ),
    Failure(
        "proxy-forbids-gcs",
        "GCS",
        "proxy does not allow the host",
        "UnavailableError",
        "proxy",
        _step("proxy"),
        _through(lambda: _http_proxy(answer=b"HTTP/1.1 403 Forbidden\r\n\r\n"), "https://storage.test"),
        needs_server=False,
    ),
    # credentials
    Failure(
        "no-credentials-s3",
        "S3",
        "no credentials",
        "AccessDeniedError",
        "no credentials|credentials were (?:not )?found|unable to locate",
        _step("AWS_ACCESS_KEY_ID|AWS_PROFILE|role"),
        _real(
            _stored(),
            ours={"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            theirs={"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
        ),
    ),
    Failure(
        "no-credentials-gcs",
        "GCS",
        "no credentials",
        "AccessDeniedError",
        "no credentials|credentials were (?:not )?found|default credentials",
        _step("GOOGLE_APPLICATION_CREDENTIALS|gcloud auth"),
        _no_google_credentials,
    ),
    Failure(
        "no-credentials-azure",
        "Azure",
        "no credentials",
        "AccessDeniedError",
        "no credentials|no (?:managed )?identity|no variable holds",
        _step("AZURE_STORAGE_ACCOUNT_KEY|identity|az login"),
        _no_azure_credentials,
        needs_server=False,
    ),
    Failure(
        "wrong-secret-s3",
        "S3",
        "wrong secret",
        "AccessDeniedError",
        "secret|signature",
        _step("AWS_SECRET_ACCESS_KEY|secret|key"),
        _real(
            _stored(),
            ours={"AWS_SECRET_ACCESS_KEY": "another-secret"},
            theirs={"AWS_SECRET_ACCESS_KEY": "another-secret"},
        ),
    ),
    Failure(
        "unknown-key-s3",
        "S3",
        "unknown access key",
        "AccessDeniedError",
        "access key|InvalidAccessKeyId",
        _step("AWS_ACCESS_KEY_ID|key"),
        _real(
            _stored(),
            ours={"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN000000000"},
            theirs={"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN000000000"},
        ),
    ),
    Failure(
        "wrong-key-azure",
        "Azure",
        "wrong account key",
        "AccessDeniedError",
        "key[^\n]*(?:not|rotated|wrong)|signature",
        _step("AZURE_STORAGE_ACCOUNT_KEY|key"),
        _real(_stored(), ours={"AZURE_STORAGE_ACCOUNT_KEY": "YW5vdGhlciBrZXk="}),
    ),
    Failure(
        "expired-s3",
        "S3",
        "expired session token",
        "AccessDeniedError",
        "expired|ran out",
        _step("new|renew|AWS_SESSION_TOKEN|credentials"),
        _fronted(
            _s3_error(400, "ExpiredToken", "The provided token has expired."),
            AWS_SESSION_TOKEN="the-token",  # noqa: S106 - made up
        ),
    ),
    Failure(
        "revoked-login-gcs",
        "GCS",
        "key of a service account that was deleted",
        "AccessDeniedError",
        "deleted|disabled|invalid jwt signature|altered",
        _step("key|GOOGLE_APPLICATION_CREDENTIALS"),
        _google(_no_token("invalid_grant", "Invalid JWT Signature.")),
    ),
    Failure(
        "expired-sas-azure",
        "Azure",
        "expired SAS token",
        "AccessDeniedError",
        "expired|ran out",
        _step("new|token|SAS"),
        _sas(seconds=-60),
    ),
    Failure(
        "no-right-s3",
        "S3",
        "not allowed by the policy",
        "AccessDeniedError",
        _DENIED,
        _step("polic|s3:GetObject|permission"),
        _real(_stored(), user="stranger"),
    ),
    Failure(
        "no-role-gcs",
        "GCS",
        "no role on the bucket",
        "AccessDeniedError",
        _DENIED,
        _step("role|objectViewer|storage.objects"),
        _google(
            _a_token,
            _gcs_error(
                403,
                "forbidden",
                "reader@project.iam.gserviceaccount.com does not have storage.objects.list access to the Google Cloud "
                "Storage bucket.",
            ),
        ),
    ),
    Failure(
        "requester-pays-gcs",
        "GCS",
        "bucket with Requester Pays",
        "AccessDeniedError",
        "requester pays|pays",
        _step("project"),
        _fronted(
            _gcs_error(400, "required", "Bucket is a requester pays bucket but no user project provided."),
        ),
    ),
    Failure(
        "no-right-azure",
        "Azure",
        "SAS token that does not allow to list",
        "AccessDeniedError",
        "permission|allow",
        _step("sp=rl|permission|token"),
        _sas(permissions="w"),
    ),
    Failure(
        "firewall-azure",
        "Azure",
        "firewall of the account",
        "AccessDeniedError",
        "firewall|network",
        _step("firewall|network"),
        _fronted(_azure_error(403, "AuthorizationFailure")),
    ),
    *(
        Failure(
            f"clock-{store.lower()}",
            store,
            "wrong clock",
            "AccessDeniedError",
            "clock|skew|time frame",
            _step("clock|time"),
            scene,
        )
        for store, scene in (
            (
                "S3",
                _fronted(
                    _s3_error(
                        403,
                        "RequestTimeTooSkewed",
                        "The difference between the request time and the current time is too large.",
                    )
                ),
            ),
            (
                "GCS",
                _google(
                    _no_token(
                        "invalid_grant",
                        "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. "
                        "Check your iat and exp values in the JWT claim.",
                    )
                ),
            ),
            ("Azure", _fronted(_azure_error(403, "AuthenticationFailed", "Request date header too old: 'Mon'"))),
        )
    ),
    # buckets, names and addresses
    Failure(
        "no-bucket-s3",
        "S3",
        "no such bucket",
        "NotFoundError",
        "bucket",
        _step("aws s3 ls|bucket|URI"),
        _real(uri="s3://no-such-bucket/errors/no-bucket-s3"),
    ),
    Failure(
        "no-bucket-gcs",
        "GCS",
        "no such bucket",
        "NotFoundError",
        "bucket",
        _step("gcloud storage ls|bucket|URI"),
        _real(uri="gs://no-such-bucket/errors/no-bucket-gcs"),
    ),
    Failure(
        "no-container-azure",
        "Azure",
        "no such container",
        "NotFoundError",
        "container",
        _step("container|account|URI"),
        _real(uri="az://no-such-container/errors/no-container-azure"),
    ),
    *(
        Failure(
            f"no-model-{store.lower()}",
            store,
            "no such model",
            "NotFoundError",
            "nothing|no such|not found|misspelt|does not exist",
            _step("URI|path|name"),
            _real(),
            needs_server=store != "file",
        )
        for store in ("S3", "GCS", "Azure", "file")
    ),
    Failure(
        "region-s3",
        "S3",
        "bucket in another region",
        "BackendError",
        "region",
        _step("AWS_REGION|region"),
        _fronted(
            _s3_error(
                400,
                "AuthorizationHeaderMalformed",
                "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-central-1'",
                "<Region>eu-central-1</Region>",
                **{"x-amz-bucket-region": "eu-central-1"},
            )
        ),
    ),
    Failure(
        "virtual-hosts-s3",
        "S3",
        "bucket in the host's name, which the server expects in the path",
        "NotFoundError",
        "host|virtual|path style|addressing",
        _step("MX_S3_ADDRESSING_STYLE|path style|addressing|AWS_ENDPOINT_URL"),
        _virtual_hosts,
    ),
    # the servers
    Failure(
        "throttled-s3",
        "S3",
        "throttled: 503 SlowDown",
        "ThrottledError",
        _BUSY,
        _step("MX_CONCURRENCY|later|concurrency"),
        _fronted(_reads(_s3_error(503, "SlowDown", "Please reduce your request rate."))),
    ),
    Failure(
        "throttled-gcs",
        "GCS",
        "throttled: 429",
        "ThrottledError",
        _BUSY,
        _step("MX_CONCURRENCY|later|concurrency"),
        _fronted(_gcs_error(429, "rateLimitExceeded", "The rate of requests exceeds the limit.")),
    ),
    Failure(
        "throttled-azure",
        "Azure",
        "throttled: 503 ServerBusy",
        "ThrottledError",
        f"{_BUSY}|busy",
        _step("MX_CONCURRENCY|later|concurrency"),
        _fronted(_azure_error(503, "ServerBusy")),
    ),
    Failure(
        "server-error-s3",
        "S3",
        "500 of the server",
        "UnavailableError",
        "passing fault|internal|500|temporar",
        _step("later|again"),
        _fronted(_s3_error(500, "InternalError", "We encountered an internal error. Please try again.")),
    ),
    Failure(
        "archived-s3",
        "S3",
        "archived object",
        "UnsupportedError",
        "archive|glacier",
        _step("restore|it|copy"),
        _fronted(
            _reads(_s3_error(403, "InvalidObjectState", "The operation is not valid for the object's storage class."))
        ),
    ),
    Failure(
        "archived-azure",
        "Azure",
        "archived blob",
        "UnsupportedError",
        "archive",
        _step("tier|hot|restore"),
        _archived_blob,
    ),
    *(
        Failure(
            f"ignores-ranges-{store.lower()}",
            store,
            "server that ignores ranges",
            "UnsupportedError",
            "range",
            _step("range|server|proxy|endpoint|ENDPOINT"),
            _ignoring_ranges,
        )
        for store in ("S3", "GCS")
    ),
    Failure(
        "gzip-gcs",
        "GCS",
        "stored with Content-Encoding: gzip",
        "UnsupportedError",
        "encod|gzip|compress",
        _step("upload|Content-Encoding"),
        _real(_stored(gzip.compress(_MODEL), contentEncoding="gzip")),
    ),
    Failure(
        "gzip-azure",
        "Azure",
        "stored with Content-Encoding: gzip",
        "UnsupportedError",
        "encod|gzip|compress",
        _step("upload|Content-Encoding"),
        _encoded_blob,
    ),
    # the transfer
    *(
        Failure(
            f"reset-{store.lower()}",
            store,
            "connection reset in the body",
            "UnavailableError",
            _BROKE,
            _NETWORK,
            _faulty("reset"),
        )
        for store in ("S3", "Azure")
    ),
    *(
        Failure(
            f"stall-{store.lower()}",
            store,
            "silence in the body",
            "DeadlineError",
            _SILENT,
            _NETWORK,
            _faulty("stall"),
        )
        for store in ("S3", "GCS")
    ),
    *(
        Failure(
            f"truncated-{store.lower()}",
            store,
            "connection closed in the body",
            "UnavailableError",
            f"{_BROKE}|end",
            _NETWORK,
            _faulty("truncate"),
        )
        for store in ("GCS", "Azure")
    ),
    *(
        Failure(
            f"corrupt-{store.lower()}",
            store,
            "bytes that differ from the published digest",
            "IntegrityError",
            "digest|checksum|crc|md5",
            _step("upload|compare|again|network|proxy|object|file"),
            _faulty("flip", **options),
            doctor=False,
        )
        for store, options in (
            ("S3", {"ChecksumAlgorithm": "CRC64NVME"}),
            ("GCS", {}),
        )
    ),
    *(
        Failure(
            f"changed-{store.lower()}",
            store,
            "object replaced during the load",
            "SourceChangedError",
            "replaced|changed|another version",
            _step("again"),
            _changing,
            doctor=False,
        )
        for store in ("S3", "GCS", "Azure")
    ),
    # the checkpoint
    Failure(
        "damaged-header-s3",
        "S3",
        "damaged header",
        "CheckpointError",
        "header",
        _step("again|copy|upload|safetensors"),
        _real(_stored(_HUGE_HEADER)),
    ),
    Failure(
        "shorter-file",
        "file",
        "file shorter than its header says",
        "CheckpointError",
        "short|truncat|cut|incomplete|bytes",
        _step("again|copy|upload|download"),
        _real(_stored(_MODEL[:-1000])),
        needs_server=False,
    ),
    Failure(
        "missing-shard-file",
        "file",
        "missing shard",
        "CheckpointError",
        r"model-00002-of-00002\.safetensors",
        _step("again|copy|upload|download|file"),
        _real(_stored(), _stored(_INDEX, "model.safetensors.index.json")),
        needs_server=False,
    ),
    Failure(
        "pickle-file",
        "file",
        "checkpoint in another format",
        "CheckpointError",
        r"pytorch_model\.bin|format|no safetensors",
        _step("safetensors|convert"),
        _real(_stored(b"PK\x03\x04", "pytorch_model.bin")),
        needs_server=False,
    ),
    Failure(
        "pipe-file",
        "file",
        "pipe in place of a file",
        "UnsupportedError",
        "pipe|regular file",
        _step("file|copy"),
        _pipe,
        needs_server=False,
    ),
)
