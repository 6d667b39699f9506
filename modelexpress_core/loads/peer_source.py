"""One worker that a load reads from: what it holds is compared, its memory leased, and a session opened."""

from __future__ import annotations

import contextlib
import threading
from enum import Enum
from typing import TYPE_CHECKING

import attrs

from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.contracts.transport import ChannelSession, PeerAccess, PeerSession
from modelexpress_core.errors import BackendError, ModelExpressError, NotFoundError
from modelexpress_core.loads.candidate_queue import peer_of
from modelexpress_core.loads.context import LoadContext
from modelexpress_core.plugins import TRANSPORT
from modelexpress_core.sources.worker_client import WorkerClient
from modelexpress_core.uri import worker_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from modelexpress_core.loads.peer_chunks import ReadPlan
    from modelexpress_core.sources.worker_client import Description

__all__ = ["LeaseEnd", "PeerSource"]


class LeaseEnd(Enum):
    """What a worker says at the end of a lease: that it lasted until then, that it did not, or nothing."""

    CONFIRMED = "confirmed"
    DENIED = "denied"
    UNKNOWN = "unknown"


class PeerSource:
    """One worker: ``describe``, ``connect``, reads over ``session``, ``release``, ``close``.

    Args:
        candidate: The worker, and the transport that reads it.
        request: The request of the load.
        context: Settings and plugins.

    Attributes:
        candidate: The same.
        uri: Redacted URI of the worker.
        worker_id: Id of the worker; empty until ``connect`` if the URI does not name it.
        session: The connection, once ``connect`` has returned.
        read_bytes: Bytes that the session has delivered so far; the reader counts them, and the worker is told.
    """

    session: PeerSession

    def __init__(self, candidate: Candidate, request: LoadRequest, context: LoadContext) -> None:
        self.candidate = candidate
        self.uri = str(candidate.uri)
        self._peer = peer_of(candidate, request)
        self.worker_id = self._peer.worker_id
        self.read_bytes = 0
        self._context = context
        self._closing = contextlib.ExitStack()
        self._leasing = contextlib.ExitStack()
        self._lease_id = ""
        self._lease_end: tuple[LeaseEnd, BackendError | None] | None = None
        self._ending = threading.Lock()
        self._registered, self._transport = context.plugins.open(TRANSPORT, candidate.uri, context.environ)
        self._closing.callback(self._transport.close)
        try:
            self._worker = self._closing.enter_context(
                WorkerClient.from_env(context.environ, url=worker_endpoint(candidate.uri), server=self._peer.server)
            )
        except BaseException:
            self._closing.close()
            raise

    @property
    def source_id(self) -> str:
        """The ``mx_source_id`` of what the worker holds."""
        return self._peer.source_id

    @property
    def provider(self) -> str:
        """Name of the transport."""
        return self._registered.provider.name

    @property
    def plugin(self) -> dict[str, str]:
        """The plugin with the transport, as a report has it."""
        return {"plugin": self._registered.plugin.name, "version": self._registered.plugin.version}

    @property
    def channel(self) -> str:
        """The way of the bytes, where the transport has several; else empty."""
        session = getattr(self, "session", None)
        return session.channel if isinstance(session, ChannelSession) else ""

    def describe(self, plan: ReadPlan) -> Sequence[Description]:
        """Return layouts and digests of the worker's tensors, which have the layouts of ``plan``.

        Raises:
            NotFoundError: The worker holds something else.
            BackendError: The call failed.
        """
        try:
            described = self._worker.describe(
                self._peer.source_id,
                self._peer.worker_id,
                most_tensors=len(plan.layouts),
                most_bytes=plan.most_description_bytes,
            )
        except BackendError as exc:
            exc.uri = self.uri
            raise
        plan.compare(described, uri=self.uri, provider=self.provider)
        return described

    def connect(self) -> None:
        """Lease the memory of the worker, prove that it is alive, and connect.

        Raises:
            BackendError: One of the calls failed.
        """
        leased = self._worker.lease(
            self._peer.source_id, self._peer.worker_id or None, read_bytes=lambda: self.read_bytes
        )
        lease = self._leasing.enter_context(leased)
        self._lease_id = lease.lease_id
        self.worker_id = lease.manifest.worker_id
        access = PeerAccess(
            attrs.evolve(self._peer, worker_id=self.worker_id),
            lease.lease_id,
            self._worker.access(lease.lease_id, self.candidate.uri.scheme),
            digests_compared=self._context.settings.verify_digests,
        )
        self.session = self._transport.connect(access)

    def renew(self) -> None:
        """Renew the lease, which proves that the worker is alive.

        Raises:
            BackendError: It is not, or the lease has ended.
        """
        self._worker.renew(self._lease_id)

    def check_lease(self, deadline_seconds: float | None) -> tuple[LeaseEnd, BackendError | None]:
        """Return whether the lease has lasted until now, and the error if that is not sure.

        Args:
            deadline_seconds: How long the answer may take; None for the deadline of all calls.
        """
        return _result_of(lambda: self._worker.renew(self._lease_id, deadline_seconds=deadline_seconds))

    def release(self) -> tuple[LeaseEnd, BackendError | None]:
        """End the lease; return as ``check_lease`` does. Further calls return the same."""
        with self._ending:
            if self._lease_end is None:
                self._lease_end = _result_of(self._leasing.close)
            return self._lease_end

    def close(self) -> None:
        """Close the session, end the lease, and close all connections. Further calls do nothing."""
        with contextlib.suppress(ModelExpressError):  # who needs the memory has closed the session before
            if hasattr(self, "session"):
                self.session.close()
        self.release()
        with self._ending, contextlib.suppress(ModelExpressError):
            self._closing.close()


def _result_of(call: Callable[[], object]) -> tuple[LeaseEnd, BackendError | None]:
    try:
        call()
    except NotFoundError as exc:
        return LeaseEnd.DENIED, exc
    except BackendError as exc:
        return LeaseEnd.UNKNOWN, exc
    return LeaseEnd.CONFIRMED, None
