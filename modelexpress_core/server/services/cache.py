"""``CacheService``: reads and manages the models in the server's cache."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import grpc

from modelexpress_core.bulk.requests import Run
from modelexpress_core.checkpoint.manifest import TABLES
from modelexpress_core.contracts.rights import DELETE, ENSURE, READ
from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.errors import ModelExpressError, UnavailableError
from modelexpress_core.server.services.cache_bulk import TICKET_SECONDS
from modelexpress_core.server.services.cached import CacheServing, abort_with, shown
from modelexpress_core.server.services.comparing import ChunkComparison
from modelexpress_core.server.services.file_reads import MAX_RANGES, cut, read, run_of, wrong_with
from modelexpress_core.server.services.streams import Stream
from modelexpress_core.wire.authentication import caller, certificate_names
from modelexpress_core.wire.frames import FRAME_BYTES, frame_of
from modelexpress_core.wire.proto.modelexpress import cache_pb2
from modelexpress_core.wire.rpc import CACHE, RpcContext, handler

if TYPE_CHECKING:
    from modelexpress_core.server.cache import CachedFile, Snapshot

__all__ = ["CacheService", "make_cache"]

_Code = grpc.StatusCode

#: Bytes of the paths, versions and digests of the files in one answer.
_PAGE_BYTES = 512 << 10

_MAX_PARTS = 4096

#: Bytes of the parts that one call compares.
_MAX_COMPARED_BYTES = 4 << 30

#: Calls that compare at the same time, so that others can go on reading.
_COMPARING = 2

_MAX_MANIFEST_BYTES = 4 << 20

#: How often a comparison reports how far it is.
_REPORT_SECONDS = 0.5


def make_cache(context: ServiceContext) -> grpc.GenericRpcHandler[Any, Any]:
    """The handler of ``CacheService``, for a server with a cache."""
    return handler(CACHE, CacheService(cast("CacheServing", context.cache)))


class CacheService:
    """Serves the models in a cache.

    Args:
        serving: The cache.
    """

    def __init__(self, serving: CacheServing) -> None:
        self._serving = serving
        self._comparison = ChunkComparison()
        self._comparing = asyncio.Semaphore(_COMPARING)

    # -- reading -------------------------------------------------------------------------------------------------------

    async def open_model(
        self, request: cache_pb2.OpenModelRequest, context: RpcContext
    ) -> AsyncIterator[cache_pb2.OpenModelResponse]:
        """Begin the model if need be, and tell its files, and then how much of it has arrived."""
        serving = self._serving
        place = await serving.place(request.place, request.revision, READ, context)
        try:
            snapshot = await serving.begin(
                place, request.revision, request.version, context, weights=not request.no_weights
            )
            with serving.cache.hold(snapshot):
                begun = False
                async for present in serving.progress(snapshot):
                    answer = _opened(place.root, snapshot, present)
                    if not begun:
                        self._add_first_page(answer, snapshot)
                    begun = True
                    yield answer
                answer = _opened(place.root, snapshot, snapshot.size_bytes)
                if not begun:
                    self._add_first_page(answer, snapshot)
                yield answer
        except ModelExpressError as exc:
            await abort_with(context, exc)

    @staticmethod
    def _add_first_page(answer: cache_pb2.OpenModelResponse, snapshot: Snapshot) -> None:
        page, answer.next_page_token = _page(snapshot, "")
        answer.files.extend(page)

    async def list_files(self, request: cache_pb2.ListFilesRequest, context: RpcContext) -> cache_pb2.ListFilesResponse:
        """A page of the files of a version."""
        _, snapshot = await self._version(request.model, context)
        try:
            page, token = _page(snapshot, request.page_token)
        except ValueError:
            await context.abort(_Code.INVALID_ARGUMENT, "the page token is not one of this server's")
        return cache_pb2.ListFilesResponse(files=page, next_page_token=token)

    async def read_file(self, request: cache_pb2.ReadFileRequest, context: RpcContext) -> AsyncIterator[bytes]:
        """Stream ranges of a file, in frames."""
        serving = self._serving
        _, snapshot = await self._version(request.model, context, request.path)
        file = await self._file(snapshot, request.path, context)
        if len(request.ranges) > MAX_RANGES:
            reason = f"{len(request.ranges)} ranges in one call, and {MAX_RANGES} are allowed"
            await context.abort(_Code.INVALID_ARGUMENT, reason)
        runs = [run_of(request.path, each) for each in request.ranges]
        wrong = wrong_with(runs, file.size)
        if wrong:
            await context.abort(_Code.OUT_OF_RANGE, f"there are no {wrong}")
        try:
            with serving.cache.hold(snapshot):
                reader = await serving.opened(snapshot, request.path, context)
                try:
                    stream = await serving.streams.open(context)
                    making = serving.made(
                        reader,
                        _parts(runs, stream),
                        lambda position, part: frame_of(
                            position, read(reader.descriptor, part), checksum=request.checksums
                        ),
                        snapshot,
                        context,
                    )
                    async with contextlib.aclosing(making) as frames:
                        async for part, frame in frames:
                            yield frame
                            serving.count_sent(part.nbytes)
                finally:
                    reader.close()
        except ModelExpressError as exc:
            await abort_with(context, exc)

    async def open_bulk(self, request: cache_pb2.OpenBulkRequest, context: RpcContext) -> cache_pb2.OpenBulkResponse:
        """A ticket for one version."""
        place, snapshot = await self._version(request.model, context)
        bulk = self._serving.bulk
        if bulk is None or not bulk.reaches(context.peer()):
            reason = "the server offers no bulk channel" + ("" if bulk is None else " to other hosts without TLS")
            await context.abort(_Code.UNIMPLEMENTED, reason)
        names = certificate_names(context.auth_context())
        return cache_pb2.OpenBulkResponse(
            port=bulk.port,
            host=bulk.host,
            ticket=bulk.ticket(place.name, snapshot.version, names[0] if names else ""),
            content=place.name,
            version=snapshot.version,
            valid_for_seconds=TICKET_SECONDS,
        )

    # -- comparing -----------------------------------------------------------------------------------------------------

    async def read_manifest(
        self, request: cache_pb2.ReadManifestRequest, context: RpcContext
    ) -> cache_pb2.ReadManifestResponse:
        """A part of the index, or of a table."""
        snapshot = await self._complete(request.model, context)
        if request.table not in {"index", *TABLES}:
            await context.abort(_Code.INVALID_ARGUMENT, f"a manifest has an index and the tables {', '.join(TABLES)}")
        if request.length > _MAX_MANIFEST_BYTES:
            await context.abort(_Code.INVALID_ARGUMENT, f"at most {_MAX_MANIFEST_BYTES} bytes are read at once")
        try:
            with self._serving.cache.hold(snapshot):
                data = await self._serving.in_thread(lambda: self._of_manifest(snapshot, request))
        except ModelExpressError as exc:
            await abort_with(context, exc)
        return cache_pb2.ReadManifestResponse(data=data)

    def _of_manifest(self, snapshot: Snapshot, request: cache_pb2.ReadManifestRequest) -> bytes:
        manifest, tables = self._comparison.manifest(snapshot)
        if request.table == "index":
            return manifest.text[request.offset : request.offset + request.length]
        with open(tables[request.table], "rb") as table:
            table.seek(min(request.offset, 1 << 62))
            return table.read(request.length)

    async def compare_parts(
        self, request: cache_pb2.ComparePartsRequest, context: RpcContext
    ) -> cache_pb2.ComparePartsResponse:
        """Compare parts that a reader got, and the chunks around them."""
        if len(request.parts) > _MAX_PARTS:
            reason = f"{len(request.parts)} parts in one call, and {_MAX_PARTS} are allowed"
            await context.abort(_Code.INVALID_ARGUMENT, reason)
        snapshot = await self._complete(request.model, context, request.parts[0].path if request.parts else "")
        runs = [run_of(each.path, each) for each in request.parts]
        for run in runs:
            file = await self._file(snapshot, run.name, context)
            wrong = wrong_with([run], file.size)
            if wrong:
                await context.abort(_Code.OUT_OF_RANGE, f"there are no {wrong}")
        if sum(run.end - run.offset for run in runs) > _MAX_COMPARED_BYTES:
            await context.abort(_Code.INVALID_ARGUMENT, f"at most {_MAX_COMPARED_BYTES} bytes are compared in one call")
        response = cache_pb2.ComparePartsResponse()
        try:
            async with self._comparing:
                with self._serving.cache.hold(snapshot):
                    for position, (run, part) in enumerate(zip(runs, request.parts, strict=True)):
                        await self._compare(snapshot, position, run, part.crc64nvme, response)
        except ModelExpressError as exc:
            await abort_with(context, exc)
        return response

    async def _compare(
        self, snapshot: Snapshot, position: int, run: Run, crc: int, response: cache_pb2.ComparePartsResponse
    ) -> None:
        same, damaged = await self._serving.in_thread(lambda: self._comparison.compare(snapshot, run, crc))
        if not same:
            response.different.append(position)
        if damaged:
            response.damaged.append(position)
            self._serving.metrics.damaged(damaged)

    # -- managing ------------------------------------------------------------------------------------------------------

    async def list_models(self, _: cache_pb2.ListModelsRequest, context: RpcContext) -> cache_pb2.ListModelsResponse:
        """All versions whose models the caller may read."""
        del context
        serving, name = self._serving, caller.get()
        models = [
            cache_pb2.CachedModel(
                place=shown(snapshot.place),
                source=snapshot.source,
                version=snapshot.version,
                revision=snapshot.revision,
                files=len(snapshot.files),
                size_bytes=snapshot.size_bytes,
                present_bytes=serving.present_bytes(snapshot),
                complete=snapshot.complete,
                weights=snapshot.weights,
                idle_seconds=idle_seconds,
                in_use=serving.cache.in_use(snapshot.key),
                error=snapshot.error.headline if snapshot.error else "",
            )
            for snapshot, idle_seconds in serving.cache.snapshots()
            if serving.allows(name, READ, snapshot)
        ]
        return cache_pb2.ListModelsResponse(models=models)

    async def validate_model(
        self, request: cache_pb2.ValidateModelRequest, context: RpcContext
    ) -> AsyncIterator[cache_pb2.ValidateModelResponse]:
        """Compare all files of a model with their digests."""
        place = await self._serving.place(request.model.place, "", ENSURE, context)
        found = [each for each in self._versions(place.name, request.model.version) if each.complete]
        if not found:
            await context.abort(_Code.NOT_FOUND, f"no complete version of {place.shown} is in the cache")
        size = sum(snapshot.size_bytes for snapshot in found)
        damaged: list[cache_pb2.DamagedFile] = []
        before = 0
        try:
            async with self._comparing:
                for snapshot in found:
                    validation = _Validation(self._serving, snapshot)
                    async with contextlib.aclosing(validation.progress()) as progress:
                        async for compared in progress:
                            yield cache_pb2.ValidateModelResponse(compared_bytes=before + compared, size_bytes=size)
                    self._serving.metrics.damaged(len(validation.damaged))
                    damaged += validation.damaged
                    before += snapshot.size_bytes
        except ModelExpressError as exc:
            await abort_with(context, exc)
        yield cache_pb2.ValidateModelResponse(compared_bytes=size, size_bytes=size, damaged=damaged, done=True)

    async def remove_model(
        self, request: cache_pb2.RemoveModelRequest, context: RpcContext
    ) -> cache_pb2.RemoveModelResponse:
        """Remove versions of a model."""
        serving = self._serving
        place = await serving.place(request.model.place, "", DELETE, context)
        if not serving.may_delete:
            reason = "this server removes no models for its callers: its operator has to set MX_CACHE_DELETE=1"
            await context.abort(_Code.PERMISSION_DENIED, reason)
        found = self._versions(place.name, request.model.version)
        if not found:
            await context.abort(_Code.NOT_FOUND, f"no such version of {place.shown} is in the cache")
        freed = 0
        try:
            for snapshot in found:
                freed += await serving.in_thread(lambda: serving.cache.remove(snapshot))  # noqa: B023 - ends in this turn
        except ModelExpressError as exc:
            await abort_with(context, exc)
        return cache_pb2.RemoveModelResponse(removed=len(found), freed_bytes=freed)

    async def get_cache_stats(
        self, _: cache_pb2.GetCacheStatsRequest, context: RpcContext
    ) -> cache_pb2.GetCacheStatsResponse:
        """What the cache holds and did."""
        try:
            stats = await self._serving.in_thread(self._serving.cache.stats)
        except ModelExpressError as exc:
            await abort_with(context, exc)
        return cache_pb2.GetCacheStatsResponse(
            directory=stats.directory,
            models=stats.models,
            size_bytes=stats.size_bytes,
            limit_bytes=stats.limit_bytes or 0,
            free_bytes=stats.free_bytes,
            hits=stats.hits,
            misses=stats.misses,
            origin_bytes=stats.origin_bytes,
            sent_bytes=stats.sent_bytes,
            evictions=stats.evictions,
            downloads=stats.downloads,
        )

    # -- what requests name --------------------------------------------------------------------------------------------

    async def _version(
        self, model: cache_pb2.ModelVersion, context: RpcContext, file: str = ""
    ) -> tuple[Any, Snapshot]:
        return await self._serving.version(model.place, model.version, context, file=file)

    async def _complete(self, model: cache_pb2.ModelVersion, context: RpcContext, file: str = "") -> Snapshot:
        """The version of a request, which is complete; the call ends if it is not."""
        _, snapshot = await self._version(model, context, file)
        if not snapshot.complete:
            await self._serving.abort_not_there(snapshot, context)
        return snapshot

    @staticmethod
    async def _file(snapshot: Snapshot, path: str, context: RpcContext) -> CachedFile:
        file = snapshot.files.get(path)
        if file is None:
            reason = f"{shown(snapshot.place)} has no file {path[:200]!r} at {snapshot.version[:12]}"
            await context.abort(_Code.NOT_FOUND, reason)
        return file

    def _versions(self, place: str, version: str) -> Sequence[Snapshot]:
        return [
            snapshot
            for snapshot, _ in self._serving.cache.snapshots()
            if snapshot.place == place and version in {"", snapshot.version}
        ]


def _parts(runs: Sequence[Run], stream: Stream) -> Iterator[tuple[int, Run]]:
    """What each frame holds, and the position of its range."""
    for position, run in enumerate(runs):
        for part in cut(run, lambda: stream.message_bytes(FRAME_BYTES)):
            yield position, part


class _Validation:
    """Compares all files of a version with their digests.

    Args:
        serving: The cache.
        snapshot: The version.

    Attributes:
        damaged: The damaged files, at the end.
    """

    def __init__(self, serving: CacheServing, snapshot: Snapshot) -> None:
        self.damaged: Sequence[cache_pb2.DamagedFile] = ()
        self._serving = serving
        self._snapshot = snapshot
        self._compared = 0
        self._left = False

    async def progress(self) -> AsyncGenerator[int]:
        """Bytes that were compared, now and then. If it is closed early, the comparison ends."""
        cache = self._serving.cache
        comparing = asyncio.ensure_future(
            self._serving.in_thread(lambda: cache.validate(self._snapshot, self._progressed))
        )
        try:
            while not (await asyncio.wait([comparing], timeout=_REPORT_SECONDS))[0]:
                yield self._compared
        finally:
            self._left = True
            await asyncio.wait([comparing])
            if comparing.exception() is None:
                self.damaged = [
                    cache_pb2.DamagedFile(path=each.path, reason=each.reason) for each in comparing.result()
                ]
        await comparing

    def _progressed(self, nbytes: int) -> None:
        self._compared = nbytes
        if self._left:
            message = "nobody waits for the comparison any more"
            raise UnavailableError(message)


def _opened(root: str, snapshot: Snapshot, present: int) -> cache_pb2.OpenModelResponse:
    record = snapshot.record
    return cache_pb2.OpenModelResponse(
        place=root,
        source=snapshot.source,
        version=snapshot.version,
        size_bytes=snapshot.size_bytes,
        present_bytes=present,
        complete=record is not None,
        manifest_digest=record.manifest_digest if record else "",
        directory=record.directory if record else "",
    )


def _page(snapshot: Snapshot, token: str) -> tuple[Sequence[cache_pb2.CachedFile], str]:
    """The files from ``token`` on that one answer has room for, and the token of the next page.

    Raises:
        ValueError: The token is none.
    """
    paths = sorted(snapshot.files)
    first = int(token or "0") if re.fullmatch("[0-9]{0,9}", token) else -1
    if not 0 <= first <= len(paths):
        reason = "there is no such page"
        raise ValueError(reason)
    page: list[cache_pb2.CachedFile] = []
    size = 0
    for path in itertools.islice(paths, first, None):
        file = snapshot.files[path]
        message = cache_pb2.CachedFile(
            path=path, size=file.size, version=file.version or "", digests=dict(file.digests)
        )
        size += message.ByteSize()
        if page and size > _PAGE_BYTES:
            break
        page.append(message)
    end = first + len(page)
    return page, "" if end == len(paths) else str(end)
