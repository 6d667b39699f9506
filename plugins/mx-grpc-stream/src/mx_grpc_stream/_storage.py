"""The storage for ``mx`` and ``mxs``: files of a model from the cache of a ModelExpress server."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import attrs

from modelexpress_core.bulk.requests import MAX_PIECES, Run
from modelexpress_core.contracts.storage import Compared, Endpoint, ObjectInfo
from modelexpress_core.errors import (
    BackendError,
    InvalidURIError,
    NotFoundError,
    StillArrivingError,
    UnavailableError,
)
from modelexpress_core.messages import printable
from modelexpress_core.settings import LoadSettings, from_env
from modelexpress_core.sources.cache_client import CacheClient, CachedModel
from modelexpress_core.uri import ModelURI
from mx_grpc_stream._cache_channel import CacheChannel
from mx_grpc_stream._cache_comparison import ModelComparison
from mx_grpc_stream._errors import PROVIDER
from mx_grpc_stream.settings import GrpcStreamSettings

__all__ = ["CacheStorage", "open_cache"]

#: A server waits up to 20 s for bytes that are still arriving, before it says that they are not there yet.
_ARRIVAL_PATIENCE_SECONDS = 30.0

#: How old what is known of a download may be.
_PROGRESS_SECONDS = 1.0

#: Versions of models that one storage keeps open.
_MAX_MODELS = 64


class CacheStorage:
    """Reads files from the cache of one server.

    A model is opened once: all listings and reads of a storage are of the version that it had then, also where the
    server has a newer one meanwhile. That version is the version of each of its files.

    Args:
        uri: The model; its path counts as one model, and its ``revision`` for that.
        client: Calls the server; closed with the storage.
        verify: Whether what arrives is compared with the chunk manifest.
        wants_bulk: Whether the bulk channel is used.

    """

    def __init__(self, uri: ModelURI, client: CacheClient, *, verify: bool = True, wants_bulk: bool = True) -> None:
        self._uri = uri
        self._client = client
        self._verify = verify
        self._wants_bulk = wants_bulk
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._models: dict[tuple[str, str], _OpenModel] = {}  # by the path that names the model, and the version
        self._latest: dict[str, str] = {}  # the version that was opened without asking for one
        self._closed = threading.Event()
        self._patience_seconds = _ARRIVAL_PATIENCE_SECONDS

    @property
    def patience_seconds(self) -> float:
        """How long a read waits for its next byte, if the model is complete."""
        return self._patience_seconds

    @patience_seconds.setter
    def patience_seconds(self, seconds: float) -> None:
        self._patience_seconds = seconds
        with self._lock:
            models = list(self._models.values())
        for each in models:
            each.channel.set_patience(each.patience)

    # -- listing -------------------------------------------------------------------------------------------------------

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The files below a directory of a model."""
        try:
            model = self._model_at(prefix)
        except BackendError as exc:
            raise self._named(exc, prefix, "list the files") from exc.__cause__
        start = f"{prefix.rstrip('/')}/"
        for name in model.model.files:
            path = model.path_of(name)
            if path.startswith(start):
                yield model.info(name)

    def stat(self, path: str) -> ObjectInfo:
        """A file of a model."""
        try:
            model = self._model_at(path)
            return model.info(model.name_of(path))
        except BackendError as exc:
            raise self._named(exc, path, "read the size") from exc.__cause__

    # -- reading -------------------------------------------------------------------------------------------------------

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Read a range straight into ``buffer``, and compare it with the chunk manifest."""
        try:
            model = self._model_at(path, version)
            return model.read_into(model.name_of(path), offset, buffer)
        except BackendError as exc:
            raise self._named(exc, path, f"read {len(buffer)} bytes at {offset}") from exc.__cause__

    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        """Read runs that the server gathers, and compares for this reader."""
        try:
            model = self._model_at(path, version)
            return model.read_runs(model.name_of(path), offset, run_bytes, stride_bytes, buffer)
        except BackendError as exc:
            raise self._named(exc, path, f"read {len(buffer) // run_bytes} runs at {offset}") from exc.__cause__

    def check_unchanged(self, path: str, *, version: str) -> None:
        """Compare what was not compared yet: parts of chunks, and everything if the model was still arriving."""
        with self._lock:
            models = [each for (root, pinned), each in self._models.items() if _is_in(path, root) and pinned == version]
        try:
            for model in models:
                model.finish()
        except BackendError as exc:
            raise self._named(exc, path, "compare the chunks") from exc.__cause__

    def compared(self) -> Compared:
        """What was compared so far, and how the bytes came."""
        with self._lock:
            models = list(self._models.values())
        described = [each.channel.description for each in models if each.channel.description]
        return Compared(
            sum(each.comparison.here_bytes for each in models),
            sum(each.comparison.by_server_bytes for each in models),
            described[-1] if described else "",
        )

    # -- diagnosis -----------------------------------------------------------------------------------------------------

    def endpoint(self) -> Endpoint:
        """The server."""
        return self._client.endpoint

    def credentials(self) -> str:
        """Whether a token is sent, and a certificate shown."""
        security = self._client.security
        if security.token is None:
            said = "no token, since no variable names this server (MODEL_EXPRESS_URL)"
        else:
            said = f"the token of {security.token.path}, if there is one"
        return f"{said}, and the certificate of MX_TLS_CERT_PATH" if security.tls.certificate else said

    def close(self) -> None:
        """Close the connections; reads in other threads end soon."""
        self._closed.set()
        with self._lock:
            models = list(self._models.values())
        for each in models:
            each.channel.close()
        self._client.close()

    # -- models --------------------------------------------------------------------------------------------------------

    def _model_at(self, path: str, version: str | None = None) -> _OpenModel:
        """The model that a path is in, opened if necessary."""
        found = self._known_at(path, version)
        if found is not None:
            return found
        with self._opening:
            found = self._known_at(path, version)
            if found is not None:
                return found
            if self._closed.is_set():
                raise UnavailableError("the storage was closed", retryable=False)
            if not path:
                raise NotFoundError("the URI names no model", hint="write mx://server:8001/org/name")
            asked = self._uri.path if _is_in(path, self._uri.path) else path
            revision = self._uri.query.get("revision", "")
            opened = self._client.open(asked, revision=revision, version=version or "")
            model = _OpenModel(self, self._client, opened.root_in(asked), opened)
            with self._lock:
                while len(self._models) >= _MAX_MODELS:
                    self._models.pop(next(iter(self._models))).channel.close()
                # One that is open already keeps what it has compared.
                model = self._models.setdefault((model.root, opened.version), model)
                if not version:
                    self._latest[model.root] = opened.version
            return model

    def _known_at(self, path: str, version: str | None) -> _OpenModel | None:
        with self._lock:
            for (root, opened), model in self._models.items():
                if _is_in(path, root) and opened == (version or self._latest.get(root)):
                    return model
        return None

    def resolve_again(self) -> None:
        """Forget which versions the names had, as a new storage would."""
        with self._lock:
            self._latest.clear()

    def _named(self, exc: BackendError, path: str, operation: str) -> BackendError:
        exc.uri, exc.operation, exc.provider = str(self._uri.with_path(path)), operation, PROVIDER
        if self._closed.is_set():
            exc.retryable = False
        return exc

    @property
    def closed(self) -> threading.Event:
        """Set by ``close``."""
        return self._closed

    @property
    def verifies(self) -> bool:
        """Whether what arrives is compared."""
        return self._verify

    @property
    def wants_bulk(self) -> bool:
        """Whether the bulk channel is used."""
        return self._wants_bulk


class _OpenModel:
    """One version of a model that a storage has opened. Thread-safe."""

    def __init__(self, storage: CacheStorage, client: CacheClient, root: str, model: CachedModel) -> None:
        self.root = root
        self.model = model
        self._storage = storage
        self._client = client
        self._lock = threading.Lock()
        self._finishing = threading.Lock()
        self._asked_at = 0.0
        self.channel = CacheChannel(client, model, wants_bulk=storage.wants_bulk, patience_seconds=self.patience)
        self.comparison = ModelComparison(client, self._read_fully)

    def path_of(self, name: str) -> str:
        """The path of a file in the storage."""
        return f"{self.root}/{name}"

    def name_of(self, path: str) -> str:
        """The path of a file below the model.

        Raises:
            NotFoundError: There is no such file.
        """
        name = path[len(self.root) + 1 :]
        if name not in self.model.files:
            raise NotFoundError(
                f"the version {self.model.version[:12]} of the model has no file {printable(name)[:200]!r}",
                cause="the name is misspelt, or it is that of a directory",
                hint="list the files: mx inspect",
            )
        return name

    def info(self, name: str) -> ObjectInfo:
        """What is known of a file."""
        size, digests = self.model.files[name]
        # Workers with the same content version read from each other: a server that nobody named could make up one.
        origin = self.model.origin(name) if self._client.is_named else None
        return ObjectInfo(self.path_of(name), size, self.model.version, digests, origin)

    @property
    def patience(self) -> float:
        """How long a read waits for its next byte."""
        patience = self._storage.patience_seconds
        return patience if self.model.complete else max(patience, _ARRIVAL_PATIENCE_SECONDS)

    # -- reading -------------------------------------------------------------------------------------------------------

    def read_into(self, name: str, offset: int, buffer: memoryview) -> int:
        """Read and compare a range."""
        view = buffer[: max(0, self.model.files[name][0] - offset)]
        if not view:
            return 0
        if not self._storage.verifies:
            return self._read(Run(name, offset, len(view)), view)
        file = self.comparison.known(name)
        if file is None and offset:
            file = self.comparison.of_file(self.model, name)
        # As long as the model arrives, its chunks have no digests to compare with: the pieces of an answer have.
        checksums = not self.model.complete
        if file is None:  # its first bytes say how it is cut into chunks
            count = self._read(Run(name, 0, len(view)), view, checksums=checksums)
            reading = self.comparison.of_file(self.model, name, view[:count]).read_from(0)
            reading.add(view[:count])
        else:
            reading = file.read_from(offset)

            def landed(done: int) -> None:
                reading.add(view[reading.end - offset : done])

            count = self._read(Run(name, offset, len(view)), view, landed, checksums=checksums)
        reading.finish()
        for start, end in list(reading.different):
            again, part = reading.again(start, end), view[start - offset : end - offset]
            self._read_fully(name, start, part)
            again.add(part)
            again.finish()
            if again.different:
                raise self.comparison.explain_damage(self.model, name, start, part)
        self.comparison.flush(self.model, name)
        return count

    def read_runs(self, name: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview) -> int:
        """Read runs; the server compares them later."""
        size = self.model.files[name][0]
        there = 0 if offset + run_bytes > size else (size - offset - run_bytes) // stride_bytes + 1
        count = min(len(buffer) // run_bytes, there, MAX_PIECES)
        if not count:
            return 0
        view = buffer[: count * run_bytes]
        run = Run(name, offset, run_bytes, stride_bytes, count) if count > 1 else Run(name, offset, run_bytes)
        done = self._read(run, view, checksums=not self._storage.verifies)
        done -= done % run_bytes
        if done and self._storage.verifies:
            self.comparison.add_runs(name, offset, run_bytes, stride_bytes, view[:done])
            self.comparison.flush(self.model, name)
        return done

    def _read(
        self, run: Run, view: memoryview, landed: Callable[[int], None] | None = None, *, checksums: bool = False
    ) -> int:
        if not self.model.complete:
            self._present_bytes()
            self.channel.set_patience(self.patience)
        try:
            return self.channel.read(run, view, landed or (lambda _done: None), checksums=checksums)
        except StillArrivingError as exc:
            exc.present_bytes = max(exc.present_bytes, self._present_bytes())
            raise

    def _read_fully(self, name: str, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._read(Run(name, offset + done, len(view) - done), view[done:])

    def _present_bytes(self) -> int:
        """How many bytes of the model have arrived at the server.

        Raises:
            BackendError: Its download failed.
        """
        with self._lock:
            if self.model.complete or time.monotonic() - self._asked_at < _PROGRESS_SECONDS:
                return self.model.present_bytes
            self._asked_at = time.monotonic()
        with contextlib.suppress(UnavailableError):  # it is asked again with the next read
            self._learn(self._client.open(self.model.place, version=self.model.version))
        return self.model.present_bytes

    def _learn(self, news: CachedModel) -> None:
        self.model = attrs.evolve(news, place=self.model.place, files=self.model.files)

    def finish(self) -> None:
        """Compare what is left, once the model is complete."""
        if not self._storage.verifies:
            return
        with self._finishing:
            if not self.model.complete:
                self._learn(self._client.follow(self.model, cancelled=self._storage.closed))
            if self._storage.closed.is_set():
                raise UnavailableError("the storage was closed", retryable=False)
            self.comparison.finish(self.model)


def _is_in(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")


def open_cache(uri: ModelURI, settings: Mapping[str, str]) -> CacheStorage:
    """Open the storage for ``mx`` and ``mxs`` URIs.

    Raises:
        InvalidURIError: The URI names no server, or has parameters that no server takes.
        SettingsError: A variable, or a file that it names, cannot be used.
    """
    others = [name for name in uri.query if name != "revision"]
    if not uri.authority or uri.userinfo or others:
        wrong = f"has the parameter {printable(others[0])}" if others else "has a user" if uri.userinfo else ""
        message = f"the URI {uri} {wrong or 'names no server'}"
        raise InvalidURIError(message, hint="write mx://server:8001/org/name?revision=main")
    scheme = "https" if uri.scheme == "mxs" else "http"
    client = CacheClient.from_env(f"{scheme}://{uri.authority}", settings)
    stream = from_env(GrpcStreamSettings, settings)
    verify = from_env(LoadSettings, settings).verify_digests
    return CacheStorage(uri, client, verify=verify, wants_bulk=bool(stream.bulk_port))
