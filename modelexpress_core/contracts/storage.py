"""What every storage does: it lists objects and reads byte ranges of them into memory."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import attrs
from attrs import field, frozen

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import BackendError
from modelexpress_core.immutable import unmodifiable

__all__ = [
    "BatchStorage",
    "Compared",
    "ComparingStorage",
    "Completion",
    "DiagnosableStorage",
    "Endpoint",
    "ObjectInfo",
    "PatientStorage",
    "ReadRequest",
    "RecheckingStorage",
    "RestrictedStorage",
    "RunStorage",
    "Storage",
]


@frozen
class ObjectInfo:
    """Metadata of one object.

    Attributes:
        path: Path below the authority, decoded, as ``stat`` and ``read_into`` take it.
        size: Length in bytes.
        version: Version of the content: an ETag, a generation, a modification time. None if the storage has no
            versions.
        digests: Digests of the whole object that the storage publishes, by algorithm
            (``"crc32"``, ``"crc32c"``, ``"crc64nvme"``, ``"md5"``, ``"sha1"``, ``"sha256"``), in lower-case hex.
        origin: For a copy: the URI of the original, without a query, and its version there. A model has the same
            content version wherever it is loaded from, if a storage that copies says so. It vouches for the copy.
    """

    path: str
    size: int = field(validator=attrs.validators.ge(0))
    version: str | None = None
    digests: Mapping[str, str] = field(factory=dict, converter=unmodifiable, hash=False)
    origin: tuple[str, str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only mapping cannot be pickled or copied as it is.
        return ObjectInfo, (self.path, self.size, self.version, dict(self.digests), self.origin)


@runtime_checkable
class Storage(Protocol):
    """Reads byte ranges of objects. Thread-safe. One instance serves one authority (bucket, host, account).

    A storage sends one request per call, and raises a ``BackendError`` whose class says whether a retry can help. Core
    does retries, splitting, concurrency, progress and verification.
    """

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        """The objects below the directory ``prefix``, at any depth, in any order; none if it is empty.

        Raises:
            NotFoundError: The authority itself does not exist.
            BackendError: Any other failure.
        """
        ...

    def stat(self, path: str) -> ObjectInfo:
        """The object at ``path``.

        Raises:
            NotFoundError: There is no object at ``path``.
            BackendError: Any other failure.
        """
        ...

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Read ``len(buffer)`` bytes from ``offset`` of the object at ``path`` straight into ``buffer``.

        If the connection breaks after some bytes, return their number: core continues at the first missing byte. Raise
        an error only if no byte of this call arrived. A read that begins at or after the end of the object returns 0 or
        raises SourceChangedError.

        Args:
            path: As in ``ObjectInfo.path``.
            offset: First byte.
            buffer: Writable, one-dimensional, with the format of bytes, never empty.
            version: As in ``ObjectInfo.version``; None reads any version.

        Returns:
            Number of bytes written to the start of ``buffer``; fewer than its length if the stream ended early.

        Raises:
            SourceChangedError: The object has another version now, and its old content cannot be read.
            UnavailableError, DeadlineError: The server cannot be reached, or the connection broke; retryable.
            BackendError: Any other failure.
        """
        ...

    def close(self) -> None:
        """Close connections and files. May be called more than once.

        May be called while reads run in other threads. They end soon, with their bytes or with a BackendError that is
        not retryable, as does every later call.
        """
        ...


class RunStorage(Storage, Protocol):
    """A storage that reads many short runs in one call, for storages where each call costs little.

    Declared with the capability ``read_runs``. The rows of a matrix that is split by columns are such runs.
    """

    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        """Read runs of ``run_bytes``, which begin ``stride_bytes`` apart, one after another into ``buffer``.

        Args:
            path: As in ``ObjectInfo.path``.
            offset: First byte of the first run.
            run_bytes: Length of a run. The length of ``buffer`` is a multiple of it.
            stride_bytes: From the start of a run to the start of the next; more than ``run_bytes``.
            buffer: Writable, one-dimensional, with the format of bytes, never empty.
            version: As in ``ObjectInfo.version``; None reads any version.

        Returns:
            Number of bytes written to the start of ``buffer``, in whole runs; fewer than its length if the object
            ended early.

        Raises:
            SourceChangedError: The object has another version now, and its old content cannot be read.
            BackendError: Any other failure.
        """
        ...


@frozen
class ReadRequest:
    """One range to read in a batch; the arguments of ``Storage.read_into``.

    Attributes:
        path: As in ``ObjectInfo.path``.
        offset: First byte.
        buffer: Writable, one-dimensional, with the format of bytes, never empty. The read fills it.
        version: As in ``ObjectInfo.version``; None reads any version.
    """

    path: str
    offset: int
    buffer: memoryview = field(repr=False, eq=False)
    version: str | None = None


