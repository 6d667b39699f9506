"""The steps of a diagnosis of a storage, in order: what each examines, and which are skipped after a failure."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

from modelexpress_core.checkpoint import Checkpoint
from modelexpress_core.checkpoint.index import INDEX_SUFFIX, SUFFIX
from modelexpress_core.contracts.storage import (
    ComparingStorage,
    DiagnosableStorage,
    ObjectInfo,
    PatientStorage,
    Storage,
)
from modelexpress_core.doctor.examination import Examination, SkippedError, set_variables
from modelexpress_core.doctor.network import call_with_deadline
from modelexpress_core.doctor.step import Step
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    IntegrityError,
    NotFoundError,
    UnsupportedError,
)
from modelexpress_core.fetch import RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.loader import Loader
from modelexpress_core.loads.context import redacted_uris
from modelexpress_core.messages import byte_range, listed, printable
from modelexpress_core.plugins import CORE, STORAGE, PluginManager
from modelexpress_core.providers import StorageProvider
from modelexpress_core.registry import Registered
from modelexpress_core.report import format_bytes, format_files
from modelexpress_core.settings import SettingValue
from modelexpress_core.uri import ModelURI

__all__ = ["StorageExamination"]

#: Deadline of a request to the storage, in time-outs of one wait on the network: a request has several.
_STORAGE_FACTOR = 4

#: Deadline of reading all headers, retries included, likewise.
_CHECKPOINT_FACTOR = 12

#: Objects of a listing that are examined at most.
_MAX_OBJECTS = 10_000

#: Bytes of each test read.
_READ_BYTES = 64 << 10


class StorageExamination(Examination):
    """The steps of a load from a storage."""

    def __init__(
        self,
        uri: str | os.PathLike[str] | ModelURI,
        environ: Mapping[str, str] | None,
        plugins: PluginManager | None,
        timeout_seconds: float,
    ) -> None:
        super().__init__(uri, environ, plugins, timeout_seconds)
        self._loader: Loader | None = None
        self._uri: ModelURI | None = None
        self._registered: Registered[StorageProvider] | None = None
        self._storage: Storage | None = None
        self._object: ObjectInfo | None = None
        self._checkpoint: Checkpoint | None = None

    def steps(self) -> Iterator[Step]:
        """Take the steps one by one."""
        yield self._take("settings", self._read_settings)
        yield self._take("uri", self._parse)
        yield self._take("plugin", self._open_plugin)
        yield self._take("name", self._look_up)
        yield self._take("connection", self._connect)
        yield self._take("tls", self._encrypt)
        yield self._take("clock", self._compare_clocks)
        yield self._take("credentials", self._get_credentials)
        yield self._take("listing", self._list)
        yield self._take("read", self._read)
        yield self._take("checkpoint", self._open_headers)

    def close(self) -> None:
        """Close the storage, and wait for it no longer than the time-out."""
        if self._storage is not None:
            with contextlib.suppress(Exception):
                call_with_deadline(self._timeout, self._storage.close, "close the storage")

    # -- what needs no network ----------------------------------------------------------------------------------------

    def _open_plugin(self, facts: dict[str, Any]) -> tuple[str, str]:
        parsed = self._to_parse()
        self._loader = loader = Loader(self._given_environ, self._plugins)
        candidates = loader.candidates(loader.request(parsed))
        self._uri = uri = candidates[0].uri
        facts.update(uri=str(uri), candidates=[str(candidate.uri) for candidate in candidates])
        registered = loader.plugins.table(STORAGE).lookup(uri.scheme)
        plugin = registered.plugin
        chosen = set_variables(self._plugin_settings(registered))
        facts.update(plugin=plugin.name, version=plugin.version, variables=chosen)
        registered, storage = loader.plugins.open(STORAGE, uri, self._environ)
        self._registered, self._storage = registered, storage
        if registered.provider.capabilities.patience:
            cast("PatientStorage", storage).patience_seconds = self._timeout
        seen = f"{plugin.name} {plugin.version}".strip() + f" handles {uri.scheme}"
        if chosen:
            seen += f"; {', '.join(chosen)} {'is' if len(chosen) == 1 else 'are'} set"
        if uri != parsed:
            seen += f"; a plugin replaced the URI by {uri}"
        if len(candidates) > 1:
            seen += f"; {len(candidates)} places would be tried, and this looks at the first, {uri}"
        return "ok", seen

    def _rows(self) -> list[SettingValue]:
        return [] if self._registered is None else self._plugin_settings(self._registered)

    def _endpoint(self) -> Endpoint:
        return self._diagnosable().endpoint()

    def _check_connects(self) -> None:
        self._diagnosable()

    def _opened(self) -> tuple[Registered[StorageProvider], Storage]:
        if self._registered is None or self._storage is None:
            reason = "no storage is open"
            raise SkippedError(reason)
        return self._registered, self._storage

    def _diagnosable(self) -> DiagnosableStorage:
        registered, storage = self._opened()
        if registered.plugin.name == CORE:
            reason = f"{registered.provider.name} is on this machine"
            raise SkippedError(reason)
        if not registered.provider.capabilities.diagnosis:
            reason = f"{registered.label} does not say where it connects, and with which credentials"
            raise SkippedError(reason)
        return cast("DiagnosableStorage", storage)

    # -- the storage --------------------------------------------------------------------------------------------------

    def _get_credentials(self, facts: dict[str, Any]) -> tuple[str, str]:
        storage = self._diagnosable()
        facts["credentials"] = seen = self._in_time(storage.credentials, "get credentials", _STORAGE_FACTOR)
        return "ok", seen

    def _reachable(self) -> tuple[ModelURI, Storage]:
        """The storage with one try for each request, so that every failure is seen."""
        _, storage = self._opened()
        if self._unreachable:
            reason = "there is no connection"
            raise SkippedError(reason)
        uri = cast("ModelURI", self._uri)
        return uri, RetryingStorage(storage, RetryPolicy(attempts=1), RetryBudget(0), uri_of=redacted_uris(uri))

    def _list(self, facts: dict[str, Any]) -> tuple[str, str]:
        uri, storage = self._reachable()
        if uri.path.endswith(SUFFIX):
            self._object = self._in_time(lambda: storage.stat(uri.path), "read the size", _STORAGE_FACTOR)
            raise SkippedError("the URI is that of one file, which needs no listing")
        directory = uri.path.rpartition("/")[0] if uri.path.endswith(INDEX_SUFFIX) else uri.path
        try:
            found = self._in_time(
                lambda: list(islice(storage.list(directory), _MAX_OBJECTS)), "list the files", _STORAGE_FACTOR
            )
        except (AccessDeniedError, UnsupportedError) as exc:
            facts["listed"] = False
            return self._without_listing(exc)
        facts.update(listed=True, objects=len(found), bytes=sum(info.size for info in found))
        if not found:
            self._all_headers()  # raises the error of a load
        start = f"{directory.rstrip('/')}/" if directory else ""
        relative = {info.path.removeprefix(start): info for info in found}
        likely = sorted(relative, key=lambda name: ("/" in name, not name.endswith(SUFFIX), name))
        self._object = next((relative[name] for name in likely if relative[name].size), None) or self._opened_object()
        more = "at least " if len(found) == _MAX_OBJECTS else ""
        return "ok", f"{more}{len(found)} files, {format_bytes(facts['bytes'])}: {listed(likely, most=3)}"

    def _without_listing(self, denied: BackendError) -> tuple[str, str]:
        """A reader that may not list can load a checkpoint whose files have the usual names."""
        try:
            self._all_headers()
        except (AccessDeniedError, NotFoundError):
            raise denied from None
        self._object = self._opened_object()
        return "noted", (
            "listing is not allowed; the usual names were tried, and the checkpoint was found: loads work, "
            "unless its files are called otherwise"
        )

    def _opened_object(self) -> ObjectInfo | None:
        files = () if self._checkpoint is None else self._checkpoint.files
        return next((ObjectInfo(file.path, file.size, file.version) for file in files), None)

    def _read(self, facts: dict[str, Any]) -> tuple[str, str]:
        _, storage = self._reachable()
        info = self._object
        if info is None:
            reason = "no file is known that could be read"
            raise SkippedError(reason)
        if not info.size:
            reason = f"{printable(info.path)} is empty"
            raise SkippedError(reason)
        facts.update(path=info.path, version=info.version)
        begun = time.monotonic()
        start = self._bytes_at(storage, info, 0)
        milliseconds = (time.monotonic() - begun) * 1000
        facts["bytes"] = len(start)
        pinned = f"version {info.version}" if info.version else "which has no version to pin"
        seen = f"{format_bytes(len(start))} of {printable(info.path)} ({pinned}) in {milliseconds:.1f} ms"
        channel = self._channel()
        if channel:
            facts["channel"] = channel
            seen += f", over the {channel}" if channel.startswith("bulk") else f", over {channel}"
        offset = info.size // 2
        if not offset:
            return "ok", seen
        # Weights are read from the middle of files, and not every server has ranges.
        middle = self._bytes_at(storage, info, offset)
        facts["bytes_in_the_middle"] = len(middle)
        self._check_middle(info, start, middle, offset)
        return "ok", f"{seen}, and {format_bytes(len(middle))} from its middle"

    def _channel(self) -> str:
        """The way of the bytes, where the storage has several."""
        registered, storage = self._opened()
        compares = registered.provider.capabilities.compares
        return cast("ComparingStorage", storage).compared().channel if compares else ""

    def _bytes_at(self, storage: Storage, info: ObjectInfo, offset: int) -> bytes:
        buffer = memoryview(bytearray(min(_READ_BYTES, info.size - offset)))
        operation = f"read {byte_range(offset, len(buffer))}"
        self._in_time(
            lambda: storage.read_into(info.path, offset, buffer, version=info.version), operation, _STORAGE_FACTOR
        )
        return bytes(buffer)

    def _check_middle(self, info: ObjectInfo, start: bytes, middle: bytes, offset: int) -> None:
        """Raise if ``middle``, read at ``offset``, has other bytes than the file has there, as far as that is known."""
        overlap = start[offset:]
        same_as_start = middle == start[: len(middle)] and len(set(middle)) > 1
        if middle[: len(overlap)] == overlap and (overlap or not same_as_start):
            return
        uri = cast("ModelURI", self._uri)
        raise IntegrityError(
            "the bytes are those of another part of the file",
            uri=str(uri.with_path(info.path)),
            operation=f"read {byte_range(offset, len(middle))}",
            provider=self._opened()[0].provider.name,
            cause="the server, or a proxy in between, ignores Range, and the storage plugin does not notice",
            hint="read from a server with ranges; report it to the plugin's authors",
        )

    def _open_headers(self, facts: dict[str, Any]) -> tuple[str, str]:
        self._reachable()
        if self._object is None:
            reason = "no file is known that could be read"
            raise SkippedError(reason)
        checkpoint = self._checkpoint or self._all_headers()
        facts.update(files=len(checkpoint.files), tensors=len(checkpoint.tensors), bytes=checkpoint.tensor_bytes)
        files = format_files(len(checkpoint.files))
        return "ok", f"{len(checkpoint.tensors)} tensors, {format_bytes(checkpoint.tensor_bytes)} in {files}"

    def _all_headers(self) -> Checkpoint:
        """The checkpoint, opened in the way of a load."""
        registered, storage = self._opened()
        loader, uri = cast("Loader", self._loader), cast("ModelURI", self._uri)
        budget = RetryBudget(min(self._timeout * _STORAGE_FACTOR, loader.settings.retry_budget_seconds))
        self._checkpoint = self._in_time(
            lambda: loader.read_headers(uri, registered, storage, budget), "read the headers", _CHECKPOINT_FACTOR
        )
        return self._checkpoint
