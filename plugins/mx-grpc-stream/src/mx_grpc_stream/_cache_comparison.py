"""Compares the files of one version of a model with the chunk manifest of the server, as their bytes come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

from modelexpress_core.checkpoint.chunks import FileChunks
from modelexpress_core.checkpoint.comparison import FileComparison
from modelexpress_core.checkpoint.header import LENGTH_BYTES, MAX_HEADER_BYTES, header_length, parse_header
from modelexpress_core.checkpoint.manifest import TABLES, Manifest, ManifestFile
from modelexpress_core.errors import BackendError, CheckpointError, IntegrityError
from modelexpress_core.sources.cache_client import CacheClient, CachedModel, SentPart
from mx_grpc_stream._errors import damaged_in_cache, damaged_on_the_way, other_manifest

__all__ = ["ModelComparison"]

_TABLE = "crc64nvme"
_SAFETENSORS = ".safetensors"

#: Bytes that are read for a header at first: most headers are shorter.
_FIRST_READ_BYTES = 128 << 10

#: Parts that wait until the server compares them.
_MAX_WAITING = 16_384

#: Reads bytes of a file into memory: ``read(path, offset, view)``.
ReadBytes = Callable[[str, int, memoryview], None]


class ModelComparison:
    """The comparison of one version of a model. Thread-safe.

    Args:
        client: Calls the server.
        read: Reads bytes of a file.

    Attributes:
        by_server_bytes: Bytes that the server compared.
    """

    def __init__(self, client: CacheClient, read: ReadBytes) -> None:
        self._client = client
        self._read = read
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._files: dict[str, tuple[FileComparison, int]] = {}  # and the length of the header
        self._manifest: tuple[str, Mapping[str, ManifestFile]] | None = None
        self._runs: list[SentPart] = []
        self.by_server_bytes = 0

    @property
    def here_bytes(self) -> int:
        """Bytes that were compared here."""
        with self._lock:
            return sum(file.compared_bytes for file, _ in self._files.values())

    def known(self, path: str) -> FileComparison | None:
        """The comparison of a file; None as long as its chunks are not known."""
        known = self._files.get(path)
        return None if known is None else known[0]

    def of_file(self, model: CachedModel, path: str, start: memoryview | None = None) -> FileComparison:
        """The comparison of a file, whose header is read if necessary.

        Args:
            model: The model.
            path: The file.
            start: Its first bytes, if they were read already.

        Raises:
            IntegrityError: The header is damaged.
            BackendError: The header, or the manifest, cannot be read.
        """
        with self._lock:
            lock = self._locks.setdefault(path, threading.Lock())
        with lock:
            known = self.known(path)
            if known is not None:
                return known
            size = model.files[path][0]
            listed = self._listed(model).get(path) if model.complete else None
            chunks, header = self._chunks(path, size, listed, start)
            file = FileComparison(chunks)
            if listed is not None:
                self._set_rows(model, listed, file, len(header))
                # Damage of the header would move all chunks. It is read again then: nothing was kept of it.
                reading = file.read_from(0)
                reading.add(memoryview(header))
                if reading.different:
                    raise other_manifest(f"the header of {path}", retryable=True)
                file.compared_bytes = 0  # the same bytes are compared, and counted, where they are read
            with self._lock:
                self._files[path] = (file, len(header))
            return file

    def _chunks(
        self, path: str, size: int, listed: ManifestFile | None, start: memoryview | None
    ) -> tuple[FileChunks, bytes]:
        """The chunks of a file, and its header."""
        if not path.endswith(_SAFETENSORS) or (listed is not None and not listed.header_bytes):
            return FileChunks.of_file(size), b""
        begin = self._first_bytes(path, min(size, _FIRST_READ_BYTES), start)
        try:
            end = LENGTH_BYTES + header_length(begin, size)
            if end > LENGTH_BYTES + MAX_HEADER_BYTES:
                return FileChunks.of_file(size), b""
            header = self._first_bytes(path, end, memoryview(begin))[:end]
            tensors = parse_header(header[LENGTH_BYTES:], size - end, file=path).tensors
        except (CheckpointError, ValueError):  # for the server too it is a file like any other
            return FileChunks.of_file(size), b""
        return FileChunks.of_file(size, end, tensors), header

    def _first_bytes(self, path: str, length: int, start: memoryview | None) -> bytes:
        content = bytearray(length)
        done = 0 if start is None else min(len(start), length)
        if start is not None:
            content[:done] = start[:done]
        if done < length:
            self._read(path, done, memoryview(content)[done:])
        return bytes(content)

    # -- the manifest --------------------------------------------------------------------------------------------------

    def _listed(self, model: CachedModel) -> Mapping[str, ManifestFile]:
        """The files of the manifest of a complete model."""
        with self._lock:
            known = self._manifest
        if known is not None and known[0] == model.manifest_digest:
            return known[1]
        text = self._client.manifest_index(model)
        try:
            manifest = Manifest.parse(text)
        except CheckpointError as exc:
            raise BackendError(
                exc.message, operation="read the chunk manifest", cause=exc.cause, hint=exc.hint
            ) from exc
        if model.manifest_digest and manifest.digest != model.manifest_digest:
            raise other_manifest("its index")
        files = {file.path: file for file in manifest.files}
        if any(path not in files or files[path].size != size for path, (size, _) in model.files.items()):
            raise other_manifest("its list of files")
        with self._lock:
            self._manifest = (model.manifest_digest, files)
        return files

    def _set_rows(
        self, model: CachedModel, listed: ManifestFile, file: FileComparison, header_bytes: int
    ) -> Sequence[tuple[int, int]]:
        if (file.chunks.count, header_bytes) != (listed.chunks, listed.header_bytes):
            raise other_manifest(f"the chunks of {listed.path}", retryable=True)
        width = TABLES[_TABLE]
        first, end = listed.first * width, (listed.first + listed.chunks) * width
        return file.set_rows(self._client.manifest_part(model, _TABLE, first, end))

    # -- what is left --------------------------------------------------------------------------------------------------

    def explain_damage(self, model: CachedModel, path: str, start: int, content: memoryview) -> IntegrityError:
        """The error for bytes that differ again after they were read twice: the server says whose copy is wrong."""
        from awscrt import checksums

        part = SentPart(path, start, len(content), checksums.crc64nvme(content, 0))
        try:
            _, damaged = self._client.compare(model, [part])
        except BackendError:
            damaged = ()
        return damaged_in_cache(path, start) if damaged else damaged_on_the_way(path, start)

    def add_runs(self, path: str, offset: int, run_bytes: int, stride_bytes: int, content: memoryview) -> None:
        """Runs arrived, which the server compares later: they make up no chunks."""
        from awscrt import checksums

        crc = checksums.crc64nvme(content, 0)
        with self._lock:
            self._runs.append(SentPart(path, offset, run_bytes, crc, stride_bytes, len(content) // run_bytes))

    def flush(self, model: CachedModel, path: str) -> None:
        """Have the server compare what waits, once it is much, so that memory is bounded.

        Raises:
            IntegrityError: Something differs.
            BackendError: The server cannot be asked.
        """
        file = self.known(path)
        if model.complete and (len(self._runs) > _MAX_WAITING or (file and file.pending_parts > _MAX_WAITING)):
            self._compare_by_server(model, [path])

    def finish(self, model: CachedModel) -> None:
        """Compare everything that was not compared yet, of a complete model.

        Raises:
            IntegrityError: Bytes differ.
            BackendError: The server cannot be asked.
        """
        with self._lock:
            files = dict(self._files)
        listed = self._listed(model) if files else {}
        for path, (file, header_bytes) in files.items():
            if not file.knows_rows:
                different = self._set_rows(model, listed[path], file, header_bytes)
                if different:
                    raise damaged_on_the_way(path, different[0][0])
        self._compare_by_server(model, files)

    def _compare_by_server(self, model: CachedModel, paths: Iterable[str]) -> None:
        with self._lock:
            parts, self._runs = self._runs, []
        for path in paths:
            file = self.known(path)
            if file is not None:
                parts += [SentPart(path, part.offset, part.length, part.crc) for part in file.take_parts()]
        if not parts:
            return
        different, damaged = self._client.compare(model, parts)
        if damaged:
            raise damaged_in_cache(parts[damaged[0]].path, parts[damaged[0]].offset)
        if different:
            raise damaged_on_the_way(parts[different[0]].path, parts[different[0]].offset)
        with self._lock:
            self.by_server_bytes += sum(part.nbytes for part in parts)
