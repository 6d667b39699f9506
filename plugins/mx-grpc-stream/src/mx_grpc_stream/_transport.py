"""Reading tensors of another worker: over its bulk channel, or over gRPC, frame by frame into place."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch

from modelexpress_core.bulk.reading import BulkOffer, BulkRead, BulkReader
from modelexpress_core.bulk.requests import Run
from modelexpress_core.contracts.transport import PeerAccess, TensorRead, TensorTable
from modelexpress_core.errors import BackendError, IntegrityError, UnavailableError, UnsupportedError
from modelexpress_core.settings import from_env
from modelexpress_core.storage.http.requests import Origin
from modelexpress_core.transport.tensor_bytes import host_memory
from modelexpress_core.uri import ModelURI, worker_endpoint
from modelexpress_core.wire.client import Client, Security
from modelexpress_core.wire.frames import opened
from modelexpress_core.wire.proto.modelexpress import peer_pb2
from modelexpress_core.wire.settings import AuthSettings
from modelexpress_core.wire.streams import ResponseStream
from modelexpress_core.wire.tls import client_contexts
from mx_grpc_stream._bulk import serve_bulk
from mx_grpc_stream._errors import damaged, ended_early, of_stream, session_closed
from mx_grpc_stream._serving import TENSORS, StreamedTensors
from mx_grpc_stream.settings import GrpcStreamSettings

__all__ = ["GrpcSession", "GrpcTransport", "open_grpc"]

_log = logging.getLogger(__name__)

#: How long the bulk channel may take to open: a firewall that drops packets delays a load by this.
_OPEN_SECONDS = 5.0
_CONNECT_SECONDS = 2.0

#: Requests that bring nothing, after which the bulk channel is left: connections that were idle may have ended.
_BULK_RETRIES = 1


class _TensorClient(Client):
    """Calls to the tensor service of one worker."""

    def __init__(self, url: str, security: Security, settings: GrpcStreamSettings) -> None:
        super().__init__(
            url,
            (TENSORS,),
            deadline_seconds=settings.read_timeout_seconds,
            security=security.for_worker(),
            retries=False,
        )

    def frames(self, request: peer_pb2.ReadTensorsRequest) -> ResponseStream[bytes]:
        """The frames of one call."""
        return self._stream(TENSORS, "ReadTensors", request)

    def open_bulk(self, lease_id: str) -> BulkOffer:
        """The bulk channel of the worker.

        Raises:
            UnsupportedError: It offers none.
            BackendError: The call failed, or the answer makes no sense.
        """
        answer: peer_pb2.OpenBulkResponse = self._call(
            TENSORS, "OpenBulk", peer_pb2.OpenBulkRequest(lease_id=lease_id), deadline_seconds=_OPEN_SECONDS
        )
        if not 0 < answer.port < 1 << 16 or not re.fullmatch(r"[!-~]{1,4096}", answer.ticket):
            reason = f"the worker answered with the port {answer.port} and a ticket of {len(answer.ticket)} characters"
            raise BackendError(reason)
        host = self._endpoint.host
        return BulkOffer(Origin(host, answer.port, self._endpoint.tls), answer.ticket, answer.content)


class GrpcSession:
    """Reads the tensors of one worker.

    Args:
        client: The connection, which ``close`` closes.
        access: The lease of this reader, and whether bytes need checksums.
        uri: Redacted URI of the worker, for messages.
        bulk: The worker's bulk channel, which ``close`` closes; None if there is none.
        channel: The way of the bytes.

    Attributes:
        channel: The way of the bytes, and why it is not the bulk channel.
    """

    def __init__(
        self, client: _TensorClient, access: PeerAccess, uri: str, bulk: BulkReader | None, channel: str
    ) -> None:
        self.channel = channel
        self._client = client
        self._access = access
        self._uri = uri
        self._bulk = self._opened_bulk = bulk
        self._lock = threading.Lock()
        self._streams: set[ResponseStream[bytes]] = set()
        self._closed = False
        self._placing = threading.Condition(self._lock)
        self._placed = 0

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        """Read ranges over the bulk channel; over gRPC what it does not deliver."""
        left = {position: _RestOfRange(read) for position, read in enumerate(reads)}
        attempts = 0
        while left and (bulk := self._bulk) is not None:
            asked = [*left.items()]
            wanted = [each.over_bulk() for _, each in asked]
            attempts += 1
            try:
                for position in bulk.read(wanted, checksums=not self._access.digests_compared):
                    del left[asked[position][0]]
                    attempts = 0
                    yield asked[position][0]
            except UnavailableError as exc:
                if self._closed:
                    raise of_stream(session_closed(), self._uri, closed_here=True) from exc
                if attempts > _BULK_RETRIES:
                    self._leave_bulk(exc)
            except IntegrityError as exc:
                raise of_stream(exc, self._uri, closed_here=self._closed) from exc.__cause__
            except BackendError as exc:  # the worker says over gRPC why it refuses
                _log.debug("%s is asked over gRPC: %s", self._uri, exc)
                break
        positions = [*left]
        for position in self._read_frames([each.over_grpc() for each in left.values()]) if left else ():
            yield positions[position]

    def _leave_bulk(self, exc: BackendError) -> None:
        """Read over gRPC from now on; if the worker itself is gone, that says so."""
        with self._lock:
            if self._bulk is None:
                return
            self._bulk = None
        self.channel = f"gRPC, since {exc.message}"
        _log.warning("the rest of %s is read over gRPC, which is slower: %s", self._uri, exc)

    def _read_frames(self, reads: Sequence[TensorRead]) -> Iterator[int]:
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
            read = reads[expected]
            self._place(read.destination[done : done + len(content)], content)
            done += len(content)
            if read.landed is not None and read.destination.device.type == "cpu":
                read.landed(done)
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
        if self._opened_bulk is not None:
            self._opened_bulk.close()
        with self._placing:
            self._placing.wait_for(lambda: not self._placed)
        self._client.close()


class _RestOfRange:
    """What is left of a range: bytes that have arrived are not read again, and not written again."""

    def __init__(self, read: TensorRead) -> None:
        self._read = read
        self._done = self._before = 0

    def over_bulk(self) -> BulkRead:
        """The rest, as the bulk channel reads it."""
        self._before = self._done
        destination = self._read.destination[self._before :]
        return BulkRead(
            Run(self._read.name, self._read.offset + self._before, len(destination)), destination, self._landed
        )

    def over_grpc(self) -> TensorRead:
        """The rest, as frames bring it."""
        self._before = self._done
        return TensorRead(
            self._read.name, self._read.offset + self._before, self._read.destination[self._before :], self._landed
        )

    def _landed(self, nbytes: int) -> None:
        self._done = self._before + nbytes
        if self._read.landed is not None:
            self._read.landed(self._done)


class GrpcTransport:
    """Serves and reads tensors over the gRPC server of each worker, and over its bulk channel.

    Args:
        uri: The worker for ``connect``; for ``serve`` its authority is empty.
        security: Certificates.
        settings: How long a stream may take, and the port of the bulk channel.
        environ: Variables that say whether readers are authenticated.
    """

    def __init__(
        self, uri: ModelURI, security: Security, settings: GrpcStreamSettings, environ: Mapping[str, str]
    ) -> None:
        self._uri = uri
        self._security = security
        self._settings = settings
        self._environ = environ

    def serve(self, table: TensorTable) -> StreamedTensors:
        """Make ``table`` readable over the worker's server, and over a bulk channel."""
        auth = from_env(AuthSettings, self._environ)
        return StreamedTensors(table, serve_bulk(table, self._settings, self._security.tls, auth))

    def connect(self, access: PeerAccess) -> GrpcSession:
        """Connect to the bulk channel of the worker; without one, to its server with the first call."""
        client = _TensorClient(worker_endpoint(self._uri), self._security, self._settings)
        try:
            bulk, channel = self._open_bulk(client, access.lease_id)
        except BaseException:
            client.close()
            raise
        return GrpcSession(client, access, str(self._uri), bulk, channel)

    def _open_bulk(self, client: _TensorClient, lease_id: str) -> tuple[BulkReader | None, str]:
        """A reader of the worker's bulk channel, and what the report says of it."""
        if not self._settings.bulk_port:
            return None, "gRPC, since MX_BULK_PORT is 0"
        try:
            offer = client.open_bulk(lease_id)
        except UnsupportedError:
            return None, "gRPC, since the worker offers no bulk channel"
        except BackendError as exc:  # the first read says what is wrong with the worker
            return None, f"gRPC, since the bulk channel was not opened: {exc.message}"
        bulk = BulkReader(
            offer,
            connect_timeout_seconds=_CONNECT_SECONDS,
            patience_seconds=self._settings.read_timeout_seconds,
            tls_context=client_contexts(self._security.tls) if offer.origin.tls else None,
            tls_name=self._security.tls.peer_name,
        )
        try:
            bulk.check()
        except BackendError as exc:
            bulk.close()
            _log.warning("%s is read over gRPC, which is slower: %s", self._uri, exc)
            return None, f"gRPC, since {exc.message}"
        return bulk, f"bulk channel on port {offer.origin.port}"

    def close(self) -> None:
        """Do nothing: sessions have the connections."""


def open_grpc(uri: ModelURI, settings: Mapping[str, str]) -> GrpcTransport:
    """Open the transport for ``grpc`` URIs.

    Raises:
        SettingsError: A variable, or a file that it names, cannot be used.
    """
    return GrpcTransport(uri, Security.from_env(settings), from_env(GrpcStreamSettings, settings), settings)
