"""Reading tensors of another worker over gRPC, frame by frame into place."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch

from modelexpress_core.contracts.transport import PeerAccess, TensorRead, TensorTable
from modelexpress_core.errors import BackendError
from modelexpress_core.settings import from_env
from modelexpress_core.transport.tensor_bytes import host_memory
from modelexpress_core.uri import ModelURI
from modelexpress_core.wire.client import Client, Security
from modelexpress_core.wire.proto.modelexpress import peer_pb2
from modelexpress_core.wire.streams import ResponseStream
from mx_grpc_stream._errors import damaged, ended_early, of_stream, session_closed
from mx_grpc_stream._frames import opened
from mx_grpc_stream._serving import TENSORS, StreamedTensors
from mx_grpc_stream.settings import GrpcStreamSettings

__all__ = ["GrpcSession", "GrpcTransport", "open_grpc"]


class _TensorClient(Client):
    """Calls to the tensor service of one worker."""

    def __init__(self, url: str, security: Security, settings: GrpcStreamSettings) -> None:
        # A worker asks for the lease alone: no token goes to it.
        without_token = attrs.evolve(security, token=None)
        super().__init__(
            url,
            (TENSORS,),
            deadline_seconds=settings.read_timeout_seconds,
            security=without_token,
            retries=False,
        )

    def frames(self, request: peer_pb2.ReadTensorsRequest) -> ResponseStream[bytes]:
        """The frames of one call."""
        return self._stream(TENSORS, "ReadTensors", request)


class GrpcSession:
    """Reads the tensors of one worker.

    Args:
        client: The connection, which ``close`` closes.
        access: The lease of this reader, and whether frames need checksums.
        uri: Redacted URI of the worker, for messages.
    """

    def __init__(self, client: _TensorClient, access: PeerAccess, uri: str) -> None:
        self._client = client
        self._access = access
        self._uri = uri
        self._lock = threading.Lock()
        self._streams: set[ResponseStream[bytes]] = set()
        self._closed = False
        self._placing = threading.Condition(self._lock)
        self._placed = 0

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        """Read ranges with one call, each frame into place when it arrives."""
        ranges = [
            peer_pb2.TensorRange(name=each.name, offset=each.offset, length=len(each.destination)) for each in reads
        ]
        request = peer_pb2.ReadTensorsRequest(
            lease_id=self._access.lease_id, ranges=ranges, checksums=not self._access.digests_compared
        )
        try:
            with self._client.frames(request) as frames:
                self._opened(frames)
                try:
                    yield from self._in_place(reads, frames)
                finally:
                    with self._lock:
                        self._streams.discard(frames)
        except BackendError as exc:
            raise of_stream(exc, self._uri, closed_here=self._closed) from exc.__cause__

    def _in_place(self, reads: Sequence[TensorRead], frames: ResponseStream[bytes]) -> Iterator[int]:
        expected, done = 0, 0
        for frame in frames:
            try:
                position, content = opened(frame, checksum=not self._access.digests_compared)
            except ValueError as exc:
                raise damaged(str(exc)) from exc
            if expected == len(reads) or position != expected or done + len(content) > len(reads[expected].destination):
                reason = (
                    f"a frame with {len(content)} bytes of range {position}, after {done} bytes of range {expected}"
                )
                raise damaged(reason)
            self._place(reads[expected].destination[done : done + len(content)], content)
            done += len(content)
            if done == len(reads[expected].destination):
                yield expected
                expected, done = expected + 1, 0
        if expected < len(reads):
            raise ended_early(expected, len(reads))

    def _place(self, destination: torch.Tensor, content: memoryview) -> None:
        """Write one frame, unless the session was closed meanwhile."""
        with self._lock:
            if self._closed:
                raise session_closed()
            self._placed += 1
        try:
            if destination.device.type == "cpu":
                host_memory(destination)[:] = content
            else:
                destination.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        finally:
            with self._placing:
                self._placed -= 1
                self._placing.notify_all()

    def _opened(self, frames: ResponseStream[bytes]) -> None:
        with self._lock:
            self._streams.add(frames)
            closed = self._closed
        if closed:
            frames.close()

    def close(self) -> None:
        """End all streams; when it returns, nothing is written any more."""
        with self._lock:
            self._closed = True
            streams = list(self._streams)
        for each in streams:
            each.close()
        with self._placing:
            self._placing.wait_for(lambda: not self._placed)
        self._client.close()


class GrpcTransport:
    """Serves and reads tensors over the gRPC server of each worker.

    Args:
        uri: The worker for ``connect``; for ``serve`` its authority is empty.
        security: Certificates.
        settings: How long a stream may take.
    """

    def __init__(self, uri: ModelURI, security: Security, settings: GrpcStreamSettings) -> None:
        self._uri = uri
        self._security = security
        self._settings = settings

    def serve(self, table: TensorTable) -> StreamedTensors:
        """Make ``table`` readable over the worker's server."""
        return StreamedTensors(table)

    def connect(self, access: PeerAccess) -> GrpcSession:
        """Connect to the worker, with the first call."""
        scheme = "https" if self._uri.query.get("tls") == "1" else "http"
        client = _TensorClient(f"{scheme}://{self._uri.authority}", self._security, self._settings)
        return GrpcSession(client, access, str(self._uri))

    def close(self) -> None:
        """Do nothing: sessions have the connections."""


def open_grpc(uri: ModelURI, settings: Mapping[str, str]) -> GrpcTransport:
    """Open the transport for ``grpc`` URIs.

    Raises:
        SettingsError: A variable, or a file that it names, cannot be used.
    """
    return GrpcTransport(uri, Security.from_env(settings), from_env(GrpcStreamSettings, settings))