@frozen
class Completion:
    """The end of one request of a batch.

    Attributes:
        index: Position of the request in its batch.
        error: Why the request failed. None if every byte is in place.
    """

    index: int
    error: BackendError | None = None


class BatchStorage(Storage, Protocol):
    """A storage with its own engine, which reads many ranges of many objects at once.

    Declared with the capability ``read_batch``. Core then reads by ``read_batch`` alone while it fetches, and by
    ``read_into`` before: the headers of files, for example. Core runs several batches at a time, as many as the
    ``concurrency`` of the record says, and retries requests that fail.
    """

    def read_batch(self, requests: Sequence[ReadRequest]) -> Generator[Completion, None, None]:
        """Read all ``requests``, concurrently and straight into their buffers.

        Yields one completion for each request, in any order. A completion without an error promises that the whole
        buffer holds bytes of the requested version. Once a request is completed, nothing writes to its buffer.

        If core closes the generator early, or ``close`` is called in another thread, reads under way end or are
        waited for: once the generator has ended, in whatever way, nothing writes to any buffer of the batch.

        A storage that cannot pin versions compares the version of an object after its last read, before it yields the
        completions. This detects every change but one that is undone before the comparison. Digests detect that one
        too, where the storage publishes them and the object is read as a whole.

        Args:
            requests: Ranges that may lie in any order; their buffers do not overlap.

        Raises:
            BackendError: During iteration. Applies to all requests that are not completed.
        """
        ...


class RecheckingStorage(Storage, Protocol):
    """A storage that can compare the version of an object again without reading it, at almost no cost.

    Declared with the capability ``recheck``. Core calls it for each object that a load has read, once all bytes have
    arrived: an object that changed after its last read then fails the load too. It is for storages whose objects can
    change in place, such as files. A storage that pins versions on its server has no use for it.
    """

    def check_unchanged(self, path: str, *, version: str) -> None:
        """Return if the object that was read at ``path`` still has ``version``.

        Args:
            path: As in ``ObjectInfo.path``.
            version: As in ``ObjectInfo.version``.

        Raises:
            SourceChangedError: It has another version.
            BackendError: Any other failure.
        """
        ...


@frozen
class Compared:
    """What a storage has compared so far.

    Attributes:
        here_bytes: Bytes that it compared itself with digests of pieces of the files.
        by_server_bytes: Bytes that the server compared for it, since they make up no whole pieces.
        channel: The way of the bytes, where there are several, and why it is not a faster one; else empty.
    """

    here_bytes: int = 0
    by_server_bytes: int = 0
    channel: str = ""


class ComparingStorage(Storage, Protocol):
    """A storage that compares what it reads with digests of pieces of the files, so that any part can be compared.

    Declared with the capability ``compares``, and together with ``recheck``: bytes that were not compared as they came
    are compared in ``check_unchanged`` at the latest, which raises IntegrityError if they differ.
    """

    def compared(self) -> Compared:
        """What was compared so far. May be called after ``close``."""
        ...


class RestrictedStorage(Storage, Protocol):
    """A storage that tells whether a place is for some readers alone, as gated and private repositories are.

    Declared with the capability ``restriction``. A server with a model cache reads such a place with credentials of its
    own, and then gives it to those of its callers alone for whom a rule exists.
    """

    def is_restricted(self, path: str) -> bool:
        """Whether some readers may not read what is at ``path``; also where that is unknown.

        Args:
            path: Path of a directory or an object.

        Raises:
            NotFoundError: There is no such place.
            BackendError: Any other failure.
        """
        ...


class PatientStorage(Storage, Protocol):
    """A storage whose reads give up a silent connection after a time that core sets.

    Declared with the capability ``patience``. Core measures how long successful reads take, and lowers the time that
    the storage begins with. A stalled connection then costs seconds instead of a long time-out.

    Attributes:
        patience_seconds: Longest wait for the next byte of a read. After it, the read ends with the bytes that have
            arrived, or with DeadlineError if none has. Core sets it while reads run; it applies to later waits.
    """

    patience_seconds: float


class DiagnosableStorage(Storage, Protocol):
    """A storage that reports its endpoint and its credentials, so that ``mx doctor`` can test one step at a time.

    Declared with the capability ``diagnosis``.
    """

    def endpoint(self) -> Endpoint:
        """The address of requests. Opens no connection.

        Raises:
            BackendError: The address is unknown.
        """
        ...

    def credentials(self) -> str:
        """The credentials in use and their source, for people: ``"access key ...X4TQ, from the profile default"``.

        Fetches the credentials if that takes a request. Contains no secret.

        Raises:
            AccessDeniedError: There are no credentials, or they cannot be fetched.
        """
        ...
