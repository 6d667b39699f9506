"""Calls to the cache of a ModelExpress server: which files a version of a model has, its chunk manifest, its bytes."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs
import grpc
from attrs import field, frozen

from modelexpress_core.bulk.reading import BulkOffer
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    InvalidURIError,
    NotFoundError,
    SourceChangedError,
    StillArrivingError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.messages import printable
from modelexpress_core.settings import from_env
from modelexpress_core.sources.settings import DiscoverySettings, ServerAddress
from modelexpress_core.sources.trust import is_no_host
from modelexpress_core.storage.http.requests import Origin
from modelexpress_core.uri import ModelURI
from modelexpress_core.wire.client import Client, Security
from modelexpress_core.wire.proto.modelexpress import cache_pb2
from modelexpress_core.wire.rpc import CACHE
from modelexpress_core.wire.streams import ResponseStream

__all__ = ["CacheClient", "CachedModel", "SentPart", "sends_token_to"]

_Code = grpc.StatusCode

#: How long the server may take to find out which files a model has: its source may be slow.
_OPEN_SECONDS = 120.0

#: How long one call waits for a download before it is made again.
_FOLLOW_SECONDS = 60.0

#: How long no byte may arrive at the server before a reader gives up.
_ARRIVAL_SECONDS = 300.0

#: How long the answer that opens the bulk channel may take: a firewall that drops packets delays a load by this.
_BULK_SECONDS = 5.0

#: Bytes of one part of a manifest, and of the whole of its index.
_MANIFEST_PART_BYTES = 4 << 20
_MAX_INDEX_BYTES = 64 << 20

#: Bounds of what a server may list.
_MAX_FILES = 200_000
_MAX_PATH_BYTES = 4096
_MAX_FILE_BYTES = (1 << 63) - 1

#: Parts that one call has the server compare.
_PARTS_AT_ONCE = 4096

_HOST = re.compile(r"[0-9A-Za-z._:%-]{1,253}")
_VERSION = re.compile(r"[0-9A-Za-z._-]{1,128}")

#: How much of the model has arrived, in the status of a call that came too early.
_PRESENT_BYTES = "mx-present-bytes"

#: Error, likely cause and next step of statuses that mean something else here than to other services.
_ERRORS: Mapping[grpc.StatusCode, tuple[type[BackendError], str | None, str]] = {
    _Code.NOT_FOUND: (
        NotFoundError,
        "the name is misspelt, or the source of the server does not have this model, revision or file",
        "check the URI; `mx models list` shows what is cached",
    ),
    _Code.PERMISSION_DENIED: (
        AccessDeniedError,
        "this caller may not read the model, or the server may not download from there",
        "ask the operator of the server: MX_CACHE_SOURCES and MX_AUTH_RIGHTS say what is allowed",
    ),
    _Code.FAILED_PRECONDITION: (UnsupportedError, None, "do what the server says, or load from the source itself"),
    _Code.UNIMPLEMENTED: (
        UnsupportedError,
        "the server is of another version or another implementation, or another program listens there",
        "check host and port, and the version of the server: `mx health`",
    ),
}


@frozen
class SentPart:
    """Bytes that the server compares for a reader.

    Attributes:
        path: The file.
        offset: First byte.
        length: Bytes; of each piece, if there are several.
        crc: CRC-64/NVME of the bytes that arrived, one piece after another.
        stride: From the start of a piece to the start of the next.
        count: How many pieces.
    """

    path: str
    offset: int
    length: int
    crc: int
    stride: int = 0
    count: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return self.length * self.count


@frozen
class CachedModel:
    """One version of a model in the cache of a server.

    Attributes:
        place: Name of the model.
        version: What is read; every request repeats it.
        source: Redacted URI of the storage that it comes from.
        files: Size of each file by its path, and the digests that its storage publishes.
        size_bytes: Bytes of all files.
        present_bytes: Those that have arrived.
        complete: Whether all have.
        manifest_digest: Digest of the chunk manifest; empty unless it is complete.
        directory: Where its files are below the directory of the cache; empty if the server does not say.
        versions: Version of each file in the storage that it comes from; empty if that has none.
    """

    place: str
    version: str
    source: str
    files: Mapping[str, tuple[int, Mapping[str, str]]] = field(repr=False)
    size_bytes: int
    present_bytes: int
    complete: bool
    manifest_digest: str
    directory: str = ""
    versions: Mapping[str, str] = field(factory=dict, repr=False)

    def origin(self, path: str) -> tuple[str, str] | None:
        """The URI and version of a file in the storage that it comes from; None if that is unknown."""
        try:
            uri = ModelURI.parse(self.source)
        except InvalidURIError:
            return None
        version = self.versions.get(path)
        return (str(attrs.evolve(uri, query={}).join(path)), version) if version else None

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size of each file, by its path."""
        return {path: size for path, (size, _) in self.files.items()}

    @property
    def on_wire(self) -> cache_pb2.ModelVersion:
        """As requests name it."""
        return cache_pb2.ModelVersion(place=self.place, version=self.version)

    def root_in(self, asked: str) -> str:
        """The beginning of the path ``asked`` that names this model.

        The server may name it in another way: with the scheme of its source, or without.

        Raises:
            BackendError: No beginning does.
        """
        parts = asked.split("/")
        for count in range(len(parts), 0, -1):
            root = "/".join(parts[:count])
            if f"/{self.place}".endswith(f"/{root}") or f"/{root}".endswith(f"/{self.place}"):
                return root
        message = f"the server answered with the model {printable(self.place)[:200]!r} to {printable(asked)[:200]!r}"
        raise BackendError(
            message, operation="open the model", hint="write the URI as mx://server:8001/SCHEME/BUCKET/PATH"
        )

    def updated(self, answer: cache_pb2.OpenModelResponse) -> CachedModel:
        """With what a later answer says of the same version.

        Raises:
            SourceChangedError: It is about another version.
        """
        if answer.version != self.version:
            message = f"the server has the version {printable(answer.version)[:128]} now, not {self.version}"
            raise SourceChangedError(message, operation="open the model", hint="start the load again")
        return attrs.evolve(
            self,
            present_bytes=answer.present_bytes,
            complete=answer.complete,
            manifest_digest=answer.manifest_digest,
            directory=answer.directory or self.directory,
        )


