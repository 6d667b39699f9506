"""Checked calls of a storage, and comparisons whose messages tell its author what is wrong."""

from __future__ import annotations

import functools
import pickle
import random
import sys
import time
import traceback
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
from attrs import frozen

from modelexpress_core.contracts.storage import (
    BatchStorage,
    Completion,
    DiagnosableStorage,
    Endpoint,
    PatientStorage,
    ReadRequest,
    RunStorage,
    Storage,
)
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    NotFoundError,
    SourceChangedError,
)
from modelexpress_core.fetch.digests import new_hasher
from modelexpress_core.testing.contract import violated

__all__ = [
    "DIGESTS",
    "BatchBuffers",
    "Runs",
    "calls_of",
    "check_bytes",
    "check_class",
    "check_digest",
    "check_endpoint",
    "check_error",
    "check_final",
    "check_hidden",
    "check_patience",
    "check_runs",
    "check_waiting",
    "checked_batch",
    "checked_read",
    "checked_runs",
    "listed_paths",
    "random_content",
    "same",
    "watched_sockets",
    "with_batches",
    "with_diagnosis",
    "with_patience",
    "with_runs",
]

#: Fills buffers before a read: any other value outside the returned bytes was written by the storage.
_FILL = 0xA5
_MARGIN_BYTES = 64

#: How much longer than the patience a stalled read may take, on a busy machine.
_PATIENCE_MARGIN_SECONDS = 3.0

#: The digest algorithms that core supports.
DIGESTS = ("crc32", "crc32c", "crc64nvme", "md5", "sha1", "sha256")


