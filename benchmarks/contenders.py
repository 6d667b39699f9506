"""The loaders that are compared on one checkpoint: ModelExpress, other libraries, and the limits of the machine.

Each runs in a separate process (see ``benchmarks.workers``), and imports its library there.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import queue
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from benchmarks.checkpoints import Destination, digest_of, pieces, sections

if TYPE_CHECKING:
    import torch

__all__ = [
    "BlobObstore",
    "BlobSdk",
    "BlobSockets",
    "Boto3",
    "Contender",
    "FastSafetensors",
    "IntoPlace",
    "ModelExpressInto",
    "ModelExpressState",
    "Obstore",
    "Preadv",
    "RawSockets",
    "RunaiStreamer",
    "S3TorchConnector",
    "SafetensorsClone",
    "Tensorizer",
    "in_threads",
    "receive",
]

#: Size of the raw clients' requests, unless a setting overrides it.
_PIECE_BYTES = 8 << 20


class Contender(ABC):
    """Loads one checkpoint repeatedly.

    Attributes:
        tensors: The tensors of the last run, by name.
    """

    tensors: Mapping[str, torch.Tensor]

    @abstractmethod
    def run(self, **setting: Any) -> Mapping[str, Any] | None:  # noqa: ANN401 - JSON
        """Load once, which is timed; the result is stored with the figures."""

    def digest(self) -> str:
        """Return the digest of the loaded tensors."""
        return digest_of(self.tensors)

    @abstractmethod
    def release(self) -> None:
        """Free the loaded tensors, unless the next run loads into them."""


class IntoPlace(Contender):
    """Loads into touched memory."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.sections = sections(self.directory)
        self.destination = Destination(self.directory)
        self.tensors = self.destination.tensors

    def release(self) -> None:
        """Do nothing: the next run loads into the same memory."""


class _Fresh(Contender):
    """Loads into memory that it allocates."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.files = [str(file) for file in sorted(self.directory.glob("*.safetensors"))]
        self.tensors = {}

    def release(self) -> None:
        self.tensors = {}
        ctypes.CDLL(None).malloc_trim(0)  # otherwise the next run may get memory that is not fresh


# -- ModelExpress -----------------------------------------------------------------------------------------------------


class ModelExpressInto(IntoPlace):
    """``load_into``."""

    def __init__(self, directory: str, uri: str) -> None:
        super().__init__(directory)
        self.uri = uri

    def run(self, **_setting: Any) -> Mapping[str, Any]:  # noqa: ANN401 - as above
        import modelexpress_core as mx

        report = mx.load_into(self.tensors, self.uri)
        return {
            "phase_seconds": dict(report.phase_seconds),
            "requests": report.requests,
            "retries": report.retries,
            "concurrency": report.concurrency,
            "verified": dict(report.verified),
        }


class ModelExpressState(_Fresh):
    """``load_state_dict``."""

    def __init__(self, directory: str, uri: str) -> None:
        super().__init__(directory)
        self.uri = uri

    def run(self, **_setting: Any) -> None:  # noqa: ANN401 - as above
        import modelexpress_core as mx

        self.tensors = mx.load_state_dict(self.uri)


# -- from disk --------------------------------------------------------------------------------------------------------


def in_threads(count: int, work: Callable[[Callable[[], tuple[Any, ...] | None]], None], tasks: Sequence[Any]) -> None:
    """Run ``work`` in ``count`` threads, each with a function that returns the next of ``tasks``, None at the end."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for task in itertools.chain(tasks, itertools.repeat(None, count)):
        waiting.put(task)
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work(waiting.get)
        except BaseException as exc:  # noqa: BLE001 - raised below
            errors.append(exc)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Preadv(IntoPlace):
    """Only ``preadv`` in threads, on open files: the limit."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.descriptors = {
            section.name: os.open(self.directory / section.name, os.O_RDONLY) for section in self.sections
        }

    def run(self, *, threads: int, mib: int) -> None:  # type: ignore[override]
        memory = self.destination.memory

        def work(take: Callable[[], tuple[Any, ...] | None]) -> None:
            while (piece := take()) is not None:
                name, offset, length, there = piece
                while length:
                    count = os.preadv(self.descriptors[name], [memory[there : there + length]], offset)
                    offset, there, length = offset + count, there + count, length - count

        in_threads(threads, work, list(pieces(self.sections, mib << 20)))


class SafetensorsClone(_Fresh):
    """``load_file``, which maps the file, and a copy of each tensor into separate memory."""

    def run(self, **_setting: Any) -> None:  # noqa: ANN401 - as above
        from safetensors.torch import load_file

        self.tensors = {name: tensor.clone() for file in self.files for name, tensor in load_file(file).items()}


class FastSafetensors(_Fresh):
    """fastsafetensors, on the CPU."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        import fastsafetensors  # noqa: F401 - fails here if it is not installed
        import torch

        self.device = torch.device("cpu")

    def run(self, **_setting: Any) -> None:  # noqa: ANN401 - as above
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        loader = SafeTensorsFileLoader(SingleGroup(), self.device, nogds=True)
        loader.add_filenames({0: self.files})
        self.buffer = loader.copy_files_to_device()
        self.tensors = {name: self.buffer.get_tensor(name) for name in loader.get_keys()}
        loader.close()

    def release(self) -> None:
        self.tensors = {}
        self.buffer.close()
        super().release()


