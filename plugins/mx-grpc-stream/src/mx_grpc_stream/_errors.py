"""What errors say: what was tried, with whom, and who caused it."""

from __future__ import annotations

from modelexpress_core.errors import BackendError, IntegrityError, UnavailableError

__all__ = [
    "PROVIDER",
    "damaged",
    "damaged_in_cache",
    "damaged_on_the_way",
    "ended_early",
    "of_stream",
    "other_manifest",
    "session_closed",
]

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


def damaged_in_cache(path: str, offset: int) -> IntegrityError:
    """The server's own copy has other bytes than its manifest says."""
    return IntegrityError(
        f"the server's copy of {path} is damaged around byte {offset}: it differs from the chunk manifest",
        operation="compare the chunks",
        provider=PROVIDER,
        cause="the disk of the server is damaged, or another program wrote to the directory of the cache",
        hint="run mx models validate on the server, which downloads damaged files again",
    )


def damaged_on_the_way(path: str, offset: int) -> IntegrityError:
    """Bytes arrived that the server did not send."""
    return IntegrityError(
        f"bytes of {path} around byte {offset} differ from the chunk manifest, and the server's copy does not",
        operation="compare the chunks",
        provider=PROVIDER,
        cause="a proxy, a network or a memory on the way changed bytes",
        hint="use TLS (mxs://), which notices it, and start the load again",
    )


def other_manifest(what: str, *, retryable: bool = False) -> IntegrityError:
    """The chunk manifest is not that of the files."""
    return IntegrityError(
        f"the chunk manifest of the server does not fit: {what} differs",
        operation="compare the chunks",
        provider=PROVIDER,
        retryable=retryable,
        cause="bytes were damaged on the way, or the server has another version of the manifest format",
        hint="start the load again; compare the versions of both: mx health",
    )
