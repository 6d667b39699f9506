"""``ModelService``: the cache as existing clients use it, which download whole files in the order of their bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import grpc

from modelexpress_core.bulk.requests import Run
from modelexpress_core.contracts.rights import DELETE, READ
from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.copying.selection import WEIGHT_SUFFIXES
from modelexpress_core.errors import (
    AccessDeniedError,
    InvalidURIError,
    ModelExpressError,
    NotFoundError,
    UnknownSchemeError,
)
from modelexpress_core.plugins import STORAGE
from modelexpress_core.server.cache.places import HUB
from modelexpress_core.server.services.cached import CacheServing, abort_with, message_of
from modelexpress_core.server.services.file_reads import cut, read
from modelexpress_core.server.services.streams import Stream
from modelexpress_core.wire.content import with_content
from modelexpress_core.wire.proto.modelexpress import model_pb2
from modelexpress_core.wire.rpc import MODEL, RpcContext, handler

if TYPE_CHECKING:
    from modelexpress_core.server.cache import CachedFile, Snapshot
    from modelexpress_core.server.cache.places import Place

__all__ = ["ModelService", "make_models"]

_Code = grpc.StatusCode

#: The scheme of each provider of the protocol.
_SCHEMES: Mapping[int, str] = {
    model_pb2.MODEL_PROVIDER_HUGGING_FACE: "hf",
    model_pb2.MODEL_PROVIDER_NGC: "ngc",
    model_pb2.MODEL_PROVIDER_GCS: "gs",
    model_pb2.MODEL_PROVIDER_S3: "s3",
}

#: Providers whose models have revisions.
_WITH_REVISIONS = frozenset({model_pb2.MODEL_PROVIDER_HUGGING_FACE})

#: Content of a message: if the client asks for none, and at most. Messages of over 4 MiB are refused by clients that
#: set no limit of their own.
_CHUNK_BYTES = 1 << 20
_LARGEST_CHUNK_BYTES = 2 << 20

#: Names of a selection.
_MAX_SELECTED = 10_000

#: How often a download reports that it goes on.
_REPORT_SECONDS = 5.0

#: How often a download is begun again that failed for a moment.
_ATTEMPTS = 4
_PAUSE_SECONDS = 1.0


def make_models(context: ServiceContext) -> grpc.GenericRpcHandler[Any, Any]:
    """The handler of ``ModelService``, for a server with a cache."""
    return handler(MODEL, ModelService(cast("CacheServing", context.cache)))


class ModelService:
    """Serves the models in a cache to existing clients.

    Args:
        serving: The cache.
    """

    def __init__(self, serving: CacheServing) -> None:
        self._serving = serving

    async def ensure_model_downloaded(
        self, request: model_pb2.ModelDownloadRequest, context: RpcContext
    ) -> AsyncIterator[model_pb2.ModelStatusUpdate]:
        """Download the model if need be, and report until it is there. A failure is a status, and no gRPC error."""
        revision = request.revision
        await self._check(request.provider, revision, context)
        scheme = _SCHEMES[request.provider]

        def update(status: model_pb2.ModelStatus, message: str, resolved: str = "") -> model_pb2.ModelStatusUpdate:
            return model_pb2.ModelStatusUpdate(
                model_name=request.model_name,
                status=status,
                message=message,
                provider=request.provider,
                # Clients send it back as the revision of their next requests.
                resolved_revision=resolved if resolved and request.provider in _WITH_REVISIONS else None,
            )

        place = await self._place(request.model_name, scheme, revision, READ, context)
        if isinstance(place, ModelExpressError):
            yield update(model_pb2.MODEL_STATUS_ERROR, message_of(place))
            return
        resolved = ""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                snapshot = await self._serving.begin(
                    place, revision, resolved, context, weights=not request.ignore_weights
                )
                with self._serving.cache.hold(snapshot):
                    resolved = snapshot.version
                    async for present in self._serving.progress(snapshot, every_seconds=_REPORT_SECONDS):
                        reason = f"{present} of {snapshot.size_bytes} bytes have arrived"
                        yield update(model_pb2.MODEL_STATUS_DOWNLOADING, reason, snapshot.commit_hash)
            except ModelExpressError as exc:
                if revision and not resolved and isinstance(exc, NotFoundError):
                    await context.abort(_Code.NOT_FOUND, message_of(exc))
                if not getattr(exc, "retryable", False) or attempt == _ATTEMPTS:
                    yield update(model_pb2.MODEL_STATUS_ERROR, message_of(exc))
                    return
                reason = f"the download is begun again: {message_of(exc)}"
                yield update(model_pb2.MODEL_STATUS_DOWNLOADING, reason)
            else:
                yield update(model_pb2.MODEL_STATUS_DOWNLOADED, "the model is there", snapshot.commit_hash)
                return
            await asyncio.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))

    async def list_model_files(
        self, request: model_pb2.ModelFilesRequest, context: RpcContext
    ) -> model_pb2.ListModelFilesResponse:
        """The files of the version that is in the cache."""
        _, files = await self._files(request, context)
        return model_pb2.ListModelFilesResponse(
            model_name=request.model_name,
            files=[model_pb2.ModelFile(relative_path=file.path, size=file.size) for file in files],
            total_size=sum(file.size for file in files),
        )

    async def stream_model_files(
        self, request: model_pb2.ModelFilesRequest, context: RpcContext
    ) -> AsyncIterator[bytes]:
        """The files, one after another, in encoded ``FileChunk`` messages."""
        snapshot, files = await self._files(request, context)
        most = min(request.chunk_size or _CHUNK_BYTES, _LARGEST_CHUNK_BYTES)
        commit: str | None = snapshot.commit_hash
        try:
            with self._serving.cache.hold(snapshot):
                stream = await self._serving.streams.open(context)
                for file in files:
                    making = self._chunks(snapshot, file, most, stream, context)
                    async with contextlib.aclosing(making) as chunks:
                        async for chunk, content in chunks:
                            chunk.is_last_file = chunk.is_last_chunk and file is files[-1]
                            if commit is not None:
                                chunk.commit_hash = commit
                                commit = None
                            yield with_content(chunk, "data", content)
        except ModelExpressError as exc:
            await abort_with(context, exc)

    async def _chunks(
        self, snapshot: Snapshot, file: CachedFile, most: int, stream: Stream, context: RpcContext
    ) -> AsyncGenerator[tuple[model_pb2.FileChunk, memoryview]]:
        """One file: messages without their data, and the data."""
        if not file.size:
            yield model_pb2.FileChunk(relative_path=file.path, is_last_chunk=True), memoryview(b"")
            return
        serving = self._serving
        reader = await serving.opened(snapshot, file.path, context)
        try:
            offset = 0
            # Small chunks are cut from larger parts: to read in another thread costs as much as 100 KiB.
            parts = cut(Run(file.path, 0, file.size), lambda: stream.message_bytes(max(most, _CHUNK_BYTES)))
            making = serving.made(
                reader,
                ((0, part) for part in parts),
                lambda _, part: read(reader.descriptor, part),
                snapshot,
                context,
            )
            async with contextlib.aclosing(making) as contents:
                async for part, content in contents:
                    for start in range(0, part.nbytes, most):
                        chunk = model_pb2.FileChunk(relative_path=file.path, offset=offset, total_size=file.size)
                        data = content[start : start + most]
                        offset += len(data)
                        chunk.is_last_chunk = offset == file.size
                        yield chunk, data
                    serving.count_sent(part.nbytes)
        finally:
            reader.close()

    async def delete_model(
        self, request: model_pb2.DeleteModelRequest, context: RpcContext
    ) -> model_pb2.DeleteModelResponse:
        """Remove all versions of the model, where the server allows that."""
        serving = self._serving
        await self._check(request.provider, "", context)
        place = await self._place(request.model_name, _SCHEMES[request.provider], "", DELETE, context)
        if isinstance(place, ModelExpressError):
            await abort_with(context, place)
        if not serving.may_delete:
            reason = "this server removes no models for its callers: its operator has to set MX_CACHE_DELETE=1"
            return model_pb2.DeleteModelResponse(success=False, message=reason)
        found = [snapshot for snapshot, _ in serving.cache.snapshots() if snapshot.place == place.name]
        if not found:
            return model_pb2.DeleteModelResponse(success=False, message=f"{place.shown} is not in the cache")
        freed = 0
        try:
            for snapshot in found:
                freed += await serving.in_thread(lambda: serving.cache.remove(snapshot))  # noqa: B023 - ends in this turn
        except ModelExpressError as exc:
            return model_pb2.DeleteModelResponse(success=False, message=message_of(exc))
        return model_pb2.DeleteModelResponse(success=True, message=f"{len(found)} versions, {freed} bytes")

    # -- what requests name --------------------------------------------------------------------------------------------

    @staticmethod
    async def _check(provider: int, revision: str, context: RpcContext) -> None:
        if provider not in _SCHEMES:
            await context.abort(_Code.INVALID_ARGUMENT, f"there is no provider {provider}")
        if revision and provider not in _WITH_REVISIONS:
            reason = f"models of {model_pb2.ModelProvider.Name(provider)} have no revisions"
            await context.abort(_Code.INVALID_ARGUMENT, reason)

    async def _place(
        self, name: str, scheme: str, revision: str, right: str, context: RpcContext
    ) -> Place | ModelExpressError:
        """The model of a request; an error if the server may not download it, or its name makes no sense to it."""
        rest = name.removeprefix(f"{scheme}://").rstrip("/")
        wrong = not rest.strip() or rest.startswith("/") or "//" in rest
        if wrong or len(rest.encode()) > _MAX_NAME_BYTES:
            await context.abort(_Code.INVALID_ARGUMENT, f"{name[:100]!r} names no model")
        cache = self._serving.cache
        try:
            # What the plugin is called that is missing comes first, and then whether the server may use it.
            cache.loader.plugins.table(STORAGE).lookup(scheme)
            if scheme not in {HUB, *cache.sources.schemes}:
                allowed = ", ".join(cache.sources.patterns)
                return AccessDeniedError(
                    f"the server does not download from {scheme}://",
                    cause=f"its operator allows {allowed}",
                    hint="have the operator add it to MX_CACHE_SOURCES",
                )
            place = cache.place(f"{scheme}/{rest}", revision or None)
        except InvalidURIError as exc:
            await abort_with(context, exc)
        except ModelExpressError as exc:
            return exc
        await self._serving.require(place, right, context)
        return place

    async def _files(
        self, request: model_pb2.ModelFilesRequest, context: RpcContext
    ) -> tuple[Snapshot, Sequence[CachedFile]]:
        """The version that a request is about, and the files that it asks for."""
        await self._check(request.provider, request.revision, context)
        scheme = _SCHEMES[request.provider]
        place = await self._place(request.model_name, scheme, request.revision, READ, context)
        if isinstance(place, UnknownSchemeError):  # so nothing of it can be there
            await context.abort(_Code.NOT_FOUND, message_of(place))
        if isinstance(place, ModelExpressError):
            await abort_with(context, place)
        selected = request.file_selector.paths
        if len(selected) > _MAX_SELECTED:
            await context.abort(_Code.INVALID_ARGUMENT, f"at most {_MAX_SELECTED} files can be selected")
        revision = request.revision or None
        found = self._serving.cache.find(place.name, revision=revision)
        if found is None and (request.ignore_weights or selected):
            found = self._serving.cache.find(place.name, revision=revision, weights=False)
        if found is None:
            of = f" at {request.revision}" if request.revision else ""
            reason = f"{place.shown}{of} is not in the cache: EnsureModelDownloaded downloads it"
            await context.abort(_Code.NOT_FOUND, reason)
        await self._serving.check_restriction(found, context)
        absent = next((path for path in selected if path not in found.files), None)
        if absent is not None:
            await context.abort(_Code.NOT_FOUND, f"{place.shown} has no file {absent[:200]!r}")
        wanted = set(selected) or set(found.files)
        files = [
            found.files[path]
            for path in sorted(wanted)
            if not (request.ignore_weights and path.lower().endswith(WEIGHT_SUFFIXES))
        ]
        return found, files


_MAX_NAME_BYTES = 1024
