"""Reading blobs of Azure Blob Storage, straight into the caller's memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import unquote

from modelexpress_core.contracts.storage import Endpoint, ObjectInfo
from modelexpress_core.errors import (
    BackendError,
    NotFoundError,
    SettingsError,
    SourceChangedError,
    UnavailableError,
)
from modelexpress_core.settings import from_env
from modelexpress_core.storage.http import (
    BadAnswerError,
    ConnectionPool,
    HttpStorage,
    ListingPage,
    Meaning,
    Proxies,
    RangeReader,
    Refusal,
    endpoint_of,
    exchange,
    hex_of_base64,
)
from modelexpress_core.storage.http.service_errors import no_version
from modelexpress_core.uri import ModelURI
from mx_azure._accounts import Location, locate
from mx_azure._credentials import Identity, authorities, identity_for
from mx_azure._errors import NAMES, AzureFailures
from mx_azure._listing import Entry, parsed_page
from mx_azure._signing import AzureRequests, Target
from mx_azure.settings import AzureSettings

__all__ = ["AzureStorage", "open_azure"]

#: Blobs in a page; with their metadata, of at most 8 KiB each, they fit into the bound below.
_PAGE_BLOBS = 1000
_MAX_PAGE_BYTES = 16 << 20

_NO_LISTING = Meaning(
    UnavailableError,
    "something in front of the server answers, or the answer was cut",
    NAMES.check_server,
)
_NO_ETAG = no_version(NAMES)
_NO_CONTAINER = Meaning(NotFoundError, hint="write https://account.blob.core.windows.net/container/path")
_A_CONTAINER = Meaning(NotFoundError, hint="name a blob in it")
_A_DIRECTORY = Meaning(NotFoundError, "it stands for a directory of a hierarchical account", "name a blob in it")


class AzureStorage(HttpStorage):
    """Reads ranges of the blobs of one container, or of one account. A blob's version is its ETag.

    Args:
        location: Where the blobs are, with the key or the SAS token.
        uri: Any URI of the storage.
        pool: The connections, which are closed with the storage.
        read_timeout_seconds: How long to wait for the next bytes.
        identity: Gives bearer tokens; None where requests are signed otherwise, or not at all.
        ca_bundle: File with the authorities that the user named; None for those of certifi.
        clock: Seconds; says how long a listing takes.
        now: Seconds since the epoch; part of each signature.
    """

    def __init__(
        self,
        location: Location,
        uri: ModelURI,
        pool: ConnectionPool,
        *,
        read_timeout_seconds: float,
        identity: Identity | None = None,
        ca_bundle: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._location = location
        self._identity = identity
        self._ca_bundle = ca_bundle
        kind = "key" if location.key is not None else "sas" if location.sas is not None else "token"
        self._kind = "anonymous" if kind == "token" and identity is None else kind
        failures = AzureFailures(
            uri,
            endpoint=lambda: str(location.origin),
            closed=lambda: pool.closed,
            kind=self._kind,
            variable=location.variable,
            sas=location.sas,
            now=now,
        )
        self._requests = AzureRequests(location, identity, now)
        reader = RangeReader(pool, self._requests, failures, read_timeout_seconds=read_timeout_seconds)
        super().__init__(reader, pool, failures, read_timeout_seconds=read_timeout_seconds, clock=clock)

    def endpoint(self) -> Endpoint:
        """Where requests go."""
        return endpoint_of(self._location.origin, self._pool, self._failures, self._ca_bundle)

    def credentials(self) -> str:
        """What requests carry, and where it was found."""
        if self._kind == "key":
            return f"key of the account {self._location.account}, from {self._location.variable}"
        if self._kind == "sas":
            parts = dict(part.partition("=")[::2] for part in (self._location.sas or "").split("&"))
            fields = {word: unquote(parts.get(name, "")) for name, word in _SAS_WORDS.items()}
            shown = [f"{word} {value}" for word, value in fields.items() if _SHOWN.fullmatch(value)]
            return f"SAS token from {self._location.variable}{', '.join(['', *shown])}"
        if self._identity is None:
            return "none: requests are anonymous (MX_AZURE_ANONYMOUS)"
        with self._explained("", "find the credentials"):
            return self._identity.describe()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The blobs below ``prefix``, a page of a thousand at a time, without entries that stand for directories."""
        prefix = prefix.strip("/")
        operation = "list the blobs"
        self._failures.check_open(prefix, operation)
        container, directory = self._location.split(prefix)
        if not container:
            raise self._failures.described(_NO_CONTAINER, "the path names no container", prefix, operation)
        parameters = {
            "restype": "container",
            "comp": "list",
            "include": "metadata",
            "maxresults": str(_PAGE_BLOBS),
            "prefix": f"{directory}/" if directory else "",
        }
        start = "" if self._location.container is not None else f"{container}/"

        def page(mark: str | None) -> ListingPage[Entry]:
            return self._page(container, {**parameters, "marker": mark or ""}, prefix, operation)

        for entry in self._entries(page, prefix, operation, things="blobs"):
            if not (entry.directory or entry.name.endswith("/")):
                yield self._listed(entry, f"{start}{entry.name}", operation)

    def _page(self, container: str, parameters: Mapping[str, str], path: str, operation: str) -> ListingPage[Entry]:
        sent = {name: value for name, value in parameters.items() if value}
        _, content = self._ask("GET", Target.of(self._location, container, sent), path, operation)
        try:
            return parsed_page(content)
        except ValueError as exc:
            reason = f"what {self._location.origin} answered is no listing of the Blob service"
            raise self._failures.described(_NO_LISTING, reason, path, operation) from exc

    def _listed(self, entry: Entry, path: str, operation: str) -> ObjectInfo:
        if not entry.etag:
            raise self._failures.described(_NO_ETAG, "the listing gave no ETag for it", path, operation)
        return ObjectInfo(path, entry.size, entry.etag, _digests(entry.md5, entry.crc64, block=entry.block))

    def stat(self, path: str) -> ObjectInfo:
        """The blob at ``path``, with the digests that the service keeps of the whole of it."""
        operation = "read the size"
        self._failures.check_open(path, operation)
        container, name = self._location.split(path)
        if not name:
            raise self._failures.described(_A_CONTAINER, "a container is no blob", path, operation)
        headers, _ = self._ask("HEAD", Target.of(self._location, f"{container}/{name}"), path, operation)
        if (
            headers.get("x-ms-meta-hdi_isfolder", "").lower() == "true"
            or headers.get("x-ms-resource-type") == "directory"
        ):
            raise self._failures.described(_A_DIRECTORY, "a directory is no blob", path, operation)
        etag, length = headers.get("etag"), headers.get("content-length", "")
        if not etag:
            raise self._failures.described(_NO_ETAG, "the service gave no ETag for it", path, operation)
        if not re.fullmatch("[0-9]{1,19}", length):
            exc = BadAnswerError("the answer does not tell the size")
            raise self._failure(exc, path, operation) from exc
        block = headers.get("x-ms-blob-type") == "BlockBlob"
        digests = _digests(headers.get("content-md5"), headers.get("x-ms-content-crc64"), block=block)
        return ObjectInfo(path, int(length), etag, digests)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Read into ``buffer`` with one GET of the range, which is refused if the ETag is no longer ``version``."""
        try:
            return super().read_into(path, offset, buffer, version=version)
        except SourceChangedError as exc:
            self._check_exists(path, exc)
            raise

    def _check_exists(self, path: str, changed: SourceChangedError) -> None:
        """Raise NotFoundError if the blob is gone: its condition is not met then either."""
        container, name = self._location.split(path)
        try:
            self._ask("HEAD", Target.of(self._location, f"{container}/{name}"), path, changed.operation)
        except NotFoundError:
            raise
        except BackendError:
            return  # it is not known, and what changed is

    def _ask(self, method: str, target: Target, path: str, operation: str) -> tuple[Mapping[str, str], bytes]:
        """Headers and content of the answer to a request, which is sent again once if its token was refused."""
        refusals: list[Refusal] = []
        with self._explained(path, operation):
            while True:
                request = self._requests.prepared(method, target, {})
                answer = exchange(
                    self._pool,
                    request,
                    read_timeout_seconds=self._read_timeout_seconds,
                    max_bytes=_MAX_PAGE_BYTES,
                    ignored_encodings=None if method == "HEAD" else (),
                )
                if answer.status == 200:
                    return answer.headers, answer.content
                refusals.append(answer.as_refusal(request))
                if not self._requests.renews(refusals):
                    raise self._failures.of_answer(refusals[-1], path, operation)


#: Fields of a SAS token that are no secret.
_SAS_WORDS = {"sp": "permissions", "sr": "resource", "srt": "resources", "st": "from", "se": "until"}
_SHOWN = re.compile(r"[A-Za-z0-9:.-]{1,40}")


def _digests(md5: str | None, crc64: str | None, *, block: bool) -> dict[str, str]:
    """Digests of the whole blob, by algorithm.

    The MD5 of append and page blobs is that of their creation: writes do not change it. Azure's CRC64 is CRC-64/NVME,
    with its lowest byte first.
    """
    if not block:
        return {}
    digests = {"md5": hex_of_base64("md5", md5), "crc64nvme": _reversed(hex_of_base64("crc64nvme", crc64))}
    return {algorithm: digest for algorithm, digest in digests.items() if digest is not None}


def _reversed(digest: str | None) -> str | None:
    return None if digest is None else bytes.fromhex(digest)[::-1].hex()


def open_azure(
    uri: ModelURI,
    settings: Mapping[str, str],
    *,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], float] = time.time,
) -> AzureStorage:
    """The storage for ``az`` URIs. Connects to nothing yet, and looks for no credentials.

    Raises:
        InvalidURIError: The URI has no container or an unknown host, or holds credentials or parameters.
        SettingsError: A variable has a value that cannot be used, names no account, or contradicts the URI.
    """
    values = from_env(AzureSettings, settings)
    location = locate(uri, values)
    with_token = not (values.anonymous or location.key or location.sas)
    if with_token and not location.origin.tls:
        message = f"a token of Entra ID would be sent unencrypted to {location.origin}"
        hint = "use an https endpoint, or set AZURE_STORAGE_ACCOUNT_KEY; for a public container MX_AZURE_ANONYMOUS=1"
        raise SettingsError(message, hint=hint)
    pool = ConnectionPool(
        connect_timeout_seconds=values.connect_timeout_seconds,
        proxies=Proxies.from_environ(settings, os.environ),
        ca_bundle=authorities(values),
    )
    return AzureStorage(
        location,
        uri,
        pool,
        read_timeout_seconds=values.read_timeout_seconds,
        identity=identity_for(values, settings) if with_token else None,
        ca_bundle=values.ca_bundle,
        clock=clock,
        now=now,
    )
