"""How the bytes of one version of a model come: over the bulk channel of the server, or in frames over gRPC."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from modelexpress_core.bulk.reading import BulkRead, BulkReader
from modelexpress_core.bulk.requests import Run
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    IntegrityError,
    SourceChangedError,
    StillArrivingError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.sources.cache_client import CacheClient, CachedModel
from modelexpress_core.storage.http.failures import ConnectTimeoutError
from modelexpress_core.wire.frames import opened
from modelexpress_core.wire.proto.modelexpress import cache_pb2
from modelexpress_core.wire.streams import ResponseStream
from modelexpress_core.wire.tls import client_contexts
from mx_grpc_stream._errors import PROVIDER, damaged

__all__ = ["CacheChannel"]

_log = logging.getLogger(__name__)

#: How long connecting to the bulk channel may take: a firewall that drops packets delays a load by this.
_CONNECT_SECONDS = 2.0

#: A new ticket is fetched after this share of the time for which the last one is valid.
_TICKET_SHARE = 0.8

#: How often one read tries the bulk channel before it reads frames, and how often in a row the channel may be opened
#: without a byte before frames alone are read.
_BULK_ATTEMPTS = 2
_BULK_FAILURES = 2

#: Channels that were replaced, and whose reads may go on.
_MAX_REPLACED = 4

#: How slowly frames may come, besides the wait for the first one.
_FRAME_BYTES_PER_SECOND = 1_000_000


class CacheChannel:
    """Reads ranges of one version of a model. Thread-safe.

    Args:
        client: Calls the server.
        model: The version.
        wants_bulk: Whether the bulk channel is used at all.
        patience_seconds: How long to wait for the next bytes.

    Attributes:
        description: The way of the bytes, and why it is not the bulk channel; empty before the first read.
    """

    def __init__(self, client: CacheClient, model: CachedModel, *, wants_bulk: bool, patience_seconds: float) -> None:
        self._client = client
        self._model = model
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._bulk: BulkReader | None = None
        self._renew_at = 0.0  # by the monotonic clock
        self._replaced: list[BulkReader] = []
        self._wants_bulk = wants_bulk
        self._closed = False
        self._failures = 0
        self._worked: BulkReader | None = None  # the one that brought bytes last
        self.description = "" if wants_bulk else "gRPC, since MX_BULK_PORT is 0"

    def set_patience(self, seconds: float) -> None:
        """Set how long reads wait for their next bytes, those under way over the bulk channel too."""
        with self._lock:
            self._patience_seconds = seconds
            if self._bulk is not None:
                self._bulk.patience_seconds = seconds

    def read(self, run: Run, view: memoryview, landed: Callable[[int], None], *, checksums: bool = False) -> int:
        """Read a range, or pieces, into ``view``.

        Args:
            run: What to read.
            view: As long as all pieces together.
            landed: Called with the number of the first bytes that are in place, as they come.
            checksums: Whether bytes of the bulk channel have checksums; frames always do.

        Returns:
            How many bytes are in place; fewer than all if the connection broke.

        Raises:
            BackendError: None is.
        """
        done = 0

        def note(nbytes: int) -> None:
            nonlocal done
            done = nbytes
            landed(nbytes)

        try:
            self._read(run, view, note, checksums=checksums)
        except BackendError as exc:
            if self._closed:
                exc.retryable = False
            exc.provider = PROVIDER
            if not done or self._closed or isinstance(exc, SourceChangedError):
                raise
            _log.debug("a read ended after %d of %d bytes: %s", done, len(view), exc)
            return done
        return len(view)

    def _read(self, run: Run, view: memoryview, landed: Callable[[int], None], *, checksums: bool) -> None:
        """Read over the bulk channel; in frames what it does not answer."""
        for _ in range(_BULK_ATTEMPTS):
            bulk = self._opened_bulk()
            if bulk is None:
                break
            came = 0

            def note(nbytes: int, bulk: BulkReader = bulk) -> None:
                nonlocal came
                came = nbytes
                self._worked = bulk
                landed(nbytes)

            failure = self._over_bulk(bulk, BulkRead(run, view, note), checksums=checksums)
            if failure is None:
                return
            if came or self._closed:
                raise failure  # the read goes on at the first missing byte
            if not isinstance(failure, (UnavailableError, AccessDeniedError)):
                _log.debug("%s is asked over gRPC, which says why: %s", self._client.url, failure)
                break
            if self._failures >= _BULK_FAILURES:
                self._leave_bulk(failure)
        self._read_frames(run, view, landed)

    def _over_bulk(self, bulk: BulkReader, read: BulkRead, *, checksums: bool) -> BackendError | None:
        """Read over the bulk channel; returns why that did not work, if frames may."""
        try:
            for _ in bulk.read([read], checksums=checksums):
                pass
        except StillArrivingError:
            raise
        except IntegrityError as exc:
            exc.retryable = True  # bits that changed on the way are right the next time
            raise
        except (UnavailableError, AccessDeniedError) as exc:
            if isinstance(exc.__cause__, TimeoutError) and not isinstance(exc.__cause__, ConnectTimeoutError):
                hint = "check the network, and the load of the server"
                raise DeadlineError("no byte came in time", cause="the connection hangs", hint=hint) from exc.__cause__
            self._drop(bulk)
            return exc
        except BackendError as exc:
            return exc
        self._worked = bulk
        self._failures = 0
        return None

    # -- the bulk channel ----------------------------------------------------------------------------------------------

    def _opened_bulk(self) -> BulkReader | None:
        """The bulk channel, with a valid ticket; None where there is none."""
        with self._lock:
            if not self._wants_bulk or self._closed:
                return None
            if self._bulk is not None and time.monotonic() < self._renew_at:
                return self._bulk
            try:
                offer, seconds = self._client.open_bulk(self._model)
            except UnsupportedError:
                self._say_frames("the server offers no bulk channel")
                return None
            bulk = BulkReader(
                offer,
                connect_timeout_seconds=_CONNECT_SECONDS,
                patience_seconds=self._patience_seconds,
                tls_context=client_contexts(self._client.security.tls) if offer.origin.tls else None,
                tls_name=self._client.certified_name,
            )
            self._replace(bulk)
            self._renew_at = time.monotonic() + seconds * _TICKET_SHARE
            self.description = f"bulk channel on port {offer.origin.port}"
            return bulk

    def _replace(self, bulk: BulkReader | None) -> None:
        """Use another channel from now on; reads over the former one may go on. The lock is held."""
        if self._bulk is not None:
            self._replaced.append(self._bulk)
            if len(self._replaced) > _MAX_REPLACED:
                self._replaced.pop(0).close()
        self._bulk = bulk

    def _drop(self, bulk: BulkReader) -> None:
        """A channel does not work, or not any more, since the server was restarted or a ticket ended."""
        with self._lock:
            if self._bulk is bulk:
                self._replace(None)
                self._failures += self._worked is not bulk

    def _leave_bulk(self, exc: BackendError) -> None:
        """Read over gRPC from now on; if the server itself is gone, that says so."""
        with self._lock:
            if not self._wants_bulk:
                return
            self._say_frames(exc.message)
        _log.warning("%s is read over gRPC, which is slower: %s", self._client.url, exc)

    def _say_frames(self, reason: str) -> None:
        self._wants_bulk = False
        self.description = f"gRPC, since {reason}"

    # -- frames --------------------------------------------------------------------------------------------------------

    def _read_frames(self, run: Run, view: memoryview, landed: Callable[[int], None]) -> None:
        several = {"stride": run.stride, "count": run.count} if run.count > 1 else {}
        wanted = cache_pb2.FileRange(offset=run.offset, length=run.length, **several)
        seconds = self._patience_seconds + len(view) / _FRAME_BYTES_PER_SECOND
        with self._client.frames(self._model, run.name, [wanted], seconds) as frames:
            self._place(frames, view, landed)

    def _place(self, frames: ResponseStream[bytes], view: memoryview, landed: Callable[[int], None]) -> None:
        done = 0
        for frame in frames:
            try:
                position, content = opened(frame, checksum=True)
            except ValueError as exc:
                raise damaged(str(exc)) from exc
            if position or done + len(content) > len(view):
                reason = f"a frame with {len(content)} bytes of range {position}, after {done} of {len(view)} bytes"
                raise damaged(reason)
            if self._closed:
                raise UnavailableError("the storage was closed", retryable=False)
            view[done : done + len(content)] = content
            done += len(content)
            landed(done)
        if done < len(view):
            raise UnavailableError(f"the stream ended after {done} of {len(view)} bytes")

    def close(self) -> None:
        """End reads in other threads; when it returns, the bulk channel writes nothing any more."""
        with self._lock:
            self._closed = True
            readers = [*self._replaced, *([self._bulk] if self._bulk else [])]
        for each in readers:
            each.close()
