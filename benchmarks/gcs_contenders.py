"""The clients of GCS that are compared on one checkpoint (see ``benchmarks.contenders``)."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from benchmarks.checkpoints import pieces
from benchmarks.contenders import IntoPlace, in_threads, receive

__all__ = ["GoogleCloudStorage", "Obstore", "RawSockets"]

#: Size of the raw clients' requests.
_PIECE_BYTES = 8 << 20


class _Bucket(IntoPlace):
    """Reads objects below ``prefix`` in one bucket of the emulator in STORAGE_EMULATOR_HOST."""

    def __init__(self, directory: str, bucket: str, prefix: str) -> None:
        super().__init__(directory)
        self.bucket = bucket
        self.names = {section.name: f"{prefix}/{section.name}" for section in self.sections}

    def run(self, *, connections: int) -> Mapping[str, Any] | None:  # type: ignore[override]
        in_threads(connections, self.work, list(pieces(self.sections, _PIECE_BYTES)))
        return None

    def work(self, take: Callable[[], tuple[Any, ...] | None]) -> None:
        """Read pieces until there are none."""
        raise NotImplementedError  # abstract: each client sends its requests in its own way


class RawSockets(_Bucket):
    """HTTP over plain sockets: the limit."""

    def work(self, take: Callable[[], tuple[Any, ...] | None]) -> None:
        server = urlsplit(os.environ["STORAGE_EMULATOR_HOST"])
        with socket.create_connection((server.hostname, server.port)) as connection:
            while (piece := take()) is not None:
                name, offset, length, there = piece
                path = f"/download/storage/v1/b/{self.bucket}/o/{quote(self.names[name], safe='')}?alt=media"
                request = f"GET {path} HTTP/1.1\r\nHost: {server.netloc}\r\n"
                connection.sendall(f"{request}Range: bytes={offset}-{offset + length - 1}\r\n\r\n".encode())
                receive(connection, self.destination.memory[there : there + length])


class _IntoMemory:
    """A file that writes into memory, as google-cloud-storage wants one."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._done = 0

    def write(self, content: bytes) -> int:
        self._memory[self._done : self._done + len(content)] = content
        self._done += len(content)
        return len(content)

    def tell(self) -> int:
        return self._done


class GoogleCloudStorage(_Bucket):
    """google-cloud-storage; its pieces are copied into place. Its checksums are off: they need whole objects."""

    def __init__(self, directory: str, bucket: str, prefix: str) -> None:
        super().__init__(directory, bucket, prefix)
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import storage
        from requests.adapters import HTTPAdapter

        client = storage.Client(project="test", credentials=AnonymousCredentials())
        client._http.mount("http://", HTTPAdapter(pool_maxsize=64))  # noqa: SLF001 - as its documentation advises
        self.objects = client.bucket(bucket)

    def work(self, take: Callable[[], tuple[Any, ...] | None]) -> None:
        while (piece := take()) is not None:
            name, offset, length, there = piece
            blob = self.objects.blob(self.names[name])
            into: Any = _IntoMemory(self.destination.memory[there : there + length])
            blob.download_to_file(into, start=offset, end=offset + length - 1, raw_download=True, checksum=None)


class Obstore(_Bucket):
    """obstore (the Rust crate object_store); its buffers are copied into place."""

    def __init__(self, directory: str, bucket: str, prefix: str) -> None:
        super().__init__(directory, bucket, prefix)
        from obstore.store import GCSStore

        base = os.environ["STORAGE_EMULATOR_HOST"]
        key = {"gcs_base_url": base, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        self.store = GCSStore(bucket, service_account_key=json.dumps(key), client_options={"allow_http": True})

    def work(self, take: Callable[[], tuple[Any, ...] | None]) -> None:
        import obstore

        while (piece := take()) is not None:
            name, offset, length, there = piece
            content = obstore.get_range(self.store, self.names[name], start=offset, length=length)
            self.destination.memory[there : there + length] = memoryview(content)
