"""Storages that read with the engine of runai-model-streamer, and leave all else to the regular plugin."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import cast

from modelexpress_core.contracts.storage import (
    Completion,
    DiagnosableStorage,
    Endpoint,
    ObjectInfo,
    ReadRequest,
    RecheckingStorage,
    Storage,
)
from modelexpress_core.errors import BackendError, InvalidURIError
from modelexpress_core.settings import from_env
from modelexpress_core.uri import ModelURI
from mx_streamer._engine import Engine, Extent, check_part
from mx_streamer._errors import Failures, closed
from mx_streamer.settings import StreamerSettings, check_azure, check_environment, check_gcs, engine_endpoint

__all__ = ["StreamedFiles", "StreamedObjects", "open_azure", "open_files", "open_gcs", "open_s3"]

#: Packages with the parts of the native library for object stores.
_S3 = "runai_model_streamer_s3"
_GCS = "runai_model_streamer_gcs"
_AZURE = "runai_model_streamer_azure"


class StreamedStorage:
    """Reads batches with the engine; lists, sizes, versions and single reads are those of the regular plugin.

    The engine cannot pin a version. So the version of each object is compared after the last read of a batch, before
    any of it counts as read. A change that is undone before that comparison is not noticed by it.

    Args:
        regular: The storage of the regular plugin, which is closed with this one.
        uri: Any URI of the storage.
        new_engine: Starts an engine.
    """

    def __init__(self, regular: Storage, uri: ModelURI, new_engine: Callable[[], Engine]) -> None:
        self._regular = regular
        self._uri = uri
        self._new_engine = new_engine
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._idle: list[Engine] = []

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        """The objects below ``prefix``."""
        return self._regular.list(prefix)

    def stat(self, path: str) -> ObjectInfo:
        """The object at ``path``, with the digests that the regular plugin finds."""
        return self._regular.stat(path)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Read into ``buffer`` with the regular plugin, which pins the version."""
        return self._regular.read_into(path, offset, buffer, version=version)

    def read_batch(self, requests: Sequence[ReadRequest]) -> Generator[Completion, None, None]:
        """Read all ``requests`` with the engine, compare versions, and then yield all completions.

        A read that the engine has begun cannot be cancelled: after ``close``, and after a failure, this waits for it.
        From a server that is silent that takes about half a minute.
        """
        failures = Failures(self._regular, self._uri)
        extents: list[Extent] = []
        positions: list[int] = []
        errors: dict[int, BackendError] = {}
        for index, request in enumerate(requests):
            reason = self._unreadable(request.path)
            if reason:
                errors[index] = failures.of_path(request, reason)
            else:
                positions.append(index)
                extents.append(Extent(self._engine_path(request.path), request.offset, request.buffer))
        for index, said in zip(positions, self._read(extents), strict=True):
            # The engine calls some reads over the end of an object a success, so that sizes are compared, too.
            error = failures.of_version(requests[index]) if said is None else failures.of_read(requests[index], said)
            errors.update({} if error is None else {index: error})
        for index in range(len(requests)):
            yield Completion(index, errors.get(index))

    def close(self) -> None:
        """Close the storage. Batches under way end their own engines."""
        self._closing.set()
        with self._lock:
            idle, self._idle = self._idle, []
        for engine in idle:
            engine.end()
        self._regular.close()

    def _read(self, extents: Sequence[Extent]) -> Sequence[str | None]:
        """What the engine said of each of ``extents``. Once this has ended, nothing writes to their memory."""
        if not extents:
            return ()
        engine = self._take()
        healthy = False
        try:
            said = engine.read(extents, self._closing)
            healthy = not any(said)
        finally:
            self._give_back(engine, healthy=healthy)
        return said

    def _take(self) -> Engine:
        with self._lock:
            if self._closing.is_set():
                raise closed()
            if self._idle:
                return self._idle.pop()
        return self._new_engine()

    def _give_back(self, engine: Engine, *, healthy: bool) -> None:
        with self._lock:
            if healthy and not self._closing.is_set():
                self._idle.append(engine)
                return
        engine.end()

    def _engine_path(self, path: str) -> str:
        raise NotImplementedError  # abstract: the storages below name their objects

    def _unreadable(self, path: str) -> str:
        """Why the engine cannot read ``path``, or could read another object; empty if it can."""
        if "\0" in path:
            return "its path has a NUL character, at which the engine ends the path"
        try:
            path.encode()
        except UnicodeEncodeError:
            return "its path is not UTF-8, which the engine needs"
        return ""