class Tensorizer(_Fresh):
    """tensorizer, from a file in its format with the same tensors."""

    def __init__(self, directory: str, copy: str) -> None:
        super().__init__(directory)
        from safetensors.torch import load_file
        from tensorizer import TensorSerializer

        self.copy = copy
        serializer = TensorSerializer(copy)
        serializer.write_state_dict({name: t for file in self.files for name, t in load_file(file).items()})
        serializer.close()

    def run(self, *, readers: int) -> None:  # type: ignore[override]
        from tensorizer import TensorDeserializer

        with TensorDeserializer(self.copy, device="cpu", num_readers=readers) as deserializer:
            self.tensors = {name: deserializer[name].data for name in deserializer}


class RunaiStreamer(_Fresh):
    """runai-model-streamer, from disk or S3 (by ``paths``), with tensors that remain valid."""

    def __init__(self, directory: str, paths: Sequence[str] | None = None) -> None:
        super().__init__(directory)
        import runai_model_streamer  # noqa: F401 - fails here if it is not installed

        self.paths = list(paths) if paths is not None else self.files

    def run(self, **_setting: Any) -> None:  # noqa: ANN401 - as above
        from runai_model_streamer import SafetensorsStreamer

        with SafetensorsStreamer() as streamer:
            streamer.stream_files(self.paths)
            self.tensors = dict(streamer.get_tensors())


# -- from S3 ----------------------------------------------------------------------------------------------------------


class _Bucket(IntoPlace):
    """Reads objects below ``prefix`` in one bucket, from the server in the AWS variables."""

    def __init__(self, directory: str, bucket: str, prefix: str) -> None:
        super().__init__(directory)
        self.bucket = bucket
        self.keys = {section.name: f"{prefix}/{section.name}" for section in self.sections}

    def client(self, connections: int) -> Any:  # noqa: ANN401 - boto3 makes its classes at run time
        import boto3
        from botocore.config import Config

        config = Config(
            s3={"addressing_style": "path"},
            max_pool_connections=connections,
            response_checksum_validation="when_required",
        )
        return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], config=config)


class RawSockets(_Bucket):
    """HTTP over plain sockets with presigned URLs: the limit."""

    def __init__(self, directory: str, bucket: str, prefix: str) -> None:
        super().__init__(directory, bucket, prefix)
        client = self.client(1)
        self.sockets = _Sockets(
            {
                name: client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
                for name, key in self.keys.items()
            }
        )

    def run(self, *, connections: int) -> None:  # type: ignore[override]
        self.sockets.read(self, connections)