def random_content(size: int, seed: int = 0) -> bytes:
    """Return random bytes, so that a read from a wrong offset is recognised."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - no secret


def same(expected: object, got: object, what: str) -> None:
    """Fail unless ``got`` equals ``expected``; ``what`` is the start of the message, which ends with ``got``."""
    __tracebackhide__ = True
    if expected != got:
        violated(f"{what} {got!r}; expected {expected!r}")


def listed_paths(storage: Storage, prefix: str) -> list[str]:
    """Return the paths that ``list`` returns."""
    return [info.path for info in storage.list(prefix)]


def calls_of(storage: Storage) -> Mapping[str, Callable[[], object]]:
    """Return one call of each operation, on an object that may or may not exist."""
    return {
        "list": lambda: list(storage.list("model")),
        "stat": lambda: storage.stat("model/object"),
        "read_into": lambda: storage.read_into("model/object", 0, memoryview(bytearray(10)), version=None),
    }


def checked_read(
    storage: Storage,
    path: str,
    offset: int,
    length: int,
    version: str | None = None,
    *,
    broken: bool = False,
) -> bytes:
    """Return the bytes that ``read_into`` wrote into a buffer of ``length`` bytes; fail if it wrote elsewhere.

    If the connection is ``broken``, the buffer may hold more bytes than were counted: core reads them again.
    """
    call = f"read_into({path!r}, {offset}, <buffer of {length} bytes>, version={version!r})"
    return _filled(call, length, lambda buffer: storage.read_into(path, offset, buffer, version=version), broken=broken)


@frozen
class Runs:
    """The arguments of a call of ``read_runs``.

    Attributes:
        offset: First byte of the first run.
        run_bytes: Length of a run.
        stride_bytes: From the start of a run to the start of the next.
        number: Number of runs.
    """

    offset: int
    run_bytes: int
    stride_bytes: int
    number: int

    def __str__(self) -> str:
        return f"{self.number} runs of {self.run_bytes} bytes, every {self.stride_bytes} bytes from {self.offset} on"


def checked_runs(storage: RunStorage, path: str, runs: Runs, version: str | None = None) -> bytes:
    """Return the bytes that ``read_runs`` wrote into a buffer; fail if it wrote elsewhere.

    A part of a run may follow the runs that were counted.
    """
    call = f"read_runs({path!r}, {runs.offset}, {runs.run_bytes}, {runs.stride_bytes}, ..., version={version!r})"

    def read(buffer: memoryview) -> int:
        return storage.read_runs(path, runs.offset, runs.run_bytes, runs.stride_bytes, buffer, version=version)

    got = _filled(call, runs.number * runs.run_bytes, read, broken=True)
    if len(got) % runs.run_bytes:
        violated(f"{call} returned {len(got)}, which is not a multiple of the run length")
    return got


class BatchBuffers:
    """Requests of a batch whose buffers lie in one memory, with margins between them that no read may write to.

    Args:
        ranges: Path, offset, length and version of each request.
    """

    def __init__(self, ranges: Sequence[tuple[str, int, int, str | None]]) -> None:
        self._starts = []
        end = _MARGIN_BYTES
        for _, _, length, _ in ranges:
            self._starts.append(end)
            end += length + _MARGIN_BYTES
        self._memory = bytearray([_FILL]) * end
        view = memoryview(self._memory)
        self.requests = [
            ReadRequest(path, offset, view[start : start + length], version)
            for (path, offset, length, version), start in zip(ranges, self._starts, strict=True)
        ]

    def content(self, index: int) -> bytes:
        """The content of the buffer of request ``index``."""
        return bytes(self.requests[index].buffer)

    def check_margins(self) -> None:
        """Fail if a read wrote outside the buffers."""
        end = 0
        for start, request in zip(self._starts, self.requests, strict=True):
            margin = self._memory[end:start]
            if margin.count(_FILL) != len(margin):
                violated(
                    f"read_batch wrote outside the buffer of {request!r}, before its start or behind the one before"
                )
            end = start + len(request.buffer)
        if self._memory[end:].count(_FILL) != _MARGIN_BYTES:
            violated("read_batch wrote behind the last buffer")


def checked_batch(
    storage: BatchStorage, buffers: BatchBuffers, check: Callable[[int, bytes], object] = lambda _index, _got: None
) -> Mapping[int, BackendError]:
    """Read a batch, and return the errors of its requests, by index; fail if a completion is missing or repeated.

    Args:
        storage: The storage under test.
        buffers: The requests.
        check: Called with each request that completes without an error, and the content of its buffer at that time.
    """
    number = len(buffers.requests)
    batch = storage.read_batch(buffers.requests)
    if not callable(getattr(batch, "close", None)):
        violated(f"read_batch returned {type(batch).__name__}, which has no close: write it as a generator")
    done: dict[int, bytes] = {}
    errors: dict[int, BackendError] = {}
    try:
        for completion in batch:
            index = _checked_index(completion, {*done, *errors}, number)
            if completion.error is None:
                done[index] = buffers.content(index)
                check(index, done[index])
            else:
                errors[index] = completion.error
    except BackendError as exc:
        errors = {**dict.fromkeys(set(range(number)) - done.keys(), exc), **errors}
    missing = set(range(number)) - done.keys() - errors.keys()
    if missing:
        violated(f"read_batch ended without a completion of {len(missing)} of {number} requests: {sorted(missing)[:9]}")
    buffers.check_margins()
    for index, content in done.items():
        if buffers.content(index) != content:
            violated(f"read_batch wrote to the buffer of request {index} after it had yielded it")
    return errors


def _checked_index(completion: object, ended: Container[int], number: int) -> int:
    """Return the index of a completion; fail unless it is that of a request that has not ended."""
    if not isinstance(completion, Completion):
        violated(f"read_batch yielded {type(completion).__name__}, not Completion")
    if completion.index in ended:
        violated(f"read_batch yielded request {completion.index} twice")
    if not 0 <= completion.index < number:
        violated(f"read_batch yielded request {completion.index}, and has the requests 0 to {number - 1}")
    return completion.index


def _filled(call: str, length: int, read: Callable[[memoryview], object], *, broken: bool) -> bytes:
    """Return the bytes that ``read`` wrote into a buffer; if ``broken``, it may have written more than it counted."""
    memory = bytearray([_FILL]) * (length + 2 * _MARGIN_BYTES)
    count = read(memoryview(memory)[_MARGIN_BYTES : _MARGIN_BYTES + length])
    if not isinstance(count, int) or not 0 <= count <= length:
        violated(f"{call} returned {count!r}; it must return the number of bytes that it wrote, from 0 to {length}")
    allowed = length if broken else count
    rest = memory[_MARGIN_BYTES + allowed :] + memory[:_MARGIN_BYTES]
    if rest.count(_FILL) != len(rest):
        violated(f"{call} returned {count}, but wrote outside the first {allowed} bytes of the buffer")
    return bytes(memory[_MARGIN_BYTES : _MARGIN_BYTES + count])


def check_bytes(content: bytes, offset: int, got: bytes, path: str, length: int | None = None) -> None:
    """Compare ``got`` with the bytes at ``offset`` of ``content``, and its length with ``length`` if that is given."""
    __tracebackhide__ = True
    expected = content[offset : offset + len(got)]
    if expected != got:
        wrong = (index for index, (one, other) in enumerate(zip(expected, got, strict=False)) if one != other)
        first = next(wrong, len(expected))
        message = f"a read of {path} at {offset} returned wrong bytes, the first of them at {offset + first}"
        elsewhere = content.find(got) if len(got) > 7 else -1
        if elsewhere >= 0:
            message += f": they are the bytes at {elsewhere}"
        elif got.count(_FILL) == len(got):
            message += ": the buffer was not written"
        violated(message)
    if length is not None and len(got) != length:
        violated(f"a read of {path} at {offset} returned {len(got)} of {length} bytes although no connection broke")


def check_runs(content: bytes, runs: Runs, got: bytes, path: str, number: int | None = None) -> None:
    """Compare ``got`` with runs of ``content``, and their number with ``number`` if that is given."""
    __tracebackhide__ = True
    for index in range(len(got) // runs.run_bytes):
        position = runs.offset + index * runs.stride_bytes
        run = got[index * runs.run_bytes : (index + 1) * runs.run_bytes]
        if run != content[position : position + runs.run_bytes]:
            problem = "not written" if run.count(_FILL) == len(run) else "wrong"
            violated(f"read_runs of {path}, {runs}: run {index}, at {position}, is {problem}")
    if number is not None and len(got) != number * runs.run_bytes:
        returned = len(got) // runs.run_bytes
        violated(f"read_runs of {path}, {runs}, returned {returned}, although the object holds {number} whole runs")


def check_digest(content: bytes, algorithm: str, digest: str) -> None:
    """Fail unless core supports the digest's algorithm, and the digest is that of ``content``."""
    __tracebackhide__ = True
    if algorithm not in DIGESTS:
        violated(f"core ignores the digest {algorithm!r}, because it is unknown; known are {', '.join(DIGESTS)}")
    hasher = new_hasher(algorithm)
    hasher.update(memoryview(content))
    expected = hasher.hexdigest()
    hint = ""
    if digest.lower() == expected:
        hint = " (write it in lower case)"
    elif len(digest) != len(expected):
        hint = (
            f" (it has {len(digest)} characters, not {len(expected)} hex digits: is it base64, or are zeros missing?)"
        )
    elif digest == bytes.fromhex(expected)[::-1].hex():
        hint = " (its bytes are in the wrong order)"
    same(expected, digest, f"the published {algorithm} of the content{hint} is")


