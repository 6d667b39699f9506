"""A storage that wraps another and fails as networks and servers do, with a reproducible sequence of faults."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, cast, get_args

import attrs
from attrs import field, frozen

from modelexpress_core.contracts.storage import ObjectInfo, RunStorage, Storage
from modelexpress_core.errors import BackendError, DeadlineError, SourceChangedError, ThrottledError, UnavailableError
from modelexpress_core.messages import byte_range

__all__ = ["Fault", "FaultPolicy", "FaultyStorage"]

#: The faults that a call can have; :class:`FaultPolicy` describes them.
Fault = Literal["reset", "truncation", "unavailable", "throttled", "stall", "flipped_bit", "changed"]

_FAULTS: tuple[Fault, ...] = get_args(Fault)

#: Faults of calls that read no bytes.
_WITHOUT_BYTES = frozenset({"reset", "unavailable", "throttled", "stall", "changed"})

_INVERTED = bytes(255 - value for value in range(256))

_Operation = Literal["list", "stat", "read_into", "read_runs"]

_READS: tuple[_Operation, ...] = ("read_into", "read_runs")


def _share() -> float:
    return field(default=0.0, validator=[attrs.validators.ge(0.0), attrs.validators.le(1.0)])


@frozen(kw_only=True)
class FaultPolicy:
    """Which faults occur, and how often.

    A share is a probability from 0 to 1. The fault of a call depends only on ``seed``, the operation, the path, the
    offset, and the number of equal calls before it: the same load has the same faults, however its threads are
    scheduled.

    Reads are calls of ``read_into``, and of ``read_runs`` if the storage has it. A short ``read_runs`` ends with a
    whole run.

    Attributes:
        reset: Share of reads whose connection breaks: they are short, and the read that continues at their end fails
            with UnavailableError. If it breaks before the first byte, the read itself fails.
        truncation: Share of reads whose stream ends early, as if it were complete: they are short.
        unavailable: Share of calls that fail with UnavailableError, as for HTTP 503.
        throttled: Share of calls that fail with ThrottledError, as for HTTP 429.
        stall: Share of calls that wait for ``stall_seconds``, or until the storage is closed. Reads wait only for the
            storage's ``patience_seconds``, and then fail with DeadlineError.
        flipped_bit: Share of reads with one wrong bit and no error.
        changed: Share of calls before which the object is replaced by another of the same size: its bytes are
            inverted, its version differs, and reads of the old version fail with SourceChangedError.
        first: Faults of the first calls, in order; None is no fault. The shares apply to later calls.
        operations: The operations that can have faults.
        most: Maximum number of faults in all; None for no limit.
        stall_seconds: Duration of a stall; None for a stall that lasts until the storage is closed.
        retry_after_seconds: The waiting time in a ThrottledError.
        latency_seconds: Delay of every call.
        bytes_per_second: Limit for each read; None for no limit.
        total_bytes_per_second: Limit for all reads together; None for no limit.
        seed: Seed of the random choice of faults.
    """

    reset: float = _share()
    truncation: float = _share()
    unavailable: float = _share()
    throttled: float = _share()
    stall: float = _share()
    flipped_bit: float = _share()
    changed: float = _share()
    first: Sequence[Fault | None] = field(
        default=(),
        converter=tuple,
        validator=attrs.validators.deep_iterable(attrs.validators.in_((*_FAULTS, None))),
    )
    operations: frozenset[_Operation] = field(default=frozenset(_READS), converter=frozenset)
    most: int | None = None
    stall_seconds: float | None = None
    retry_after_seconds: float | None = None
    latency_seconds: float = field(default=0.0, validator=attrs.validators.ge(0.0))
    bytes_per_second: float | None = field(default=None, validator=attrs.validators.optional(attrs.validators.gt(0)))
    total_bytes_per_second: float | None = field(
        default=None, validator=attrs.validators.optional(attrs.validators.gt(0))
    )
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        """Refuse shares above 1 in all, and unknown operations."""
        if math.fsum(self.shares.values()) > 1:
            message = f"the shares of a FaultPolicy add up to more than 1: {dict(self.shares)}"
            raise ValueError(message)
        known = get_args(_Operation)
        unknown = sorted(self.operations - {*known})
        if unknown:
            message = f"unknown operations of a FaultPolicy: {', '.join(unknown)}; known are {', '.join(known)}"
            raise ValueError(message)

    @property
    def shares(self) -> Mapping[Fault, float]:
        """The share of each fault."""
        return {fault: getattr(self, fault) for fault in _FAULTS}


@frozen
class _Read:
    """A read of runs. A read of one range counts as runs of one byte without gaps.

    Attributes:
        kind: The method.
        operation: The operation in words, for error messages.
        path: Path of the object.
        offset: First byte.
        run_bytes: Length of a run.
        stride_bytes: From the start of a run to the start of the next.
    """

    kind: _Operation
    operation: str
    path: str
    offset: int
    run_bytes: int
    stride_bytes: int


class FaultyStorage:
    """Wraps ``inner``, and adds the faults of ``policy``. Thread-safe if ``inner`` is.

    It reads runs if ``inner`` does, and is a ``PatientStorage``.

    Example:
        >>> from modelexpress_core.storage.memory import MemoryStorage
        >>> inner = MemoryStorage()
        >>> _ = inner.put("weights", bytes(100))
        >>> storage = FaultyStorage(inner, FaultPolicy(first=["truncation"], seed=1))
        >>> storage.read_into("weights", 0, memoryview(bytearray(100)), version=None) < 100
        True
        >>> storage.read_into("weights", 0, memoryview(bytearray(100)), version=None)
        100
        >>> storage.injected
        Counter({'truncation': 1})

    Args:
        inner: The wrapped storage, which ``close`` closes.
        policy: The faults.
    """

    def __init__(self, inner: Storage, policy: FaultPolicy) -> None:
        self._inner = inner
        self._patience_seconds: float = getattr(inner, "patience_seconds", math.inf)
        if hasattr(inner, "read_runs"):
            self.read_runs = self._read_runs
        self._policy = policy
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._drawn = 0
        self._injected: Counter[Fault] = Counter()
        self._asked: Counter[tuple[str, str, int]] = Counter()
        self._broken: set[tuple[str, int]] = set()
        self._replaced: Counter[str] = Counter()
        self._line_free_at = 0.0

    @property
    def patience_seconds(self) -> float:
        """How long reads wait for the next byte; also set on the inner storage if that is a ``PatientStorage``."""
        return self._patience_seconds

    @patience_seconds.setter
    def patience_seconds(self, seconds: float) -> None:
        self._patience_seconds = seconds
        if hasattr(self._inner, "patience_seconds"):
            self._inner.patience_seconds = seconds

    @property
    def injected(self) -> Counter[Fault]:
        """How often each fault has occurred."""
        with self._lock:
            return self._injected.copy()

    @property
    def calls(self) -> Counter[str]:
        """How often each operation was called."""
        with self._lock:
            return self._calls.copy()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List objects of the inner storage; a reset ends the listing after some of them."""
        fault, chance = self._draw("list", prefix, 0)
        self._wait("list", prefix, fault)
        found = [self._with_version(info) for info in self._inner.list(prefix)]
        if fault == "reset":
            yield from found[: chance.randrange(len(found) + 1)]
            raise self._error(UnavailableError, "the connection was reset [injected]", "list", prefix)
        yield from found

    def stat(self, path: str) -> ObjectInfo:
        """Return the inner storage's information, or raise the fault."""
        fault, _ = self._draw("stat", path, 0)
        self._wait("stat", path, fault)
        if fault == "reset":
            raise self._error(UnavailableError, "the connection was reset [injected]", "stat", path)
        return self._with_version(self._inner.stat(path))

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Read from the inner storage, or with a fault."""
        operation = f"read {byte_range(offset, len(buffer))}"

        def read(wanted: int, inner_version: str | None) -> int:
            return self._inner.read_into(path, offset, buffer[:wanted], version=inner_version)

        call = _Read("read_into", operation, path, offset, 1, 1)
        return self._read(call, buffer, version, read)

    def _read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        """Read from the inner storage, or with a fault."""
        inner = cast("RunStorage", self._inner)
        operation = f"read runs of {run_bytes} bytes from {offset} on"

        def read(wanted: int, inner_version: str | None) -> int:
            return inner.read_runs(path, offset, run_bytes, stride_bytes, buffer[:wanted], version=inner_version)

        call = _Read("read_runs", operation, path, offset, run_bytes, stride_bytes)
        return self._read(call, buffer, version, read)

    def _read(
        self, call: _Read, buffer: memoryview, version: str | None, read: Callable[[int, str | None], int]
    ) -> int:
        """Call ``read`` with a number of bytes and a version, and apply the call's fault."""
        operation, path = call.operation, call.path
        with self._lock:
            broken = (path, call.offset) in self._broken
            self._broken.discard((path, call.offset))
        if broken:
            raise self._error(UnavailableError, "the connection was reset [injected]", operation, path)
        fault, chance = self._draw(call.kind, path, call.offset)
        self._wait(operation, path, fault, self.patience_seconds)
        begun = time.monotonic()
        inner_version, replaced = self._pinned(path, version, operation)
        wanted = len(buffer)
        if fault in {"reset", "truncation"}:
            runs = chance.randrange(wanted // call.run_bytes)
            wanted = runs * call.run_bytes
            if fault == "reset" and wanted:
                with self._lock:
                    self._broken.add((path, call.offset + runs * call.stride_bytes))
        if not wanted:
            if fault == "reset":
                raise self._error(UnavailableError, "the connection was reset [injected]", operation, path)
            return 0
        count = read(wanted, inner_version)
        if replaced % 2:
            buffer[:count] = bytes(buffer[:count]).translate(_INVERTED)
        if fault == "flipped_bit" and count:
            buffer[chance.randrange(count)] ^= 1 << chance.randrange(8)
        self._sleep(self._arrives_at(count, begun) - time.monotonic(), operation, path)
        return count

    def close(self) -> None:
        """Close the inner storage, and end all waiting calls."""
        self._closed.set()
        self._inner.close()

    def replace(self, path: str) -> None:
        """Replace the object at ``path`` as the fault ``changed`` does: other bytes, same size, another version."""
        with self._lock:
            self._replaced[path] += 1

    # -- faults -------------------------------------------------------------------------------------------------------

    def _draw(self, operation: _Operation, path: str, offset: int) -> tuple[Fault | None, random.Random]:
        """Return the fault of this call, and the random generator for its other random choices."""
        policy = self._policy
        with self._lock:
            self._calls[operation] += 1
            if operation not in policy.operations:
                return None, random.Random(0)  # noqa: S311 - faults are no secrets
            again = self._asked[operation, path, offset]
            self._asked[operation, path, offset] += 1
            chance = random.Random(f"{policy.seed} {operation} {path} {offset} {again}")  # noqa: S311 - as above
            fault: Fault | None = None
            if self._drawn < len(policy.first):
                fault = policy.first[self._drawn]
            elif any(policy.shares.values()):
                none = 1 - math.fsum(policy.shares.values())
                fault = chance.choices([*_FAULTS, None], [*policy.shares.values(), max(none, 0.0)])[0]
            self._drawn += 1
            if fault is None or (operation not in _READS and fault not in _WITHOUT_BYTES):
                return None, chance
            if policy.most is not None and self._injected.total() >= policy.most:
                return None, chance
            self._injected[fault] += 1
            if fault == "changed":
                self._replaced[path] += 1
            return fault, chance

    def _wait(self, operation: str, path: str, fault: Fault | None, patience_seconds: float = math.inf) -> None:
        """Wait for latency or stall, and raise the fault if the call does not reach the inner storage."""
        silence = self._policy.latency_seconds
        if fault == "stall":
            silence += math.inf if self._policy.stall_seconds is None else self._policy.stall_seconds
        self._sleep(min(silence, patience_seconds), operation, path)
        if silence > patience_seconds:
            reason = f"no answer for {patience_seconds:g} s [injected]"
            raise self._error(DeadlineError, reason, operation, path)
        if fault == "unavailable":
            raise self._error(UnavailableError, "HTTP 503 [injected]", operation, path)
        if fault == "throttled":
            reason, after = "HTTP 429 [injected]", self._policy.retry_after_seconds
            raise self._error(ThrottledError, reason, operation, path, retry_after_seconds=after)

    def _arrives_at(self, count: int, begun: float) -> float:
        """Return when the last of ``count`` bytes arrives, if sending starts at ``begun`` or when the line is free."""
        alone, together = self._policy.bytes_per_second, self._policy.total_bytes_per_second
        arrival = begun if alone is None else begun + count / alone
        if together is None:
            return arrival
        with self._lock:
            self._line_free_at = max(begun, self._line_free_at) + count / together
            return max(arrival, self._line_free_at)

    def _sleep(self, seconds: float, operation: str, path: str) -> None:
        """Wait; raise if the storage is closed meanwhile."""
        if seconds > 0 and self._closed.wait(None if math.isinf(seconds) else seconds):
            raise self._error(BackendError, "the storage was closed", operation, path)

    def _pinned(self, path: str, version: str | None, operation: str) -> tuple[str | None, int]:
        """Return the inner storage's version for ``version``, and how often the object was replaced."""
        with self._lock:
            replaced = self._replaced[path]
        if version is None or not replaced:
            return version, replaced
        start, mark, number = version.rpartition("+replaced-")
        if not mark or number != str(replaced):
            reason = "the object was replaced since the load began [injected]"
            raise self._error(SourceChangedError, reason, operation, path)
        return start, replaced

    def _with_version(self, info: ObjectInfo) -> ObjectInfo:
        """Return ``info`` with the version of this storage; without digests if the object was replaced."""
        with self._lock:
            replaced = self._replaced[info.path]
        if not replaced:
            return info
        version = None if info.version is None else f"{info.version}+replaced-{replaced}"
        return attrs.evolve(info, version=version, digests={})

    @staticmethod
    def _error(
        kind: type[BackendError],
        reason: str,
        operation: str,
        path: str,
        *,
        retry_after_seconds: float | None = None,
    ) -> BackendError:
        return kind(
            reason,
            uri=f"faulty://{path}" if "://" not in path else path,
            operation=operation,
            provider="modelexpress-core",
            retry_after_seconds=retry_after_seconds,
        )
