"""What core asks of a storage, and what a storage tells of an object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import attrs
from attrs import field, frozen

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.immutable import unmodifiable

__all__ = ["DiagnosableStorage", "Endpoint", "ObjectInfo", "PatientStorage", "RunStorage", "Storage"]


@frozen
class ObjectInfo:
    """One object as the storage knows it, without its content.

    Attributes:
        path: Path below the authority, as ``stat`` and ``read_into`` take it.
        size: Length in bytes.
        version: What pins this content: an ETag, a generation, a modification stamp. None where the storage
            has nothing of the kind.
        digests: Digests of the whole object that the storage publishes, by algorithm
            (``"crc32"``, ``"crc32c"``, ``"crc64nvme"``, ``"md5"``, ``"sha1"``, ``"sha256"``), in lower-case hex.
    """

    path: str
    size: int = field(validator=attrs.validators.ge(0))
    version: str | None = None
    digests: Mapping[str, str] = field(factory=dict, converter=unmodifiable, hash=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only mapping cannot be pickled or copied as it is.
        return ObjectInfo, (self.path, self.size, self.version, dict(self.digests))


@runtime_checkable
class Storage(Protocol):
    """Reads byte ranges of objects. Thread-safe; one instance serves one authority (bucket, host, account).

    Retries, splitting, concurrency, progress and verification belong to core: a storage does one request
    per call, and raises a ``BackendError`` that says whether trying again can help.
    """

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        """The objects below the directory ``prefix``, at any depth, in any order; none where it is empty.

        Raises:
            BackendError: NotFoundError where the authority itself does not exist.
        """
        ...

    def stat(self, path: str) -> ObjectInfo:
        """The object at ``path``.

        Raises:
            NotFoundError: There is none.
        """
        ...

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Read ``len(buffer)`` bytes from ``offset`` of the object at ``path`` straight into ``buffer``.

        Where the connection breaks after some bytes, return their number: core goes on at the first missing
        byte. Raise only where nothing of this call arrived. A read that begins at or after the end of the object
        returns 0 or raises SourceChangedError.

        Args:
            path: As in ``ObjectInfo.path``.
            offset: First byte.
            buffer: Writable, one-dimensional, of bytes, and never empty.
            version: As in ``ObjectInfo.version``; None takes any one.

        Returns:
            Number of bytes written to the start of ``buffer``; fewer than asked for where the stream ended early.

        Raises:
            SourceChangedError: The object is no longer ``version``, and its old content cannot be read any more.
            UnavailableError, DeadlineError: The other side cannot be reached, or the connection broke; retryable.
            BackendError: Any other failure.
        """
        ...

    def close(self) -> None:
        """Give up connections and files; called once or more often.

        May be called while reads run in other threads: those end soon, with their bytes or with a BackendError that is
        not retryable, as does every later call.
        """
        ...


class RunStorage(Storage, Protocol):
    """A storage to which a read of a few hundred bytes costs little more than the call: it takes many at a time.

    Offered by declaring the capability ``read_runs``. Rows of a matrix that is split by columns are such runs.
    """

    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        """Read runs of ``run_bytes``, each ``stride_bytes`` after the one before, one after another into ``buffer``.

        Args:
            path: As in ``ObjectInfo.path``.
            offset: First byte of the first run.
            run_bytes: Length of a run; that of ``buffer`` is a multiple of it.
            stride_bytes: From the start of a run to the start of the next; more than ``run_bytes``.
            buffer: Writable, one-dimensional, of bytes, and never empty.
            version: As in ``ObjectInfo.version``; None takes any one.

        Returns:
            Number of bytes written to the start of ``buffer``, of whole runs; fewer than asked for where the object
            ended early.

        Raises:
            SourceChangedError: The object is no longer ``version``, and its old content cannot be read any more.
            BackendError: Any other failure.
        """
        ...


class PatientStorage(Storage, Protocol):
    """A storage whose reads give up on a connection that has gone silent, after a time that core sets.

    Offered by declaring the capability ``patience``. Core learns how long a read takes when all is well, and lowers the
    time from what the storage begins with, so that a stalled connection costs seconds instead of a long time-out.

    Attributes:
        patience_seconds: A read that has waited so long for its next byte ends: with the bytes that have arrived, or
            with DeadlineError where none has. Core sets it while reads run; it holds for waits that begin afterwards.
    """

    patience_seconds: float


class DiagnosableStorage(Storage, Protocol):
    """A storage that says where it connects and as whom, so that ``mx doctor`` can test one step after the other.

    Offered by declaring the capability ``diagnosis``.
    """

    def endpoint(self) -> Endpoint:
        """Where requests go. Connects to nothing.

        Raises:
            BackendError: That cannot be said.
        """
        ...

    def credentials(self) -> str:
        """Who asks, and where that was found, for people: ``"access key ...X4TQ, from the profile default"``.

        Fetches the credentials where that takes a request; shows no secret.

        Raises:
            AccessDeniedError: There are none, or they cannot be had.
        """
        ...