class StreamedFiles(StreamedStorage):
    """Files of this machine.

    The engine opens a path anew, and the regular plugin keeps files open: a file that was replaced by renaming has
    another version here, and fails the load.
    """

    def check_unchanged(self, path: str, *, version: str) -> None:
        """Return if the file at ``path`` still has ``version``."""
        cast("RecheckingStorage", self._regular).check_unchanged(path, version=version)

    def _engine_path(self, path: str) -> str:
        return os.path.join(os.getcwd(), path)


class StreamedObjects(StreamedStorage):
    """Objects of a bucket or container."""

    def endpoint(self) -> Endpoint:
        """Where requests go: those of the engine, too."""
        return cast("DiagnosableStorage", self._regular).endpoint()

    def credentials(self) -> str:
        """The credentials of the regular plugin. The engine finds its own, in the same environment."""
        return cast("DiagnosableStorage", self._regular).credentials()

    def _engine_path(self, path: str) -> str:
        return f"{self._uri.scheme}://{self._uri.authority}/{path}"

    def _unreadable(self, path: str) -> str:
        if {"", ".", ".."} & set(path.split("/")):
            return "its key has an empty part, or one of dots, and the engine may take it for another key"
        return super()._unreadable(path)


def open_files(uri: ModelURI, settings: Mapping[str, str], regular: Storage) -> StreamedFiles:
    """The storage for ``file`` URIs and plain paths.

    Raises:
        SettingsError: The settings differ from the environment of the process, which the engine reads.
    """
    check_environment(settings)
    return StreamedFiles(regular, uri, Engine)


def open_s3(uri: ModelURI, settings: Mapping[str, str], regular: Storage) -> StreamedObjects:
    """The storage for ``s3`` URIs. Connects to nothing yet.

    Raises:
        InvalidURIError: The URI has parameters.
        SettingsError: The settings differ from the environment of the process, which the engine reads.
        BackendError: The regular plugin knows no endpoint.
    """
    endpoint = _checked(uri, settings, regular, _S3, "AWS_")
    url = engine_endpoint(endpoint, uri.authority, from_env(StreamerSettings, os.environ))
    return StreamedObjects(regular, uri, lambda: Engine(_S3, url))


def open_gcs(uri: ModelURI, settings: Mapping[str, str], regular: Storage) -> StreamedObjects:
    """The storage for ``gs`` URIs. Connects to nothing yet.

    Raises:
        InvalidURIError: The URI has parameters.
        SettingsError: The engine would ask another server than the regular plugin, or with other credentials.
    """
    endpoint = _checked(uri, settings, regular, _GCS, "CLOUD_STORAGE_", "GOOGLE_")
    check_gcs(endpoint, settings)
    return StreamedObjects(regular, uri, lambda: Engine(_GCS))


def open_azure(uri: ModelURI, settings: Mapping[str, str], regular: Storage) -> StreamedObjects:
    """The storage for ``az`` URIs that begin with a container. Connects to nothing yet.

    Raises:
        InvalidURIError: The URI names an account, or has parameters.
        SettingsError: The engine would ask another server than the regular plugin, or with other credentials.
    """
    endpoint = _checked(uri, settings, regular, _AZURE, "AZURE_", "IDENTITY_", "MSI_")
    if uri.userinfo or "." in uri.authority or ":" in uri.authority:
        message = f"the engine of mx-streamer takes the account from AZURE_STORAGE_ACCOUNT_NAME, not from {uri}"
        raise InvalidURIError(message, hint="write az://container/path, or take mx-streamer out of MX_PREFER")
    check_azure(endpoint, settings)
    return StreamedObjects(regular, uri, lambda: Engine(_AZURE))


def _checked(uri: ModelURI, settings: Mapping[str, str], regular: Storage, part: str, *prefixes: str) -> Endpoint:
    """Where the regular plugin sends requests, if the engine can read what ``uri`` and ``settings`` name.

    Raises:
        ModuleNotFoundError: The part of the native library for this store is not installed.
        UnsupportedError: The engine has read another kind of object store in this process.
    """
    if find_spec(part) is None:  # importing it would configure the logging of an SDK
        raise ModuleNotFoundError(f"No module named {part!r}", name=part)
    check_part(part)
    check_environment(settings, *prefixes)
    if uri.query:
        message = f"the engine of mx-streamer takes no parameters: {uri}"
        hint = "set AWS_REGION in place of ?region=, or take mx-streamer out of MX_PREFER"
        raise InvalidURIError(message, hint=hint)
    return cast("DiagnosableStorage", regular).endpoint()