class _Sockets:
    """HTTP over plain sockets.

    Args:
        urls: The URL of each section, with all that proves that it may be read.
        headers: Lines of further headers.
    """

    def __init__(self, urls: Mapping[str, str], headers: str = "") -> None:
        self.requests = {}
        for name, text in urls.items():
            url = urlsplit(text)
            self.address = (url.hostname, url.port)
            self.requests[name] = f"GET {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\n{headers}"

    def read(self, contender: IntoPlace, connections: int) -> None:
        """Read all sections into place."""
        memory = contender.destination.memory

        def work(take: Callable[[], tuple[Any, ...] | None]) -> None:
            with socket.create_connection(self.address) as connection:
                while (piece := take()) is not None:
                    name, offset, length, there = piece
                    request = f"{self.requests[name]}Range: bytes={offset}-{offset + length - 1}\r\n\r\n"
                    connection.sendall(request.encode())
                    receive(connection, memory[there : there + length])

        in_threads(connections, work, list(pieces(contender.sections, _PIECE_BYTES)))


def receive(connection: socket.socket, view: memoryview) -> None:
    """Receive the body of one answer into ``view``; only bytes that arrive with the header are copied."""
    head = b""
    while b"\r\n\r\n" not in head:
        part = connection.recv(2048)
        if not part:
            message = "the server closed the connection"
            raise ConnectionError(message)
        head += part
    head, _, begun = head.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 206") or f"content-length: {len(view)}".encode() not in head.lower():
        message = f"the server answered {head[:200]!r}"
        raise ConnectionError(message)
    view[: len(begun)] = begun
    done = len(begun)
    while done < len(view):
        count = connection.recv_into(view[done:], 0, socket.MSG_WAITALL)
        if not count:
            message = "the server closed the connection"
            raise ConnectionError(message)
        done += count


class Boto3(_Bucket):
    """boto3, one range per request; the body is read into place below botocore's copying layers."""

    def __init__(self, directory: str, bucket: str, prefix: str) -> None:
        super().__init__(directory, bucket, prefix)
        self.s3 = self.client(64)

    def run(self, *, connections: int) -> None:  # type: ignore[override]
        memory = self.destination.memory

        def work(take: Callable[[], tuple[Any, ...] | None]) -> None:
            while (piece := take()) is not None:
                name, offset, length, there = piece
                byte_range = f"bytes={offset}-{offset + length - 1}"
                body = self.s3.get_object(Bucket=self.bucket, Key=self.keys[name], Range=byte_range)["Body"]
                raw = body._raw_stream  # noqa: SLF001 - botocore has no public way that does not copy
                done = 0
                while done < length:
                    count = raw._fp.readinto(memory[there + done : there + length])  # noqa: SLF001 - nor has urllib3
                    if not count:
                        message = "the stream ended early"
                        raise ConnectionError(message)
                    done += count
                raw.release_conn()

        in_threads(connections, work, list(pieces(self.sections, _PIECE_BYTES)))


