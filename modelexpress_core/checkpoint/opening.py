"""From a storage and a URI to a checkpoint: find the files, read their headers, check that they fit together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import MappingProxyType

import attrs

from modelexpress_core.checkpoint.checkpoint import Checkpoint, CheckpointFile, TensorInfo
from modelexpress_core.checkpoint.header import LENGTH_BYTES, Header, header_length, parse_header
from modelexpress_core.checkpoint.index import INDEX_SUFFIX, MAX_INDEX_BYTES, SUFFIX, missing_shards, parse_index
from modelexpress_core.checkpoint.strict_json import shown
from modelexpress_core.contracts.storage import ObjectInfo, Storage
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    CheckpointError,
    NotFoundError,
    SourceChangedError,
    UnsupportedError,
)
from modelexpress_core.messages import byte_range, listed, printable
from modelexpress_core.resources import allocating, starting_threads
from modelexpress_core.uri import ModelURI

__all__ = ["open_files"]

#: Size of the first read of each file: most headers are shorter, so that one request is enough.
_FIRST_READ_BYTES = 128 << 10

#: A directory with more objects below it is no checkpoint.
_MAX_OBJECTS = 10_000

#: How a file begins that Git LFS left in place of a large one.
_LFS_POINTER = b"version https://git-lfs"

_PREFERRED_INDEX = "model.safetensors.index.json"
_PREFERRED_FILE = "model.safetensors"


def open_files(
    storage: Storage, uri: ModelURI, *, provider: str = "", ask_digests: bool = False, concurrency: int = 16
) -> Checkpoint:
    """The checkpoint at ``uri``: a directory with or without an index, an index, or one safetensors file.

    Reads headers only, in parallel.

    Args:
        storage: The storage that holds it.
        uri: The checkpoint.
        provider: Name of the storage plugin, for messages.
        ask_digests: Ask for digests that the listing of the storage leaves out, with one request for each file.
        concurrency: Requests under way at once.

    Raises:
        CheckpointError: The files are no valid checkpoint; the message names the invalid one.
        BackendError: The storage failed.
        ResourceError: There is too little memory, or no thread can be started.
    """
    with allocating(f"the headers of {uri}"), starting_threads(f"read the headers of {uri}"):
        return _Opening(storage, uri, provider, ask_digests, concurrency).checkpoint()


class _Opening:
    """The state of opening one checkpoint."""

    def __init__(self, storage: Storage, uri: ModelURI, provider: str, ask_digests: bool, concurrency: int) -> None:
        self._storage = storage
        self._uri = uri
        self._provider = provider
        self._ask_digests = ask_digests
        self._concurrency = concurrency
        self._lock = threading.Lock()
        self._bytes_read = 0

    def checkpoint(self) -> Checkpoint:
        objects, weight_map = self._files()
        asked = [info for info in objects.values() if self._ask_digests and not info.digests]
        workers = max(1, min(self._concurrency, len(objects) + len(asked)))
        pool = ThreadPoolExecutor(workers, thread_name_prefix="mx-header")
        try:
            answers = pool.map(self._digests, asked)
            reading = pool.map(self._read_header, objects.values())
            digests = {info.path: answer for info, answer in zip(asked, answers, strict=True) if answer}
            opened = [self._opened(name, *read, digests) for name, read in zip(objects, reading, strict=True)]
        finally:
            # No wait: after a failure the caller closes the storage, which ends the requests under way.
            pool.shutdown(wait=False, cancel_futures=True)
        tensors: dict[str, TensorInfo] = {}
        for file, header in opened:
            for entry in header.tensors:
                offset = file.header_bytes + entry.begin
                info = TensorInfo(entry.name, entry.dtype, entry.shape, file, offset, entry.end - entry.begin)
                other = tensors.setdefault(entry.name, info)
                if other is not info:
                    raise self._twice(info, other)
        if weight_map is not None:
            self._check_index(weight_map, tensors)
        return Checkpoint(
            self._uri,
            self._provider,
            tuple(file for file, _ in opened),
            MappingProxyType(tensors),  # not copied: it may have 100,000 entries
            self._bytes_read,
        )

    def _fault(self, message: str, *, file: str = "", cause: str | None = None, hint: str) -> CheckpointError:
        return CheckpointError(
            f"could not open {self._uri}: {message}", uri=str(self._uri), file=file, cause=cause, hint=hint
        )

    def _twice(self, info: TensorInfo, other: TensorInfo) -> CheckpointError:
        files = f"{printable(other.file.name)} and {printable(info.file.name)}"
        return self._fault(
            f"the tensor {shown(info.name)} is in two files: {files}",
            file=info.file.name,
            cause="files of two checkpoints, or of two formats of one, are in one directory",
            hint="remove the files of the other checkpoint, add an index, or give the URI of one file",
        )

    # -- which files --------------------------------------------------------------------------------------------------

    def _files(self) -> tuple[Mapping[str, ObjectInfo], Mapping[str, str] | None]:
        """The files by name, and the index if there is one."""
        if self._uri.path.endswith(SUFFIX):
            return {self._uri.name: self._storage.stat(self._uri.path)}, None
        if self._uri.path.endswith(INDEX_SUFFIX):
            directory, _, name = self._uri.path.rpartition("/")
            self._uri = self._uri.with_path(directory)
            return self._from_index(name, self._listed(name))
        listed = self._listed(_PREFERRED_INDEX, _PREFERRED_FILE)
        indexes = [name for name in listed if name.endswith(INDEX_SUFFIX) and "/" not in name]
        if _PREFERRED_INDEX in indexes:
            return self._from_index(_PREFERRED_INDEX, listed)
        if len(indexes) > 1:
            raise self._fault(
                f"{len(indexes)} indexes and none is called {_PREFERRED_INDEX}: {', '.join(sorted(indexes))}",
                hint="give the URI of one index",
            )
        if indexes:
            return self._from_index(indexes[0], listed)
        return self._without_index(listed), None

    def _listed(self, *likely: str) -> Mapping[str, ObjectInfo]:
        """Objects below the URI, by name relative to it. If listing is not allowed, ``likely`` names are tried."""
        prefix = self._uri.path
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        try:
            found = list(islice(self._storage.list(prefix), _MAX_OBJECTS + 1))
        except (AccessDeniedError, UnsupportedError) as denied:
            # Without the right to list, stores answer "denied" for objects that do not exist.
            absent = (NotFoundError, AccessDeniedError)
            try:
                probed = {name: self._probe(name, absent) for name in likely}
            except BackendError as exc:
                if exc.retryable:
                    raise
                # Answers to HEAD have no body: the listing's says more, for example that a token ran out.
                raise denied from exc
            present = {name: info for name, info in probed.items() if info is not None}
            if not present:
                raise
            return present
        if len(found) > _MAX_OBJECTS:
            raise self._fault(
                f"more than {_MAX_OBJECTS} objects are below it, too many for one checkpoint",
                hint="give the URI of the directory of one model",
            )
        return {info.path.removeprefix(start): info for info in found}

    def _probe(self, name: str, absent: tuple[type[BackendError], ...] = (NotFoundError,)) -> ObjectInfo | None:
        try:
            return self._storage.stat(self._uri.join(name).path)
        except absent:
            return None

    def _is_file(self) -> bool:
        """Whether the URI is that of an object. Only called after another error, so its own errors are ignored."""
        try:
            return bool(self._uri.path) and self._storage.stat(self._uri.path) is not None
        except BackendError:
            return False

    def _without_index(self, objects: Mapping[str, ObjectInfo]) -> Mapping[str, ObjectInfo]:
        names = sorted(name for name in objects if name.endswith(SUFFIX) and "/" not in name)
        missing = missing_shards(names)
        if missing:
            raise self._missing(missing, len(names))
        if names:
            return {name: objects[name] for name in names}
        if not objects:
            if self._is_file():
                raise self._fault(
                    f"it is a file, but not a {SUFFIX} file",
                    hint=f"give the URI of a directory, or of one {SUFFIX} file; convert other formats",
                )
            raise NotFoundError(
                "nothing is there",
                uri=str(self._uri),
                operation="list the files",
                provider=self._provider,
                cause="the path is misspelt, or nothing was uploaded yet",
                hint="check the URI",
            )
        below = sorted({name.rpartition("/")[0] for name in objects if name.endswith(SUFFIX)})
        others = sorted(name for name in objects if "/" not in name)
        if below:
            hint = f"add one to the URI: {listed(below)}"
            raise self._fault("no safetensors files in it, only in directories below it", hint=hint)
        raise self._fault(
            f"no {SUFFIX} files among the {len(objects)} files: {listed(others)}",
            cause="the weights are in another format, or were not uploaded",
            hint="convert them with the safetensors library, or check the URI",
        )

    def _from_index(
        self, name: str, objects: Mapping[str, ObjectInfo]
    ) -> tuple[Mapping[str, ObjectInfo], Mapping[str, str]]:
        info = objects.get(name) or self._storage.stat(self._uri.join(name).path)
        if info.size > MAX_INDEX_BYTES:
            raise self._fault(
                f"the index {printable(name)} has {info.size} bytes, more than {MAX_INDEX_BYTES}",
                file=name,
                hint="check that it is an index",
            )
        weight_map = parse_index(self._read(info, 0, info.size), file=name, uri=str(self._uri))
        found = {file: objects.get(file) or self._probe(file) for file in sorted(set(weight_map.values()))}
        files = {file: info for file, info in found.items() if info is not None}
        missing = sorted(found.keys() - files.keys())
        if missing:
            raise self._missing(missing, len(files))
        return files, weight_map

    def _missing(self, missing: Iterable[str], present: int) -> CheckpointError:
        missing = list(missing)
        return self._fault(
            f"{len(missing)} of {len(missing) + present} shards missing: {listed(missing)}",
            file=missing[0],
            cause="the copy of the model is incomplete",
            hint="copy the missing files",
        )

    def _check_index(self, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
        for tensor, file in weight_map.items():
            info = tensors.get(tensor)
            if info is not None and info.file.name == file:
                continue
            where = "no file has it" if info is None else f"it is in {printable(info.file.name)}"
            raise self._fault(
                f"the index has the tensor {shown(tensor)} in {printable(file)}, but {where}",
                file=file,
                cause="the index and the shards are of different checkpoints",
                hint="copy the index and all shards again from one source",
            )

    # -- one file -----------------------------------------------------------------------------------------------------

    def _digests(self, info: ObjectInfo) -> Mapping[str, str]:
        """Digests of the version that was listed."""
        asked = self._storage.stat(info.path)
        return asked.digests if asked.version == info.version else {}

    def _read_header(self, info: ObjectInfo) -> tuple[ObjectInfo, bytes]:
        """The object and its first bytes: at least the whole header, if its length is valid."""
        if not info.size:  # a broken link is listed like this
            info = self._storage.stat(info.path)
        start = self._read(info, 0, min(info.size, _FIRST_READ_BYTES))
        with contextlib.suppress(ValueError):
            end = LENGTH_BYTES + header_length(start, info.size)
            if len(start) < end:
                start += self._read(info, len(start), end - len(start))
        return info, start

    def _opened(
        self, name: str, info: ObjectInfo, start: bytes, digests: Mapping[str, Mapping[str, str]]
    ) -> tuple[CheckpointFile, Header]:
        info = attrs.evolve(info, digests=digests.get(info.path, info.digests))
        try:
            return self._parsed(name, info, start)
        except CheckpointError:
            # Bytes that were damaged in transfer usually arrive intact the next time.
            _, again = self._read_header(info)
            if again == start:
                raise
            return self._parsed(name, info, again)

    def _parsed(self, name: str, info: ObjectInfo, start: bytes) -> tuple[CheckpointFile, Header]:
        try:
            end = LENGTH_BYTES + header_length(start, info.size)
        except ValueError as exc:
            if start.startswith(_LFS_POINTER):
                raise self._fault(
                    f"{printable(name)} is no safetensors file but a Git LFS pointer to one",
                    file=name,
                    cause="the repository was cloned without its large files",
                    hint="run git lfs pull in the repository",
                ) from exc
            raise self._fault(
                f"{printable(name)} is no valid safetensors file: {exc}",
                file=name,
                cause="the file is cut short, still being written, or in another format",
                hint="compare its size with the original and copy it again",
            ) from exc
        header = parse_header(start[LENGTH_BYTES:end], info.size - end, file=name, uri=str(self._uri))
        file = CheckpointFile(
            info.path,
            name,
            info.size,
            info.version,
            end,
            info.digests,
            header.metadata,
            start[:end] if info.digests else b"",
            info.origin,
        )
        return file, header

    def _read(self, info: ObjectInfo, offset: int, length: int) -> bytes:
        content = bytearray(length)
        done = 0
        while done < length:
            count = self._storage.read_into(info.path, offset + done, memoryview(content)[done:], version=info.version)
            if count == 0:
                raise SourceChangedError(
                    f"it ends at byte {offset + done}, but had {info.size} bytes when it was listed",
                    uri=str(self._uri.with_path(info.path)),
                    operation=f"read {byte_range(offset, length)}",
                    provider=self._provider,
                    cause="the file is being written",
                    hint="start again when it is complete",
                )
            done += count
        with self._lock:
            self._bytes_read += length
        return bytes(content)
