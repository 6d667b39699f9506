"""What the errors of a stream say: the worker, what was tried, and who caused it."""

from __future__ import annotations

from modelexpress_core.errors import BackendError, IntegrityError, UnavailableError

__all__ = ["PROVIDER", "damaged", "ended_early", "of_stream", "session_closed"]

PROVIDER = "mx-grpc-stream"


def of_stream(exc: BackendError, uri: str, *, closed_here: bool) -> BackendError:
    """``exc`` with the worker's URI. Another place is tried instead of a retry."""
    exc.uri, exc.operation, exc.provider = uri, "read the tensors", PROVIDER
    exc.retryable = False
    exc.peer_at_fault = not closed_here
    return exc


def damaged(reason: str) -> IntegrityError:
    """A frame is not what it should be."""
    return IntegrityError(
        reason,
        cause="a proxy, a network or a memory on the way changed bytes, or the worker has another version",
        hint="use TLS, which notices it, and compare the versions of both workers",
    )


def ended_early(ranges: int, wanted: int) -> UnavailableError:
    """The stream ended before its last range."""
    return UnavailableError(
        f"the stream ended after {ranges} of {wanted} ranges",
        cause="the worker ended, or a proxy ended the stream",
        hint="start the load again",
    )


def session_closed() -> UnavailableError:
    """The session was closed on this side."""
    return UnavailableError("the session was closed", hint="keep the session open while it is used")