def sends_token_to(endpoint: Endpoint, environ: Mapping[str, str] | None) -> bool:
    """Whether ``endpoint`` is a server that the variables name: the token of this process goes to no other."""
    named = [from_env(ServerAddress, environ).url]
    discoveries = from_env(DiscoverySettings, environ).uris
    named += [uri.partition("://")[2] for uri in discoveries if uri.startswith("server://") and uri != "server://"]
    for text in named:
        try:
            known = Endpoint.parse(text)
        except InvalidURIError:  # whoever uses the variable gets the error
            continue
        if (known.host.lower(), known.port) == (endpoint.host.lower(), endpoint.port):
            return True
    return False


class CacheClient(Client):
    """A connection to the cache of one server. Thread-safe. The constructor sends nothing.

    Args:
        url: Address of the server: ``host:port``, or a URL; ``https://`` selects TLS.
        security: Certificates and token.
        deadline_seconds: How long each call may take, if it says nothing else.
        withheld_token: Whether there is a token which is not sent, because no variable names this server.

    Raises:
        InvalidURIError: By the constructor, if ``url`` is no valid address.
        SettingsError: By the constructor, if certificates cannot be used.
        BackendError: By each call: not found, access denied, unavailable, deadline, unsupported.
    """

    def __init__(
        self, url: str, *, security: Security, deadline_seconds: float = 30.0, withheld_token: bool = False
    ) -> None:
        super().__init__(url, (CACHE,), deadline_seconds=deadline_seconds, security=security, retries=False)
        self._withheld_token = withheld_token

    @classmethod
    def from_env(cls, url: str, environ: Mapping[str, str] | None = None) -> CacheClient:
        """Connect as the environment variables say.

        The token is sent if they name this server: the URI of a model may come from others.

        Raises:
            SettingsError: Variables, or files that they name, cannot be used.
            InvalidURIError: The address is not valid.
        """
        security = Security.from_env(environ)
        trusted = sends_token_to(Endpoint.parse(url), environ)
        return cls(
            url, security=security if trusted else attrs.evolve(security, token=None), withheld_token=not trusted
        )

    @property
    def endpoint(self) -> Endpoint:
        """The server."""
        return self._endpoint

    @property
    def is_named(self) -> bool:
        """Whether the variables name this server, which vouches then for what it says of models."""
        return not self._withheld_token

    @property
    def security(self) -> Security:
        """Certificates, and the token if it is sent."""
        return self._security

    @property
    def closed(self) -> bool:
        """``close`` was called."""
        return self._connection.closed

    def open(
        self, place: str, *, revision: str = "", version: str = "", deadline_seconds: float = _OPEN_SECONDS
    ) -> CachedModel:
        """What the server has of a model, or begins to download now.

        Raises:
            BackendError: The call failed, or the answer makes no sense.
        """
        request = cache_pb2.OpenModelRequest(place=place, revision=revision, version=version)
        try:
            with self._stream(CACHE, "OpenModel", request, deadline_seconds=deadline_seconds) as answers:
                answer: cache_pb2.OpenModelResponse | None = next(answers, None)
        except UnsupportedError as exc:
            if not version or exc.__cause__ is None or exc.__cause__.code() is not _Code.FAILED_PRECONDITION:  # type: ignore[attr-defined]  # it is gRPC's
                raise
            hint = "start the load again: it reads the version that there is now"
            raise SourceChangedError(exc.message, uri=self.url, operation=f"open {place}", hint=hint) from exc.__cause__
        if answer is None:
            raise UnavailableError("the call ended without an answer", uri=self.url, operation=f"open {place}")
        return self._model_of(answer, place)

    def follow(
        self,
        model: CachedModel,
        *,
        on_progress: Callable[[CachedModel], None] = lambda _model: None,
        cancelled: threading.Event | None = None,
    ) -> CachedModel:
        """Return the model when all its files have arrived.

        Args:
            model: The model.
            on_progress: Called with each news.
            cancelled: Ends the wait when it is set.

        Raises:
            StillArrivingError: No more bytes arrived for a long time.
            BackendError: The download failed, or the server cannot be reached.
        """
        request = cache_pb2.OpenModelRequest(place=model.place, version=model.version)
        changed_at = time.monotonic()
        cancelled = cancelled or threading.Event()
        while not model.complete:
            before = model.present_bytes
            try:
                with self._stream(CACHE, "OpenModel", request, deadline_seconds=_FOLLOW_SECONDS) as answers:
                    for answer in answers:
                        model = model.updated(answer)
                        on_progress(model)
                        if model.complete or cancelled.is_set():
                            return model
            except DeadlineError:
                pass
            if model.present_bytes != before:
                changed_at = time.monotonic()
            elif time.monotonic() - changed_at > _ARRIVAL_SECONDS:
                raise StillArrivingError(
                    f"no more bytes of the model have arrived for {_ARRIVAL_SECONDS:.0f} s",
                    present_bytes=model.present_bytes,
                    uri=self.url,
                    operation=f"wait for {model.place}",
                    cause="the source of the server is slow, or its download hangs",
                    hint="look into the log of the server",
                )
            if cancelled.wait(1.0):  # a server that ends each call at once is not asked again and again
                return model
        return model

    def manifest_part(self, model: CachedModel, table: str, start: int, end: int) -> bytes:
        """A part of the chunk manifest.

        Raises:
            BackendError: The call failed, or fewer bytes came.
        """
        parts: list[bytes] = []
        for offset in range(start, end, _MANIFEST_PART_BYTES):
            length = min(end - offset, _MANIFEST_PART_BYTES)
            data = self._manifest(model, table, offset, length)
            if len(data) != length:
                message = f"{len(data)} bytes of the table {table} came, not {length}"
                raise BackendError(message, uri=self.url, operation="read the chunk manifest")
            parts.append(data)
        return b"".join(parts)

    def manifest_index(self, model: CachedModel) -> bytes:
        """The index of the chunk manifest.

        Raises:
            BackendError: The call failed, or the index is longer than any.
        """
        index = bytearray()
        while len(index) <= _MAX_INDEX_BYTES:
            data = self._manifest(model, "index", len(index), _MANIFEST_PART_BYTES)
            index += data
            if len(data) < _MANIFEST_PART_BYTES:
                return bytes(index)
        message = f"its index has more than {_MAX_INDEX_BYTES} bytes"
        raise BackendError(message, uri=self.url, operation="read the chunk manifest")

    def _manifest(self, model: CachedModel, table: str, offset: int, length: int) -> bytes:
        request = cache_pb2.ReadManifestRequest(model=model.on_wire, table=table, offset=offset, length=length)
        answer: cache_pb2.ReadManifestResponse = self._call(CACHE, "ReadManifest", request)
        return answer.data

    def compare(self, model: CachedModel, parts: Sequence[SentPart]) -> tuple[Sequence[int], Sequence[int]]:
        """Have the server compare parts of chunks.

        Returns:
            Positions of those that differ, and of those in whose chunks the server's own copy is damaged.

        Raises:
            BackendError: A call failed.
        """
        different: list[int] = []
        damaged: list[int] = []
        for first in range(0, len(parts), _PARTS_AT_ONCE):
            some = parts[first : first + _PARTS_AT_ONCE]
            request = cache_pb2.ComparePartsRequest(
                model=model.on_wire,
                parts=[
                    cache_pb2.FilePart(
                        path=part.path,
                        offset=part.offset,
                        length=part.length,
                        crc64nvme=part.crc,
                        stride=part.stride,
                        count=part.count,
                    )
                    for part in some
                ],
            )
            answer: cache_pb2.ComparePartsResponse = self._call(
                CACHE, "CompareParts", request, deadline_seconds=_FOLLOW_SECONDS
            )
            different += [first + min(position, len(some) - 1) for position in answer.different]
            damaged += [first + min(position, len(some) - 1) for position in answer.damaged]
        return different, damaged

    def frames(
        self, model: CachedModel, path: str, ranges: Sequence[cache_pb2.FileRange], deadline_seconds: float
    ) -> ResponseStream[bytes]:
        """The bytes of ranges of a file, in frames with checksums."""
        request = cache_pb2.ReadFileRequest(model=model.on_wire, path=path, ranges=ranges, checksums=True)
        return self._stream(CACHE, "ReadFile", request, deadline_seconds=deadline_seconds)

    def open_bulk(self, model: CachedModel) -> tuple[BulkOffer, float]:
        """The bulk channel of the server, and for how many seconds its ticket is valid.

        Raises:
            UnsupportedError: It offers none.
            BackendError: The call failed, or the answer makes no sense.
        """
        answer: cache_pb2.OpenBulkResponse = self._call(
            CACHE, "OpenBulk", cache_pb2.OpenBulkRequest(model=model.on_wire), deadline_seconds=_BULK_SECONDS
        )
        if not 0 < answer.port < 1 << 16 or not re.fullmatch(r"[!-~]{1,4096}", answer.ticket):
            reason = f"the server answered with the port {answer.port} and a ticket of {len(answer.ticket)} characters"
            raise BackendError(reason, uri=self.url, operation="open the bulk channel")
        if answer.version != model.version:
            reason = f"the bulk channel is for the version {printable(answer.version)[:128]}, not {model.version}"
            raise SourceChangedError(reason, uri=self.url, operation="open the bulk channel")
        origin = Origin(self._bulk_host(answer.host), answer.port, self._endpoint.tls)
        return BulkOffer(origin, answer.ticket, answer.content), float(answer.valid_for_seconds)

    def _bulk_host(self, host: str) -> str:
        """Where the replica is reached that answered, which may be one of several behind one name.

        Only a server that the variables name may lead this program to another host.
        """
        if not host or not self.is_named:
            return self._endpoint.host
        if not _HOST.fullmatch(host) or is_no_host(host):
            reason = f"the server answered with the host {printable(host)[:100]!r}"
            raise BackendError(reason, uri=self.url, operation="open the bulk channel")
        return host

    @property
    def certified_name(self) -> str:
        """The name that the certificates of the server and of its replicas have."""
        return self._security.tls_name or self._endpoint.host

    # -- answers -------------------------------------------------------------------------------------------------------

    def _model_of(self, answer: cache_pb2.OpenModelResponse, asked: str) -> CachedModel:
        operation = f"open {asked}"
        if not _VERSION.fullmatch(answer.version) or not answer.place:
            reason = f"the server answered with the version {printable(answer.version)[:128]!r}"
            raise BackendError(reason, uri=self.url, operation=operation)
        model = CachedModel(
            answer.place,
            answer.version,
            printable(answer.source)[:_MAX_PATH_BYTES],
            {},
            answer.size_bytes,
            answer.present_bytes,
            answer.complete,
            answer.manifest_digest,
            answer.directory,
        )
        files: dict[str, tuple[int, Mapping[str, str]]] = {}
        versions: dict[str, str] = {}
        for file in self._pages(answer, model):
            if not _is_path(file.path) or file.size > _MAX_FILE_BYTES or file.path in files or len(files) >= _MAX_FILES:
                reason = f"the server listed the file {printable(file.path)[:200]!r}, or too many files"
                raise BackendError(reason, uri=self.url, operation=operation)
            files[file.path] = (file.size, MappingProxyType(dict(file.digests)))
            versions[file.path] = printable(file.version)[:_MAX_PATH_BYTES]
        return attrs.evolve(model, files=MappingProxyType(files), versions=MappingProxyType(versions))

    def _pages(self, answer: cache_pb2.OpenModelResponse, model: CachedModel) -> Iterator[cache_pb2.CachedFile]:
        yield from answer.files
        token = answer.next_page_token
        while token:
            page: cache_pb2.ListFilesResponse = self._call(
                CACHE, "ListFiles", cache_pb2.ListFilesRequest(model=model.on_wire, page_token=token)
            )
            yield from page.files
            if not page.files:  # else a server could answer without end
                return
            token = page.next_page_token

    def _error(self, exc: Any, method: str, *, closed: bool = False) -> BackendError:  # noqa: ANN401 - as in the base
        code = exc.code()
        details = printable(str(exc.details()))
        if code is _Code.UNAVAILABLE:
            present = dict(exc.trailing_metadata() or ()).get(_PRESENT_BYTES, "")
            if re.fullmatch(r"[0-9]{1,19}", str(present)):
                return StillArrivingError(
                    f"the server does not have these bytes yet: {details}",
                    present_bytes=int(present),
                    uri=self.url,
                    operation=f"call {method}",
                    cause="the server is still downloading the model",
                    hint="look into the log of the server",
                )
        if code in _ERRORS:
            kind, cause, hint = _ERRORS[code]
            if code is _Code.FAILED_PRECONDITION and method != "OpenModel":
                kind, hint = SourceChangedError, "start the load again: it reads the version that there is now"
            return kind(
                f"the server answered {code.name}: {details}",
                uri=self.url,
                operation=f"call {method}",
                cause=cause,
                hint=hint,
            )
        error = super()._error(exc, method, closed=closed)
        if code is _Code.UNAUTHENTICATED and self._withheld_token:
            error.cause = "the token was not sent, since MODEL_EXPRESS_URL names another server, and this URI may be "
            error.cause += "a stranger's"
            error.hint = f"set MODEL_EXPRESS_URL={self.url} if you trust this server with the token"
        return error


def _is_path(path: str) -> bool:
    """Whether it is a path below a model, and printable."""
    return (
        0 < len(path.encode("utf-8", "surrogatepass")) <= _MAX_PATH_BYTES
        and all(part not in {"", ".", ".."} for part in path.split("/"))
        and not any(ord(c) < 32 or ord(c) == 127 for c in path)
    )
