"""Checked calls of a storage, and comparisons whose messages explain the mistake to its author."""

from __future__ import annotations

import functools
import pickle
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
from attrs import frozen

from modelexpress_core.contracts.storage import DiagnosableStorage, Endpoint, PatientStorage, RunStorage, Storage
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
    "checked_read",
    "checked_runs",
    "listed_paths",
    "random_content",
    "same",
    "watched_sockets",
    "with_diagnosis",
    "with_patience",
    "with_runs",
]

#: The content of buffers before a read. Other bytes outside of the range of the read were written by mistake.
_FILL = 0xA5
_MARGIN_BYTES = 64

#: How much longer than its patience a silent read may take on a busy machine.
_OVERTIME_SECONDS = 3.0

#: Names of the digests that core supports.
DIGESTS = ("crc32", "crc32c", "crc64nvme", "md5", "sha1", "sha256")


def random_content(size: int, seed: int = 0) -> bytes:
    """Pseudo-random bytes, so that a piece identifies its position."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - no secret


def same(expected: object, got: object, what: str) -> None:
    """Check that ``got`` equals ``expected``; ``what`` begins the message, and ``got`` follows."""
    __tracebackhide__ = True
    if expected != got:
        violated(f"{what} {got!r}; expected {expected!r}")


def listed_paths(storage: Storage, prefix: str) -> list[str]:
    """The paths that ``list`` returns."""
    return [info.path for info in storage.list(prefix)]


def calls_of(storage: Storage) -> Mapping[str, Callable[[], object]]:
    """One call of each operation, on an object that may not exist."""
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
    """The bytes that ``read_into`` wrote to a buffer of ``length`` bytes, after a check that it wrote no others.

    If the connection is ``broken``, the buffer may have more bytes than were counted: core reads them again.
    """
    call = f"read_into({path!r}, {offset}, <buffer of {length} bytes>, version={version!r})"
    return _filled(call, length, lambda buffer: storage.read_into(path, offset, buffer, version=version), broken=broken)


@frozen
class Runs:
    """The arguments of ``read_runs``.

    Attributes:
        offset: First byte of the first run.
        run_bytes: Length of a run.
        stride_bytes: Distance from the start of a run to the start of the next.
        number: Number of runs.
    """

    offset: int
    run_bytes: int
    stride_bytes: int
    number: int

    def __str__(self) -> str:
        return f"{self.number} runs of {self.run_bytes} bytes, every {self.stride_bytes} bytes from {self.offset} on"


def checked_runs(storage: RunStorage, path: str, runs: Runs, version: str | None = None) -> bytes:
    """The bytes that ``read_runs`` wrote to a buffer, after a check that it wrote no others.

    A part of a run may follow the counted runs.
    """
    call = f"read_runs({path!r}, {runs.offset}, {runs.run_bytes}, {runs.stride_bytes}, ..., version={version!r})"

    def read(buffer: memoryview) -> int:
        return storage.read_runs(path, runs.offset, runs.run_bytes, runs.stride_bytes, buffer, version=version)

    got = _filled(call, runs.number * runs.run_bytes, read, broken=True)
    if len(got) % runs.run_bytes:
        violated(f"{call} returned {len(got)}, which is no number of whole runs")
    return got


def _filled(call: str, length: int, read: Callable[[memoryview], object], *, broken: bool) -> bytes:
    """The bytes that ``read`` wrote to a buffer of ``length`` bytes. If ``broken``, uncounted bytes may follow."""
    memory = bytearray([_FILL]) * (length + 2 * _MARGIN_BYTES)
    count = read(memoryview(memory)[_MARGIN_BYTES : _MARGIN_BYTES + length])
    if not isinstance(count, int) or not 0 <= count <= length:
        violated(f"{call} returned {count!r}; it returns the number of bytes that it wrote, from 0 to {length}")
    allowed = length if broken else count
    rest = memory[_MARGIN_BYTES + allowed :] + memory[:_MARGIN_BYTES]
    if rest.count(_FILL) != len(rest):
        violated(f"{call} returned {count}, and wrote outside of the first {allowed} bytes of the buffer")
    return bytes(memory[_MARGIN_BYTES : _MARGIN_BYTES + count])


def check_bytes(content: bytes, offset: int, got: bytes, path: str, length: int | None = None) -> None:
    """Compare ``got`` with ``content`` at ``offset``, and its length with ``length`` if given."""
    __tracebackhide__ = True
    expected = content[offset : offset + len(got)]
    if expected != got:
        wrong = (place for place, (one, other) in enumerate(zip(expected, got, strict=False)) if one != other)
        place = next(wrong, len(expected))
        message = f"a read of {path} at {offset} brought wrong bytes, the first of them at {offset + place}"
        elsewhere = content.find(got) if len(got) > 7 else -1
        if elsewhere >= 0:
            message += f": they are those that begin at {elsewhere}"
        elif got.count(_FILL) == len(got):
            message += ": nothing was written into the buffer"
        violated(message)
    if length is not None and len(got) != length:
        violated(f"a read of {path} at {offset} brought {len(got)} of {length} bytes although nothing broke")


def check_runs(content: bytes, runs: Runs, got: bytes, path: str, number: int | None = None) -> None:
    """Compare ``got`` with runs of ``content``, and their number with ``number`` if given."""
    __tracebackhide__ = True
    for index in range(len(got) // runs.run_bytes):
        position = runs.offset + index * runs.stride_bytes
        run = got[index * runs.run_bytes : (index + 1) * runs.run_bytes]
        if run != content[position : position + runs.run_bytes]:
            found = "nothing was written for" if run.count(_FILL) == len(run) else "other bytes came for"
            violated(f"read_runs of {path}, {runs}: {found} run {index}, which is at {position}")
    if number is not None and len(got) != number * runs.run_bytes:
        brought = len(got) // runs.run_bytes
        violated(f"read_runs of {path}, {runs}, brought {brought}, although {number} are there as a whole")


def check_digest(content: bytes, algorithm: str, digest: str) -> None:
    """Check that core supports the digest, and that it is the digest of ``content``."""
    __tracebackhide__ = True
    if algorithm not in DIGESTS:
        violated(f"a digest is called {algorithm!r}, which core ignores; it supports {', '.join(DIGESTS)}")
    hasher = new_hasher(algorithm)
    hasher.update(memoryview(content))
    expected = hasher.hexdigest()
    slip = ""
    if digest.lower() == expected:
        slip = " (write it in lower case)"
    elif len(digest) != len(expected):
        slip = f" (that is {len(digest)} characters, not {len(expected)} of hex: is it base64, or are zeros missing?)"
    elif digest == bytes.fromhex(expected)[::-1].hex():
        slip = " (its bytes are in the wrong order)"
    same(expected, digest, f"the {algorithm} of the content is given{slip} as")


def with_runs(storage: Storage) -> RunStorage:
    """``storage``, if it reads runs; else skips the test."""
    if not hasattr(storage, "read_runs"):
        pytest.skip("the storage has no read_runs (see RunStorage)")
    return cast("RunStorage", storage)


def with_patience(storage: Storage) -> PatientStorage:
    """``storage``, if it has ``patience_seconds``; else skips the test."""
    if not hasattr(storage, "patience_seconds"):
        pytest.skip("the storage has no patience_seconds (see PatientStorage)")
    return cast("PatientStorage", storage)


def with_diagnosis(storage: Storage) -> DiagnosableStorage:
    """``storage``, if it reports endpoint and credentials; else skips the test."""
    lacking = [name for name in ("endpoint", "credentials") if not callable(getattr(storage, name, None))]
    if len(lacking) == 1:
        violated(f"the storage has no {lacking[0]}; a DiagnosableStorage has endpoint and credentials")
    if lacking:
        pytest.skip("the storage has neither endpoint nor credentials (see DiagnosableStorage)")
    return cast("DiagnosableStorage", storage)


def check_waiting(storage: PatientStorage, path: str) -> None:
    """Read bytes that never arrive, and check when and how the read ends."""
    patience, begun = storage.patience_seconds, time.monotonic()
    try:
        got = checked_read(storage, path, 0, 1000, broken=True)
    except BackendError as exc:
        check_class(exc, (DeadlineError,), "a read to which no byte came")
        if not exc.retryable:
            violated("the DeadlineError is not retryable, so that one dead connection would end a load", exc)
    else:
        if not got:
            violated("a read to which no byte came returned 0; it must raise DeadlineError")
    waited = time.monotonic() - begun
    if not 0.8 * patience <= waited <= patience + _OVERTIME_SECONDS:
        violated(f"with patience_seconds = {patience:g}, a read to which no byte came ended after {waited:.1f} s")


def check_patience(storage: PatientStorage, most: float | None) -> None:
    """Check that the patience is a number of seconds, and at most ``most``."""
    __tracebackhide__ = True
    seconds: object = storage.patience_seconds
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not seconds > 0:
        violated(f"patience_seconds is {seconds!r}; it is a number of seconds")
    if most is not None and seconds > most:
        violated(f"patience_seconds was set to {most:g}, and is {seconds:g}")


def check_endpoint(endpoint: object) -> None:
    """Check the fields of an Endpoint."""
    __tracebackhide__ = True
    if not isinstance(endpoint, Endpoint):
        violated(f"endpoint returned {type(endpoint).__name__}, no Endpoint")
    host, port, proxy = endpoint.host, endpoint.port, endpoint.proxy
    if not isinstance(host, str) or not host or set(host) & set("/@[] "):
        violated(f"the host of the endpoint is {host!r}; give the name or the address alone")
    if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
        violated(f"the port of the endpoint is {port!r}; where the URL has none, it is 443 or 80")
    if not isinstance(endpoint.tls, bool):
        violated(f"tls of the endpoint is {endpoint.tls!r}; it is True or False")
    if proxy is not None and ("://" not in proxy or "@" in proxy):
        violated("the proxy of the endpoint is not a URL without credentials: http://host:port")


def check_class(error: BackendError, kinds: tuple[type[BackendError], ...], what: str) -> None:
    """Check that ``error`` is one of ``kinds``, and not retryable if its class never is."""
    __tracebackhide__ = True
    if not isinstance(error, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        violated(f"{what} raised {type(error).__name__} ({error}); it must raise {names}", error)
    if isinstance(error, (NotFoundError, SourceChangedError, AccessDeniedError)):
        check_final(error, what)


def check_final(error: BackendError, what: str) -> None:
    """Check that core does not retry."""
    __tracebackhide__ = True
    if error.retryable:
        violated(
            f"{what} raised a {type(error).__name__} that is retryable, so core would retry in vain: {error}", error
        )


def check_error(error: BackendError, secrets: Sequence[str]) -> None:
    """Check the fields of an error of a storage, its pickling, and that it hides credentials."""
    __tracebackhide__ = True
    for name in ("provider", "uri", "operation"):
        if not getattr(error, name):
            violated(f"{type(error).__name__} without {name}=...: {error}", error)
    if "://" not in error.uri:
        violated(f"the error's uri is {error.uri!r}; give str(ModelURI(...)), which hides credentials", error)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - pickled here
    same((type(error), str(error)), (type(copy), str(copy)), "after pickling, the error is")
    for link in _chain(error):
        text = "".join(traceback.TracebackException.from_exception(link).format_exception_only())
        check_hidden(f"{text} {link!r} {vars(link)!r}", secrets, f"a {type(link).__name__}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and the errors that a traceback shows before it."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def check_hidden(text: str, secrets: Sequence[str], where: str) -> None:
    """Check that none of ``secrets`` is in ``text``."""
    __tracebackhide__ = True
    for number, secret in enumerate(secrets):
        if secret in text:
            violated(f"{where} shows a credential (number {number} of the fixture `secrets`)")


#: Socket operations while they are recorded; None otherwise.
_deeds: list[str] | None = None


@functools.cache
def _audit_sockets() -> None:
    """Record connections and look-ups in ``_deeds``. An audit hook cannot be removed, so it is installed once."""

    def note(event: str, args: tuple[Any, ...]) -> None:
        deeds = _deeds
        if deeds is not None and event in {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname"}:
            address = args[1] if event == "socket.connect" else args[0]
            deeds.append(f"{event} {address!r}"[:200])

    sys.addaudithook(note)


@contextmanager
def watched_sockets() -> Iterator[Sequence[str]]:
    """The socket operations of this process during the block, as far as Python sees them."""
    global _deeds  # noqa: PLW0603 - the hook is never removed
    _audit_sockets()
    deeds: list[str] = []
    _deeds = deeds
    try:
        yield deeds
    finally:
        _deeds = None