class Obstore(_Bucket):
    """obstore (the Rust crate object_store); its buffers are copied into place."""

    def __init__(self, directory: str, bucket: str, prefix: str) -> None:
        super().__init__(directory, bucket, prefix)
        from obstore.store import S3Store

        self.store = S3Store(
            bucket,
            endpoint=os.environ["AWS_ENDPOINT_URL"],
            access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
            secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
            region=os.environ["AWS_REGION"],
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def run(self, *, connections: int) -> None:  # type: ignore[override]
        import obstore

        memory = self.destination.memory

        def work(take: Callable[[], tuple[Any, ...] | None]) -> None:
            while (piece := take()) is not None:
                name, offset, length, there = piece
                content = obstore.get_range(self.store, self.keys[name], start=offset, length=length)
                memory[there : there + length] = memoryview(content)

        in_threads(connections, work, list(pieces(self.sections, _PIECE_BYTES)))


class S3TorchConnector(_Bucket):
    """s3torchconnector, one sequential reader per section, read into place."""

    def __init__(self, directory: str, bucket: str, prefix: str) -> None:
        super().__init__(directory, bucket, prefix)
        from s3torchconnector import S3ClientConfig
        from s3torchconnector._s3client import S3Client

        self.s3 = S3Client(
            region=os.environ["AWS_REGION"],
            endpoint=os.environ["AWS_ENDPOINT_URL"],
            s3client_config=S3ClientConfig(force_path_style=True),
        )

    def run(self, *, connections: int) -> None:  # type: ignore[override]
        memory = self.destination.memory

        def work(take: Callable[[], tuple[Any, ...] | None]) -> None:
            while (piece := take()) is not None:
                name, offset, length, there = piece
                reader = self.s3.get_object(self.bucket, self.keys[name])
                reader.seek(offset)
                done = 0
                while done < length:
                    count = reader.readinto(memory[there + done : there + length])
                    if not count:
                        message = "the stream ended early"
                        raise ConnectionError(message)
                    done += count

        in_threads(connections, work, list(pieces(self.sections, 1 << 40)))


# -- from Azure -------------------------------------------------------------------------------------------------------


class _Blobs(IntoPlace):
    """Reads blobs below ``prefix`` in one container, from the server in the AZURE variables."""

    def __init__(self, directory: str, container: str, prefix: str) -> None:
        super().__init__(directory)
        self.container = container
        self.names = {section.name: f"{prefix}/{section.name}" for section in self.sections}


class BlobSockets(_Blobs):
    """HTTP over plain sockets with a SAS token: the limit."""

    def __init__(self, directory: str, container: str, prefix: str, sas: str) -> None:
        super().__init__(directory, container, prefix)
        start = f"{os.environ['AZURE_STORAGE_ENDPOINT']}/{container}"
        urls = {name: f"{start}/{blob}?{sas}" for name, blob in self.names.items()}
        self.sockets = _Sockets(urls, "x-ms-version: 2021-08-06\r\n")

    def run(self, *, connections: int) -> None:  # type: ignore[override]
        self.sockets.read(self, connections)


class BlobSdk(_Blobs):
    """azure-storage-blob, one range per request; its buffers are copied into place."""

    def __init__(self, directory: str, container: str, prefix: str) -> None:
        super().__init__(directory, container, prefix)
        from azure.storage.blob import BlobServiceClient

        account = {
            "account_name": os.environ["AZURE_STORAGE_ACCOUNT_NAME"],
            "account_key": os.environ["AZURE_STORAGE_ACCOUNT_KEY"],
        }
        service = BlobServiceClient(
            os.environ["AZURE_STORAGE_ENDPOINT"], credential=account, max_single_get_size=_PIECE_BYTES
        )
        self.blobs = {name: service.get_blob_client(container, blob) for name, blob in self.names.items()}

    def run(self, *, connections: int) -> None:  # type: ignore[override]
        memory = self.destination.memory

        def work(take: Callable[[], tuple[Any, ...] | None]) -> None:
            while (piece := take()) is not None:
                name, offset, length, there = piece
                memory[there : there + length] = self.blobs[name].download_blob(offset, length).readall()

        in_threads(connections, work, list(pieces(self.sections, _PIECE_BYTES)))


class BlobObstore(_Blobs):
    """obstore; its buffers are copied into place."""

    def __init__(self, directory: str, container: str, prefix: str) -> None:
        super().__init__(directory, container, prefix)
        from obstore.store import AzureStore

        self.store = AzureStore(
            container,
            endpoint=os.environ["AZURE_STORAGE_ENDPOINT"],
            account_name=os.environ["AZURE_STORAGE_ACCOUNT_NAME"],
            account_key=os.environ["AZURE_STORAGE_ACCOUNT_KEY"],
            client_options={"allow_http": True},
        )

    def run(self, *, connections: int) -> None:  # type: ignore[override]
        import obstore

        memory = self.destination.memory

        def work(take: Callable[[], tuple[Any, ...] | None]) -> None:
            while (piece := take()) is not None:
                name, offset, length, there = piece
                content = obstore.get_range(self.store, self.names[name], start=offset, length=length)
                memory[there : there + length] = memoryview(content)

        in_threads(connections, work, list(pieces(self.sections, _PIECE_BYTES)))
