"""What each failure of NIXL means, who caused it, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from attrs import frozen

from modelexpress_core.errors import (
    BackendError,
    DeadlineError,
    IntegrityError,
    NotFoundError,
    PluginLoadError,
    UnavailableError,
    UnsupportedError,
)

__all__ = [
    "PROVIDER",
    "agent_closed",
    "backend_fails",
    "close_unsafe",
    "description_unreadable",
    "is_disconnect",
    "library_unusable",
    "nixl_errors",
    "other_agent",
    "other_backend",
    "out_of_range",
    "quarantine_full",
    "read_timed_out",
    "session_closed",
    "too_many_tensors",
    "withdrawn",
]

PROVIDER = "mx-nixl"

_READ = "read the tensors"

_SHOW_LOG = "set NIXL_LOG_LEVEL=DEBUG and UCX_LOG_LEVEL=info, which write a log to stderr"


@frozen
class _Meaning:
    """What one exception of NIXL means.

    Attributes:
        error: Our class.
        reason: What happened.
        peer_at_fault: Whether the worker caused it.
        hint: What to do next.
    """

    error: type[BackendError]
    reason: str
    peer_at_fault: bool = False
    hint: str = _SHOW_LOG


_DISCONNECT = "nixlRemoteDisconnectError"

#: The exceptions of NIXL have no common base, and live in a module whose name depends on the wheel.
_MEANINGS: Mapping[str, _Meaning] = {
    _DISCONNECT: _Meaning(
        UnavailableError, "the connection to the worker ended", peer_at_fault=True, hint="check whether it still runs"
    ),
    "nixlNotFoundError": _Meaning(
        NotFoundError,
        "NIXL does not know the worker, or its memory is not registered",
        peer_at_fault=True,
        hint=f"check whether the worker was started again, and start the load again; {_SHOW_LOG}",
    ),
    "nixlMismatchError": _Meaning(
        UnsupportedError,
        "NIXL does not accept the metadata of the worker",
        peer_at_fault=True,
        hint="use the same version of NIXL and the same MX_NIXL_BACKEND on both workers",
    ),
    "nixlNotAllowedError": _Meaning(
        UnsupportedError, "NIXL does not allow this for the memory of the worker", peer_at_fault=True
    ),
    "nixlInvalidParamError": _Meaning(BackendError, "NIXL refuses a parameter"),
    "nixlBackendError": _Meaning(
        UnavailableError, "the backend of NIXL failed", hint=f"check the network between both workers; {_SHOW_LOG}"
    ),
    "nixlNotSupportedError": _Meaning(
        UnsupportedError, "the backend of NIXL does not support this", hint="set MX_NIXL_BACKEND to another backend"
    ),
    "nixlCancelledError": _Meaning(UnavailableError, "the transfer was cancelled"),
    "nixlNotPostedError": _Meaning(BackendError, "the transfer was not posted"),
    "nixlRepostActiveError": _Meaning(BackendError, "the transfer is already active"),
    "nixlNoTelemetryError": _Meaning(BackendError, "NIXL has no telemetry"),
    "nixlUnknownError": _Meaning(BackendError, "NIXL gives no reason"),
}


def is_disconnect(exc: BaseException) -> bool:
    """Whether NIXL says that the connection to the worker ended."""
    return type(exc).__name__ == _DISCONNECT


@contextmanager
def nixl_errors(operation: str, uri: str, *, peer_at_fault: bool = False) -> Iterator[None]:
    """Turn an exception of NIXL into an error of ours.

    Args:
        operation: What is done, as a verb phrase.
        uri: Redacted URI of the worker.
        peer_at_fault: Whether the worker causes every failure of this operation.
    """
    try:
        yield
    except Exception as exc:
        meaning = _MEANINGS.get(type(exc).__name__)
        if meaning is None:
            if type(exc) is not RuntimeError:
                raise
            meaning = _Meaning(BackendError, f"NIXL failed: {exc}")
        raise meaning.error(
            f"{meaning.reason} ({exc})" if str(exc) not in meaning.reason else meaning.reason,
            uri=uri,
            operation=operation,
            provider=PROVIDER,
            retryable=False,
            peer_at_fault=peer_at_fault or meaning.peer_at_fault,
            hint=meaning.hint,
        ) from exc


def library_unusable(wheel: str, exc: ImportError) -> PluginLoadError:
    """A wheel of NIXL is installed, and cannot be imported."""
    needs_cuda = "libcu" in str(exc) or "libnv" in str(exc)
    return PluginLoadError(
        f"{wheel} is installed, but does not import: {exc}",
        plugin=PROVIDER,
        cause="the wheel needs libraries of CUDA that this machine does not have" if needs_cuda else None,
        hint="install the driver and the CUDA version of the wheel, or the wheel for your version: nixl-cu12, nixl-cu13"
        if needs_cuda
        else f"install {wheel} again",
    )


def backend_fails(backend: str, exc: BaseException, ucx_tls: str | None) -> UnavailableError:
    """The backend does not start."""
    cause = "no device or transport of it can be used on this machine"
    if backend == "UCX" and ucx_tls:
        cause = f"UCX_TLS is {ucx_tls!r}, and UCX finds none of these transports on this machine"
    return UnavailableError(
        f"the backend {backend} of NIXL does not start ({exc})",
        operation="make an agent of NIXL",
        provider=PROVIDER,
        retryable=False,
        cause=cause,
        hint="unset UCX_TLS and UCX_NET_DEVICES, or name transports that this machine has; UCX logs them to stderr"
        if backend == "UCX"
        else "set MX_NIXL_BACKEND=UCX, or install the driver of the device",
    )


def description_unreadable(reason: str, uri: str) -> IntegrityError:
    """What the worker tells readers is damaged, or has another format."""
    return IntegrityError(
        f"the worker's description of its memory cannot be used: {reason}",
        uri=uri,
        operation="connect",
        provider=PROVIDER,
        peer_at_fault=True,
        cause="the worker has another version of mx-nixl, or is not what it says",
        hint="use the same version of mx-nixl on both workers",
    )


def other_agent(uri: str) -> IntegrityError:
    """The metadata belongs to an agent with another name than the worker says."""
    return description_unreadable("its metadata belongs to another agent of NIXL", uri)


def other_backend(theirs: str, ours: str, uri: str) -> UnsupportedError:
    """Both workers use different backends."""
    return UnsupportedError(
        f"the worker uses the backend {theirs} of NIXL, and this process {ours}",
        uri=uri,
        operation="connect",
        provider=PROVIDER,
        hint="set MX_NIXL_BACKEND to the same value on both",
    )


def out_of_range(name: str, start: int, end: int, uri: str) -> NotFoundError:
    """The worker does not offer these bytes."""
    return NotFoundError(
        f"the worker offers no tensor {name[:200]!r} with bytes {start} to {end - 1}",
        uri=uri,
        operation=_READ,
        provider=PROVIDER,
        peer_at_fault=True,
    )


def read_timed_out(seconds: float, uri: str) -> DeadlineError:
    """A read did not end in time."""
    return DeadlineError(
        f"a read has not ended after {seconds:.0f} s",
        uri=uri,
        operation=_READ,
        provider=PROVIDER,
        retryable=False,
        peer_at_fault=True,
        cause="the worker is stopped, or the network to it is gone",
        hint="check the worker; MX_NIXL_READ_TIMEOUT_SECONDS sets how long to wait",
    )


def session_closed(uri: str) -> UnavailableError:
    """The session was closed on this side."""
    return UnavailableError("the session was closed", uri=uri, operation=_READ, provider=PROVIDER, retryable=False)


def close_unsafe(nbytes: int, uri: str) -> BackendError:
    """Reads may still write to the memory that they were given."""
    return BackendError(
        f"reads of {nbytes} bytes have not ended, and NIXL cannot take them back: they may still write to the tensors",
        uri=uri,
        operation="close the connection",
        provider=PROVIDER,
        peer_at_fault=True,
        cause="the worker is stopped, or the network to it is gone",
        hint="end this process, and start the load again",
    )


def quarantine_full(kept: str, uri: str) -> UnavailableError:
    """Too much is kept because of reads that have not ended."""
    return UnavailableError(
        f"{kept} are kept because reads from other workers have not ended",
        uri=uri,
        operation="connect",
        provider=PROVIDER,
        retryable=False,
        cause="several workers were stopped while this process read from them",
        hint="end those workers, or start this process again",
    )


def too_many_tensors(tensors: int, nbytes: int, limit: int, most: int) -> UnsupportedError:
    """The description of the memory is too long."""
    return UnsupportedError(
        f"the description of {tensors} tensors has {nbytes} bytes; {limit} are allowed, for at most {most} tensors",
        operation="offer the tensors",
        provider=PROVIDER,
        hint="offer them over another transport",
    )


def withdrawn(uri: str) -> UnavailableError:
    """The worker no longer serves its tensors."""
    return UnavailableError(
        "the worker no longer offers its tensors",
        uri=uri,
        operation=_READ,
        provider=PROVIDER,
        retryable=False,
        peer_at_fault=True,
        cause="it ended, or changes its weights",
        hint="start the load again",
    )


def agent_closed() -> BackendError:
    """The agent is used after its end."""
    return BackendError("the agent was closed", operation="use an agent of NIXL", provider=PROVIDER)