def with_batches(storage: Storage) -> BatchStorage:
    """Return ``storage`` if it reads batches; otherwise skip the test."""
    if not hasattr(storage, "read_batch"):
        pytest.skip("the storage has no read_batch (see BatchStorage)")
    return cast("BatchStorage", storage)


def with_runs(storage: Storage) -> RunStorage:
    """Return ``storage`` if it reads runs; otherwise skip the test."""
    if not hasattr(storage, "read_runs"):
        pytest.skip("the storage has no read_runs (see RunStorage)")
    return cast("RunStorage", storage)


def with_patience(storage: Storage) -> PatientStorage:
    """Return ``storage`` if it has ``patience_seconds``; otherwise skip the test."""
    if not hasattr(storage, "patience_seconds"):
        pytest.skip("the storage has no patience_seconds (see PatientStorage)")
    return cast("PatientStorage", storage)


def with_diagnosis(storage: Storage) -> DiagnosableStorage:
    """Return ``storage`` if it has ``endpoint`` and ``credentials``; otherwise skip the test."""
    lacking = [name for name in ("endpoint", "credentials") if not callable(getattr(storage, name, None))]
    if len(lacking) == 1:
        violated(f"the storage has no {lacking[0]}; a DiagnosableStorage needs endpoint and credentials")
    if lacking:
        pytest.skip("the storage has neither endpoint nor credentials (see DiagnosableStorage)")
    return cast("DiagnosableStorage", storage)


def check_waiting(storage: PatientStorage, path: str) -> None:
    """Read an object that never sends a byte; fail unless the read ends in time with DeadlineError."""
    patience, begun = storage.patience_seconds, time.monotonic()
    try:
        got = checked_read(storage, path, 0, 1000, broken=True)
    except BackendError as exc:
        check_class(exc, (DeadlineError,), "a read that received no byte")
        if not exc.retryable:
            violated("the DeadlineError is not retryable, so that one dead connection would end a load", exc)
    else:
        if not got:
            violated("a read that received no byte returned 0; it must raise DeadlineError")
    waited = time.monotonic() - begun
    if not 0.8 * patience <= waited <= patience + _PATIENCE_MARGIN_SECONDS:
        violated(f"with patience_seconds = {patience:g}, a read that received no byte ended after {waited:.1f} s")


