"""What benchmarks of stores share: a server each, behind which they put faults, and what loads are to reach."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from attrs import frozen

from benchmarks.measuring import Target
from benchmarks.workers import Entry
from devtools.azurite import Azurite
from devtools.fake_gcs import FakeGcs
from devtools.seaweedfs import SeaweedFS

__all__ = ["RUNAI", "STORES", "Store", "fastest", "load_targets"]

#: The workers of runai-model-streamer begin with this.
RUNAI = "runai-model-streamer"

_BUCKET = "models"


@frozen
class Store:
    """A store on this machine.

    Attributes:
        name: As tables show it.
        uri: Of its bucket.
        port: Of its server, on 127.0.0.1.
        environ: Variables for access to it.
        endpoint_variable: The variable with its URL, which is in ``environ``.
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
        there = urlsplit(self.environ[self.endpoint_variable])._replace(netloc=f"127.0.0.1:{port}")
        return {**self.environ, self.endpoint_variable: there.geturl()}


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


@contextlib.contextmanager
def _azure() -> Iterator[Store]:
    with Azurite(_BUCKET) as server, contextlib.closing(server.client()) as client:

        def put(name: str, content: bytes) -> object:
            return client.get_blob_client(_BUCKET, name).upload_blob(content, overwrite=True)

        yield Store(
            name="Azure",
            uri=f"az://{_BUCKET}",
            port=server.port,
            environ=server.environ(),
            endpoint_variable="AZURE_STORAGE_ENDPOINT",
            upload=lambda directory, prefix: server.upload(directory, _BUCKET, prefix),
            put=put,
        )


#: Each starts the server of one store for a ``with`` block.
STORES: Mapping[str, Callable[[], contextlib.AbstractContextManager[Store]]] = {
    "S3": _s3,
    "GCS": _gcs,
    "Azure": _azure,
}


def fastest(measured: Sequence[Entry], workers: Collection[str]) -> float | None:
    """Seconds of the fastest of ``workers``; None if none was measured."""
    return min((entry.seconds for entry in measured if entry.worker in workers), default=None)


def load_targets(limit: float | None, measured: Sequence[Entry], *, times_runai: float) -> list[Target]:
    """What loads of a store are to reach.

    Args:
        limit: Seconds of the fastest raw client; None if none was measured.
        measured: Has the workers ``into``, ``into unverified`` and ``state``, and those of runai-model-streamer.
        times_runai: How many times as fast as runai-model-streamer they are to be.
    """
    seconds = {entry.worker: entry.seconds for entry in measured if not entry.setting}
    runai = min((value for name, value in seconds.items() if name.startswith(RUNAI)), default=None)

    def ratio(above: float | None, name: str) -> float | None:
        return above / seconds[name] if above is not None and name in seconds else None

    return [
        Target("load_into touched memory, verified: goodput over the best raw client's", ratio(limit, "into"), 0.9),
        Target("load_into touched memory, not verified: the same", ratio(limit, "into unverified"), 0.9),
        Target(
            "load_into touched memory, verified: times as fast as the best runai-model-streamer",
            ratio(runai, "into"),
            times_runai,
        ),
        Target("load_state_dict into fresh memory, verified: the same", ratio(runai, "state"), times_runai),
    ]
