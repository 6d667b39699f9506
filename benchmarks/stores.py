"""The stores behind which benchmarks put faults: a server each, and how loads reach it through a proxy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from attrs import frozen

from devtools.fake_gcs import FakeGcs
from devtools.seaweedfs import SeaweedFS

__all__ = ["STORES", "Store"]

_BUCKET = "models"


@frozen
class Store:
    """A store on this machine.

    Attributes:
        name: As tables show it.
        uri: Of its bucket.
        port: Of its server, on 127.0.0.1.
        environ: Variables for access to it.
        endpoint_variable: The variable with its URL.
        upload: Stores the files of a directory below a prefix, with digests; returns the URI.
        put: Stores an object, with options of the store's own.
    """

    name: str
    uri: str
    port: int
    environ: Mapping[str, str]
    endpoint_variable: str
    upload: Callable[[Path, str], str]
    put: Callable[..., object]

    def environ_at(self, port: int) -> dict[str, str]:
        """Variables for access to it through a proxy."""
        return {**self.environ, self.endpoint_variable: f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def _s3() -> Iterator[Store]:
    with SeaweedFS(_BUCKET) as server, contextlib.closing(server.client()) as client:

        def put(key: str, content: bytes, **options: str) -> object:
            return client.put_object(Bucket=_BUCKET, Key=key, Body=content, **options)  # type: ignore[arg-type]

        yield Store(
            name="S3",
            uri=f"s3://{_BUCKET}",
            port=int(urlsplit(server.endpoint).port or 0),
            environ=server.environ(),
            endpoint_variable="AWS_ENDPOINT_URL",
            upload=lambda directory, prefix: server.upload(directory, _BUCKET, prefix, checksum="CRC64NVME"),
            put=put,
        )


@contextlib.contextmanager
def _gcs() -> Iterator[Store]:
    with FakeGcs(_BUCKET) as server:
        yield Store(
            name="GCS",
            uri=f"gs://{_BUCKET}",
            port=server.port,
            environ=server.environ(),
            endpoint_variable="STORAGE_EMULATOR_HOST",
            upload=lambda directory, prefix: server.upload(directory, _BUCKET, prefix),
            put=server.put,
        )


#: Each starts the server of one store for a ``with`` block.
STORES: Mapping[str, Callable[[], contextlib.AbstractContextManager[Store]]] = {"S3": _s3, "GCS": _gcs}