def check_patience(storage: PatientStorage, most: float | None) -> None:
    """Fail unless the patience is a positive number of seconds, and at most ``most``."""
    __tracebackhide__ = True
    seconds: object = storage.patience_seconds
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not seconds > 0:
        violated(f"patience_seconds is {seconds!r}; it must be a positive number")
    if most is not None and seconds > most:
        violated(f"patience_seconds was set to {most:g}, but is {seconds:g}")


def check_endpoint(endpoint: object) -> None:
    """Fail unless ``endpoint`` is an Endpoint with usable fields."""
    __tracebackhide__ = True
    if not isinstance(endpoint, Endpoint):
        violated(f"endpoint returned {type(endpoint).__name__}, not Endpoint")
    host, port, proxy = endpoint.host, endpoint.port, endpoint.proxy
    if not isinstance(host, str) or not host or set(host) & set("/@[] "):
        violated(f"the host of the endpoint is {host!r}; it must be a host name or an address alone")
    if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
        violated(f"the port of the endpoint is {port!r}; if the URL has none, use 443 or 80")
    if not isinstance(endpoint.tls, bool):
        violated(f"tls of the endpoint is {endpoint.tls!r}; it must be True or False")
    if proxy is not None and ("://" not in proxy or "@" in proxy):
        violated("the proxy of the endpoint is not a URL without credentials: http://host:port")


def check_class(error: BackendError, kinds: tuple[type[BackendError], ...], what: str) -> None:
    """Fail unless ``error`` is one of ``kinds``, and not retryable if its class never is."""
    __tracebackhide__ = True
    if not isinstance(error, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        violated(f"{what} raised {type(error).__name__} ({error}); it must raise {names}", error)
    if isinstance(error, (NotFoundError, SourceChangedError, AccessDeniedError)):
        check_final(error, what)


def check_final(error: BackendError, what: str) -> None:
    """Fail if ``error`` is retryable."""
    __tracebackhide__ = True
    if error.retryable:
        violated(
            f"{what} raised a {type(error).__name__} that is retryable, so that core would retry in vain: {error}",
            error,
        )


def check_error(error: BackendError, secrets: Sequence[str]) -> None:
    """Check the rules for every error of a storage: its fields, pickling, no credentials."""
    __tracebackhide__ = True
    for name in ("provider", "uri", "operation"):
        if not getattr(error, name):
            violated(f"{type(error).__name__} without {name}=...: {error}", error)
    if "://" not in error.uri:
        violated(f"the error's uri is {error.uri!r}; pass str(ModelURI(...)), which hides credentials", error)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - pickled on the same line
    same((type(error), str(error)), (type(copy), str(copy)), "after pickling, the error is")
    for link in _chain(error):
        text = "".join(traceback.TracebackException.from_exception(link).format_exception_only())
        check_hidden(f"{text} {link!r} {vars(link)!r}", secrets, f"a {type(link).__name__}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and the errors that a traceback shows before it."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def check_hidden(text: str, secrets: Sequence[str], where: str) -> None:
    """Fail if ``text`` contains one of ``secrets``."""
    __tracebackhide__ = True
    for number, secret in enumerate(secrets):
        if secret in text:
            violated(f"{where} shows a credential (number {number} of the fixture `secrets`)")


#: Connections and look-ups in the current ``watched_sockets`` block; None outside.
_socket_events: list[str] | None = None


@functools.cache
def _audit_sockets() -> None:
    """Record connections and look-ups in ``_socket_events``. Audit hooks cannot be removed: this adds it once."""

    def record(event: str, args: tuple[Any, ...]) -> None:
        events = _socket_events
        if events is not None and event in {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname"}:
            address = args[1] if event == "socket.connect" else args[0]
            events.append(f"{event} {address!r}"[:200])

    sys.addaudithook(record)


@contextmanager
def watched_sockets() -> Iterator[Sequence[str]]:
    """Yield a list of the connections and look-ups that Python makes during the block."""
    global _socket_events  # noqa: PLW0603 - the hook lives as long as the process
    _audit_sockets()
    events: list[str] = []
    _socket_events = events
    try:
        yield events
    finally:
        _socket_events = None
