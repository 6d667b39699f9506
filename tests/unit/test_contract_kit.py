"""The contract kit finds what it is there to find: storages that are wrong in one way each, and weakened contracts."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import hashlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import attrs
import pytest

from modelexpress_core.contracts.storage import Completion, Endpoint, ObjectInfo, ReadRequest
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    NotFoundError,
    SourceChangedError,
    UnavailableError,
)
from modelexpress_core.fetch.digests import best_digest, new_hasher
from modelexpress_core.storage.memory import MemoryStorage
from modelexpress_core.testing import StorageContract
from modelexpress_core.testing.checks import DIGESTS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("contract kit")]

SECRET = "hunter2-the-secret"

#: Wrong storage -> tests of the contract that have to fail for it.
WRONG: dict[type[Any], set[str]] = {}


class Right(MemoryStorage):
    """A storage in which nothing is wrong, for others to spoil; it can do all that is optional, too.

    ``hidden`` is a credential that it was given, unless it is ``anonymous``. The object ``silent`` never comes.
    """

    hidden = SECRET
    anonymous = False
    hang_seconds = 30.0

    def __init__(self) -> None:
        super().__init__()
        self.patience_seconds: Any = 600.0
        self.closing = threading.Event()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self.ask(prefix)
        return (attrs.evolve(info, digests=self.digests(info.path)) for info in super().list(prefix))

    def stat(self, path: str) -> ObjectInfo:
        return attrs.evolve(super().stat(path), digests=self.digests(path))

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        if path == "silent":
            return self.silence()
        return super().read_into(path, offset, buffer, version=version)

    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        for done in range(0, len(buffer), run_bytes):
            part = buffer[done : done + run_bytes]
            if self.read_into(path, offset + done // run_bytes * stride_bytes, part, version=version) < run_bytes:
                return done
        return len(buffer)

    def read_batch(self, requests: Sequence[ReadRequest]) -> Generator[Completion, None, None]:
        for index, request in reversed(list(enumerate(requests))):
            yield self.read_request(index, request)

    def read_request(self, index: int, request: ReadRequest) -> Completion:
        try:
            count = self.read_into(request.path, request.offset, request.buffer, version=request.version)
        except BackendError as exc:
            return Completion(index, exc)
        if count < len(request.buffer):
            return Completion(index, self.failure(SourceChangedError, "it ends early", request.path))
        return Completion(index)

    def digests(self, path: str) -> dict[str, str]:
        content = bytes(self._get(path, "read")[1])
        return {"md5": hashlib.md5(content).hexdigest(), "sha256": hashlib.sha256(content).hexdigest()}

    def silence(self) -> int:
        if self.closing.wait(self.patience_seconds):
            raise self.failure(BackendError, "the storage was closed")
        raise self.failure(DeadlineError, "no answer")

    def endpoint(self) -> Any:
        return Endpoint("storage.example", 443, tls=True, proxy="http://proxy.example:3128")

    def credentials(self) -> Any:
        self.ask("x")
        return f"key ...{self.hidden[-4:]}, from the settings"

    def close(self) -> None:
        self.closing.set()

    def _get(self, path: str, operation: str) -> Any:
        self.ask(path)
        return super()._get(path, operation)

    def ask(self, path: str) -> None:
        if self.anonymous:
            raise self.failure(AccessDeniedError, "no credentials were found", path)

    def failure(self, kind: type[BackendError], reason: str, path: str = "x") -> BackendError:
        return kind(reason, uri=f"memory://{path}", operation="read", provider="wrong")


def fails(*tests: str) -> Callable[[type[Right]], type[Right]]:
    """Says which tests find the fault of a class."""

    def register(cls: type[Right]) -> type[Right]:
        WRONG[cls] = {f"test_{test}" for test in tests}
        return cls

    return register


# -- reading -----------------------------------------------------------------------------------------------------------


@fails("reads_any_range", "reads_the_object_that_was_asked_for")
class OffsetIsOffByOne(Right):
    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        return super().read_into(path, offset + 1, buffer, version=version)


@fails("reads_any_range")
class OffsetIsCutTo16Bits(Right):
    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        return super().read_into(path, offset & 0xFFFF, buffer, version=version)


@fails("a_read_behind_the_end_brings_nothing")
class OffsetIsCutTo32Bits(Right):
    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        return super().read_into(path, offset & 0xFFFFFFFF, buffer, version=version)


@fails("reads_any_range", "reads_much_at_once")
class LeavesOutTheLastByte(Right):
    """As where a range's end is taken to be exclusive: each read is one byte short."""

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        return super().read_into(path, offset, buffer[: max(1, len(buffer) - 1)], version=version)


@fails("reads_much_at_once")
class ReadsEightMegabytesAtMost(Right):
    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        return super().read_into(path, offset, buffer[: 8 << 20], version=version)


@fails("reads_any_range")
class WritesBehindTheBuffer(Right):
    """Rounds up to whole pages, in whatever memory comes after the buffer."""

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        count = super().read_into(path, offset, buffer, version=version)
        whole = memoryview(buffer.obj)
        if isinstance(buffer.obj, bytearray) and len(whole) > len(buffer) + 64:
            whole[64 + len(buffer)] = 0
        return count


@fails("a_read_over_the_end_is_short")
class FillsUpWithZeros(Right):
    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        count = super().read_into(path, offset, buffer, version=version)
        buffer[count:] = bytes(len(buffer) - count)
        return count


@fails("a_read_over_the_end_is_short", "a_read_behind_the_end_brings_nothing")
class CountsWhatWasAskedFor(Right):
    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        super().read_into(path, offset, buffer, version=version)
        return len(buffer)


@fails("reads_any_range", "empty_objects")
class ReturnsNothing(Right):
    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        super().read_into(path, offset, buffer, version=version)
        return None  # type: ignore[return-value]  # that is what is wrong


@fails("reads_any_range", "reads_into_any_memory")
class ReadsIntoACopy(Right):
    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        return super().read_into(path, offset, memoryview(bytearray(buffer)), version=version)


@fails("reads_into_any_memory")
class KnowsBytearraysOnly(Right):
    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        if not isinstance(buffer.obj, bytearray):
            return len(buffer)
        return super().read_into(path, offset, buffer, version=version)


@fails("reads_the_object_that_was_asked_for")
class KeepsObjectsByTheirLastName(Right):
    """A cache whose key is the name without the directory."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, bytes] = {}

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        if self.stat(path).size != 5000:
            return super().read_into(path, offset, buffer, version=version)
        content = self.cache.setdefault(path.rpartition("/")[2], bytes(self._get(path, "read")[1]))
        buffer[:] = content[offset : offset + len(buffer)]
        return len(buffer)


@fails("unusual_names")
class DecodesNamesTwice(Right):
    def stat(self, path: str) -> ObjectInfo:
        return super().stat(path.replace("%41", "A"))

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        return super().read_into(path.replace("%41", "A"), offset, buffer, version=version)


@fails("unusual_names")
class ListsNamesEncoded(Right):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (attrs.evolve(info, path=info.path.replace(" ", "%20")) for info in super().list(prefix))


@fails("empty_objects")
class LeavesEmptyObjectsOut(Right):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (info for info in super().list(prefix) if info.size)


# -- listing and sizes -------------------------------------------------------------------------------------------------


@fails("list_takes_its_prefix_for_a_directory", "list_of_nothing_is_empty")
class ListsByTheBeginningOfNames(Right):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (info for info in super().list("") if info.path.startswith(prefix))


@fails("list_finds_objects_at_any_depth")
class ListsOneLevelOnly(Right):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (info for info in super().list(prefix) if "/" not in info.path[len(prefix) + 1 :])


@fails("list_goes_on_after_a_page")
class ListsTheFirstPageOnly(Right):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for number, info in enumerate(super().list(prefix)):
            if number < 50:
                yield info


@fails("list_goes_on_after_a_page")
class ListsAPageTwice(Right):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        infos = list(super().list(prefix))
        yield from infos[:50]
        yield from infos[49:]


@fails("list_of_the_root_finds_everything")
class ListsTheRootAsASlash(Right):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (info for info in super().list("") if info.path.startswith(f"{prefix}/"))


@fails("list_finds_objects_at_any_depth", "list_agrees_with_stat")
class ListsPathsRelativeToThePrefix(Right):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (attrs.evolve(info, path=info.path[len(prefix) + 1 :]) for info in super().list(prefix))


@fails("list_of_nothing_is_empty")
class ListsNothingAsAnError(Right):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        infos = list(super().list(prefix))
        if not infos:
            raise self.failure(NotFoundError, "nothing there")
        return iter(infos)


@fails("list_agrees_with_stat", "versions_are_what_was_declared")
class ListsWithoutVersions(Right):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (attrs.evolve(info, version=None) for info in super().list(prefix))


@fails("stat_tells_the_size", "empty_objects")
class KeepsSizes(Right):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, ObjectInfo] = {}

    def stat(self, path: str) -> ObjectInfo:
        self.sizes.setdefault(path, ObjectInfo(path, 7))
        return attrs.evolve(super().stat(path), size=self.sizes[path].size)


@fails("stat_of_nothing_is_not_found")
class FindsWhatBeginsThatWay(Right):
    def stat(self, path: str) -> ObjectInfo:
        for info in self.list(""):
            if info.path.startswith(path):
                return info
        return super().stat(path)


@fails("stat_of_a_directory_is_an_error")
class TakesDirectoriesForObjects(Right):
    def stat(self, path: str) -> ObjectInfo:
        return ObjectInfo(path, 4096, "1") if any(self.list(path)) else super().stat(path)


class WrongDigests(Right):
    algorithm = ""

    def digests(self, path: str) -> dict[str, str]:
        hasher = new_hasher(self.algorithm)
        hasher.update(self._get(path, "read")[1])
        return {**super().digests(path), self.algorithm: self.wrong(hasher.hexdigest())}

    def wrong(self, digest: str) -> str:
        return "0" * len(digest)


@fails("digests_are_those_of_the_content")
class TellsTheMD5OfSomethingElse(WrongDigests):
    algorithm = "md5"


@fails("digests_are_those_of_the_content")
class TellsTheCRC32OfSomethingElse(WrongDigests):
    algorithm = "crc32"


@fails("digests_are_those_of_the_content")
class TellsTheCRC32COfSomethingElse(WrongDigests):
    algorithm = "crc32c"


@fails("digests_are_those_of_the_content")
class TellsTheCRC64NVMEOfSomethingElse(WrongDigests):
    algorithm = "crc64nvme"


@fails("digests_are_those_of_the_content")
class TellsDigestsInBase64(WrongDigests):
    algorithm = "crc32c"

    def wrong(self, digest: str) -> str:
        return base64.b64encode(bytes.fromhex(digest)).decode()


@fails("digests_are_those_of_the_content")
class TellsDigestsInCapitals(WrongDigests):
    algorithm = "sha1"

    def wrong(self, digest: str) -> str:
        return digest.upper()


@fails("digests_are_those_of_the_content")
class TellsDigestsBackwards(WrongDigests):
    algorithm = "crc32c"

    def wrong(self, digest: str) -> str:
        return bytes.fromhex(digest)[::-1].hex()


@fails("digests_are_those_of_the_content")
class CallsDigestsByNamesOfItsOwn(Right):
    def digests(self, path: str) -> dict[str, str]:
        return {"sha-256": super().digests(path)["sha256"]}


@fails("digests_are_those_of_the_content")
class KeepsDigests(Right):
    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, dict[str, str]] = {}

    def digests(self, path: str) -> dict[str, str]:
        return self.known.setdefault(path, super().digests(path))


# -- versions ----------------------------------------------------------------------------------------------------------


@fails("a_replaced_object_is_not_read_under_its_old_version[same size]")
class IgnoresTheVersion(Right):
    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        return super().read_into(path, offset, buffer, version=None)


@fails("another_content_is_another_version", "a_replaced_object_is_not_read_under_its_old_version[same size]")
class TakesTheSizeForTheVersion(Right):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (attrs.evolve(info, version=str(info.size)) for info in super().list(prefix))

    def stat(self, path: str) -> ObjectInfo:
        info = super().stat(path)
        return attrs.evolve(info, version=str(info.size))

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        if version not in {None, str(self.stat(path).size)}:
            raise self.failure(SourceChangedError, "changed")
        return super().read_into(path, offset, buffer, version=None)


@fails("versions_are_never_mixed")
class LooksAtTheVersionOnlyBefore(Right):
    """Compares, and reads whatever is there a moment later."""

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        super().read_into(path, offset, buffer[:1], version=version)
        half = len(buffer) // 2
        super().read_into(path, offset, buffer[:half], version=None)
        time.sleep(0.002)
        return half + super().read_into(path, offset + half, buffer[half:], version=None)


@fails("a_replaced_object_is_not_read_under_its_old_version[longer]")
class TakesAChangeForAPassingFault(Right):
    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        try:
            return super().read_into(path, offset, buffer, version=version)
        except SourceChangedError as exc:
            raise self.failure(UnavailableError, "HTTP 412") from exc


@fails("without_a_version_any_is_read")
class MixesWhatItKept(Right):
    def __init__(self) -> None:
        super().__init__()
        self.start: dict[str, int] = {}

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        count = super().read_into(path, offset, buffer, version=version)
        if count and offset == 0 and version is None:
            buffer[0] = self.start.setdefault(path, buffer[0])
        return count


# -- threads and closing -----------------------------------------------------------------------------------------------


@fails("threads_do_not_disturb_each_other")
class SharesOnePosition(Right):
    """As one open file does, for which seeking and reading are two steps."""

    position = 0

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        self.position = offset
        time.sleep(0)  # whatever a seek does
        return super().read_into(path, self.position, buffer, version=version)


class Closing(Right):
    closed = False

    def close(self) -> None:
        super().close()
        self.closed = True

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        if self.closed:
            self.ended()
        return super().read_into(path, offset, buffer, version=version)

    def ended(self) -> NoReturn:
        raise self.failure(BackendError, "the storage was closed")


@fails("close_may_be_called_again")
class ClosesOnce(Closing):
    def close(self) -> None:
        if self.closed:
            raise ValueError("already closed")
        super().close()


@fails("calls_after_close_end", "close_ends_reads_in_other_threads")
class FailsForPythonReasonsAfterClose(Closing):
    def ended(self) -> NoReturn:
        raise ValueError("I/O operation on closed file")


@fails("calls_after_close_end", "close_ends_reads_in_other_threads")
class TakesBeingClosedForAPassingFault(Closing):
    def ended(self) -> NoReturn:
        raise self.failure(UnavailableError, "no connection")


@fails("calls_after_close_end", "close_ends_reads_in_other_threads")
class ReadsZerosAfterClose(Closing):
    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        if self.closed:
            buffer[:] = bytes(len(buffer))
            return len(buffer)
        return super().read_into(path, offset, buffer, version=version)


@fails("close_ends_a_read_that_waits")
class ClosesWhenReadsHaveEnded(Right):
    """``close`` waits for a lock that a read holds, and the read for a server that says nothing."""

    hang_seconds = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.using = threading.Lock()

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        with self.using:
            return super().read_into(path, offset, buffer, version=version)

    def close(self) -> None:
        with self.using:
            pass


@fails("close_ends_a_read_that_waits")
class LeavesReadsToTheirTimeout(Right):
    """``close`` ends no read: the time-out of an SDK does, sooner than ``hang_seconds``."""

    def silence(self) -> int:
        threading.Event().wait(3.0)
        raise self.failure(BackendError, "the read timed out")


# -- runs --------------------------------------------------------------------------------------------------------------


@fails("reads_any_runs")
class TakesTheStrideForTheGap(Right):
    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        return super().read_runs(path, offset, run_bytes, run_bytes + stride_bytes, buffer, version=version)


@fails("reads_any_runs")
class ReadsAThousandRunsAtMost(Right):
    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        return super().read_runs(path, offset, run_bytes, stride_bytes, buffer[: 1000 * run_bytes], version=version)


@fails("reads_any_runs")
class WritesTheLastGapBehindTheBuffer(Right):
    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        count = super().read_runs(path, offset, run_bytes, stride_bytes, buffer, version=version)
        memoryview(buffer.obj)[64 + len(buffer)] = 0
        return count


@fails("runs_over_the_end_are_short")
class CountsPartsOfRuns(Right):
    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        done = super().read_runs(path, offset, run_bytes, stride_bytes, buffer, version=version)
        if done == len(buffer):
            return done
        last = buffer[done : done + run_bytes]
        return done + self.read_into(path, offset + done // run_bytes * stride_bytes, last, version=version)


@fails("runs_over_the_end_are_short")
class FillsUpRunsWithZeros(Right):
    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        done = super().read_runs(path, offset, run_bytes, stride_bytes, buffer, version=version)
        buffer[done:] = bytes(len(buffer) - done)
        return len(buffer)


@fails("runs_over_the_end_are_short")
class TakesRunsOverTheEndForAChange(Right):
    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        done = super().read_runs(path, offset, run_bytes, stride_bytes, buffer, version=version)
        if done < len(buffer):
            raise self.failure(SourceChangedError, "it ends early")
        return done


@fails("runs_of_nothing_are_not_found")
class RaisesErrorsOfTheSystemForRuns(Right):
    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        try:
            return super().read_runs(path, offset, run_bytes, stride_bytes, buffer, version=version)
        except BackendError:
            raise FileNotFoundError(path) from None


@fails("runs_of_a_replaced_object_are_not_read_under_its_old_version")
class IgnoresTheVersionOfRuns(Right):
    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        return super().read_runs(path, offset, run_bytes, stride_bytes, buffer, version=None)


@fails("versions_are_never_mixed")
class LooksAtTheVersionOfTheFirstRunOnly(Right):
    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        super().read_runs(path, offset, run_bytes, stride_bytes, buffer[:run_bytes], version=version)
        half = len(buffer) // run_bytes // 2
        super().read_runs(path, offset, run_bytes, stride_bytes, buffer[: half * run_bytes], version=None)
        time.sleep(0.002)
        behind = offset + half * stride_bytes
        rest = buffer[half * run_bytes :]
        return half * run_bytes + super().read_runs(path, behind, run_bytes, stride_bytes, rest, version=None)


@fails("close_ends_runs_in_other_threads")
class FailsForPythonReasonsInRunsAfterClose(Closing):
    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        return super().read_runs(path, offset, run_bytes, stride_bytes, buffer, version=version)


# -- batches -----------------------------------------------------------------------------------------------------------


@fails("batches_read_every_request")
class CompletesRequestsTwice(Right):
    def read_batch(self, requests: Sequence[ReadRequest]) -> Generator[Completion, None, None]:
        for completion in super().read_batch(requests):
            yield completion
            yield completion


@fails("batches_read_every_request")
class ForgetsTheLastRequest(Right):
    def read_batch(self, requests: Sequence[ReadRequest]) -> Generator[Completion, None, None]:
        yield from super().read_batch(requests[:100])


@fails("batches_read_every_request", "batches_fail_by_request")
class CountsRequestsFromOne(Right):
    def read_request(self, index: int, request: ReadRequest) -> Completion:
        return attrs.evolve(super().read_request(index, request), index=index + 1)


@fails("batches_read_every_request", "batches_read_no_other_version")
class CompletesRequestsBeforeTheirBytesAreThere(Right):
    def read_batch(self, requests: Sequence[ReadRequest]) -> Generator[Completion, None, None]:
        yield from map(Completion, range(len(requests)))
        for _ in super().read_batch(requests):
            pass


@fails("batches_read_every_request")
class MixesUpBuffers(Right):
    def read_batch(self, requests: Sequence[ReadRequest]) -> Generator[Completion, None, None]:
        buffers = sorted((request.buffer for request in requests), key=len)
        swapped = {id(buffers[0]): buffers[1], id(buffers[1]): buffers[0]} if len(buffers) > 100 else {}
        yield from super().read_batch(
            [attrs.evolve(each, buffer=swapped.get(id(each.buffer), each.buffer)) for each in requests]
        )


@fails("batches_read_every_request")
class WritesBehindTheBuffersOfABatch(Right):
    def read_request(self, index: int, request: ReadRequest) -> Completion:
        completion = super().read_request(index, request)
        whole = memoryview(request.buffer.obj)
        address = ctypes.addressof(ctypes.c_char.from_buffer(request.buffer))
        start = address - ctypes.addressof(ctypes.c_char.from_buffer(whole))
        whole[start + len(request.buffer)] = 0
        return completion


@fails("batches_read_every_request")
class ReturnsAList(Right):
    def read_batch(self, requests: Sequence[ReadRequest]) -> Any:
        return iter(list(super().read_batch(requests)))


@fails("batches_fail_by_request")
class FailsBatchesAsAWhole(Right):
    def read_request(self, index: int, request: ReadRequest) -> Completion:
        completion = super().read_request(index, request)
        if completion.error is not None:
            raise completion.error
        return completion


@fails("batches_fail_by_request")
class CompletesRequestsOverTheEnd(Right):
    def read_request(self, index: int, request: ReadRequest) -> Completion:
        completion = super().read_request(index, request)
        return Completion(index) if isinstance(completion.error, SourceChangedError) else completion


@fails("batches_read_no_other_version")
class IgnoresTheVersionInBatches(Right):
    def read_request(self, index: int, request: ReadRequest) -> Completion:
        return super().read_request(index, attrs.evolve(request, version=None))


@fails("versions_are_never_mixed")
class LooksAtTheVersionBeforeABatchOnly(Right):
    def read_batch(self, requests: Sequence[ReadRequest]) -> Generator[Completion, None, None]:
        current = {request.path: self.stat(request.path).version for request in requests}
        for index, request in enumerate(requests):
            time.sleep(0.002)
            if request.version not in (None, current[request.path]):
                yield Completion(index, self.failure(SourceChangedError, "it was replaced", request.path))
            else:
                yield self.read_request(index, attrs.evolve(request, version=None))


@fails("a_batch_that_is_closed_writes_nothing_more")
class ReadsOnBehindTheBack(Right):
    def read_batch(self, requests: Sequence[ReadRequest]) -> Generator[Completion, None, None]:
        def read_later() -> None:
            time.sleep(0.1)
            for index, request in enumerate(requests):
                self.read_request(index, request)

        thread = threading.Thread(target=read_later)
        thread.start()
        try:
            yield from super().read_batch(requests)
        except GeneratorExit:
            return
        thread.join()


@fails("close_ends_batches_in_other_threads")
class FailsForPythonReasonsInBatchesAfterClose(Closing):
    def read_request(self, index: int, request: ReadRequest) -> Completion:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        return super().read_request(index, request)


# -- patience ----------------------------------------------------------------------------------------------------------


@fails("patience_may_be_set_while_reads_run")
class TellsPatienceAsText(Right):
    def __init__(self) -> None:
        super().__init__()
        self.patience_seconds = "30"


class WithProperty(Right):
    """Spoils what happens when patience is set."""

    seconds: Any = 600.0

    @property
    def patience_seconds(self) -> Any:  # type: ignore[override]  # as storages with clients do it
        return self.seconds

    @patience_seconds.setter
    def patience_seconds(self, seconds: Any) -> None:
        self.set_patience(seconds)

    def set_patience(self, seconds: Any) -> None:
        self.seconds = seconds


@fails("patience_may_be_set_while_reads_run", "patience_ends_a_read_that_waits")
class SetsNoPatience(WithProperty):
    hang_seconds = 5.0

    def set_patience(self, seconds: Any) -> None:
        pass


@fails("patience_may_be_set_while_reads_run")
class EndsReadsWhenPatienceIsSet(WithProperty):
    """As where the client is made anew for each change."""

    setting = False

    def set_patience(self, seconds: Any) -> None:
        self.setting = True
        time.sleep(0.001)
        self.setting = False
        super().set_patience(seconds)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        if self.setting:
            raise self.failure(UnavailableError, "the client is being made")
        return super().read_into(path, offset, buffer, version=version)


@fails("patience_ends_a_read_that_waits")
class SetsPatienceWhenReadsHaveEnded(WithProperty):
    def __init__(self) -> None:
        self.using = threading.RLock()
        super().__init__()

    def set_patience(self, seconds: Any) -> None:
        with self.using:
            super().set_patience(seconds)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        with self.using:
            return super().read_into(path, offset, buffer, version=version)


@fails("patience_ends_a_read_that_waits")
class WaitsForEver(Right):
    hang_seconds = 5.0

    def silence(self) -> int:
        self.closing.wait()
        return 0


@fails("patience_ends_a_read_that_waits")
class KeepsTheFirstPatience(Right):
    first = 0.0

    def silence(self) -> int:
        self.first = self.first or self.patience_seconds
        self.patience_seconds = self.first
        return super().silence()


@fails("patience_ends_a_read_that_waits")
class TakesSilenceForAFault(Right):
    def silence(self) -> int:
        self.closing.wait(self.patience_seconds)
        raise self.failure(UnavailableError, "the connection broke")


@fails("patience_ends_a_read_that_waits")
class TakesSilenceForTheEnd(Right):
    def silence(self) -> int:
        self.closing.wait(self.patience_seconds)
        return 0


@fails("patience_ends_a_read_that_waits")
class GivesUpForGoodOnSilence(Right):
    def silence(self) -> int:
        self.closing.wait(self.patience_seconds)
        error = self.failure(DeadlineError, "no answer")
        error.retryable = False
        raise error


@fails("patience_ends_a_read_that_waits")
class HasNoPatienceAtAll(Right):
    def silence(self) -> int:
        raise self.failure(DeadlineError, "no answer")


# -- diagnosis ---------------------------------------------------------------------------------------------------------


@fails("endpoint_says_where_requests_go")
class ConnectsToSayWhere(Right):
    def endpoint(self) -> Any:
        with socket.create_server(("127.0.0.1", 0)) as server, contextlib.closing(socket.socket()) as sock:
            sock.connect(server.getsockname())
        return super().endpoint()


@fails("endpoint_says_where_requests_go")
class LooksUpTheName(Right):
    def endpoint(self) -> Any:
        return attrs.evolve(super().endpoint(), host=socket.getaddrinfo("127.0.0.1", 443)[0][4][0])


@fails("endpoint_says_where_requests_go")
class TakesLongToSayWhere(Right):
    hang_seconds = 0.5

    def endpoint(self) -> Any:
        time.sleep(2)
        return super().endpoint()


@fails("endpoint_says_where_requests_go")
class SaysWhereAsAURL(Right):
    def endpoint(self) -> Any:
        return attrs.evolve(super().endpoint(), host="https://storage.example:443")


@fails("endpoint_says_where_requests_go")
class SaysWhereWithoutAPort(Right):
    def endpoint(self) -> Any:
        return attrs.evolve(super().endpoint(), port=None)


@fails("endpoint_says_where_requests_go")
class SaysWhereAsATuple(Right):
    def endpoint(self) -> Any:
        return ("storage.example", 443)


@fails("endpoint_says_where_requests_go")
class DoesNotKnowWhetherItEncrypts(Right):
    def endpoint(self) -> Any:
        return attrs.evolve(super().endpoint(), tls=None)


@fails("endpoint_says_where_requests_go")
class ShowsThePasswordOfTheProxy(Right):
    def endpoint(self) -> Any:
        return attrs.evolve(super().endpoint(), proxy=f"http://me:{self.hidden}@proxy.example:3128")


@fails("endpoint_says_where_requests_go")
class SaysWhereAndNotWho(Right):
    credentials = None  # type: ignore[assignment]  # that is what is wrong


@fails("credentials_say_who_asks")
class ShowsItsCredentials(Right):
    def credentials(self) -> Any:
        return f"key {self.hidden}"


@fails("credentials_say_who_asks")
class LogsItsCredentials(Right):
    def credentials(self) -> Any:
        logging.getLogger("wrong").info("found the key %s", self.hidden)
        return super().credentials()


@fails("credentials_say_who_asks")
class SaysNotWhoAsks(Right):
    def credentials(self) -> Any:
        return None


@fails("credentials_say_who_asks")
class KeepsRefusedCredentialsToItself(Right):
    """Asks the server first, so that nobody learns which key it is that is refused."""

    refused = False

    def credentials(self) -> Any:
        if self.refused:
            raise self.failure(AccessDeniedError, "HTTP 403")
        return super().credentials()


@fails("missing_credentials_are_denied")
class HasOthersWhereThereAreNone(Right):
    def credentials(self) -> Any:
        return "the default key"


@fails("missing_credentials_are_denied")
class TakesMissingCredentialsForAPassingFault(Right):
    def ask(self, path: str) -> None:
        if self.anonymous:
            raise self.failure(UnavailableError, "no credentials yet", path)


# -- errors ------------------------------------------------------------------------------------------------------------


@fails("stat_of_nothing_is_not_found", "a_read_of_nothing_is_not_found", "errors_say_what_was_tried")
class RaisesErrorsOfTheSystem(Right):
    def _get(self, path: str, operation: str) -> Any:
        try:
            return super()._get(path, operation)
        except BackendError:
            raise FileNotFoundError(path) from None


@fails("stat_of_nothing_is_not_found", "errors_say_what_was_tried")
class RaisesTheWrongError(Right):
    def _get(self, path: str, operation: str) -> Any:
        try:
            return super()._get(path, operation)
        except BackendError:
            raise self.failure(UnavailableError, "HTTP 404", path) from None


@fails("errors_say_what_was_tried")
class SaysNothing(Right):
    def _get(self, path: str, operation: str) -> Any:
        try:
            return super()._get(path, operation)
        except BackendError:
            raise NotFoundError("not found") from None


@fails("errors_say_what_was_tried")
class LeaksCredentials(Right):
    def _get(self, path: str, operation: str) -> Any:
        try:
            return super()._get(path, operation)
        except BackendError:
            raise self.failure(NotFoundError, f"GET https://user:{self.hidden}@host/{path}", path) from None


@fails("errors_say_what_was_tried")
class LeaksCredentialsInTheCause(Right):
    def _get(self, path: str, operation: str) -> Any:
        try:
            return super()._get(path, operation)
        except BackendError:
            raise self.failure(NotFoundError, "HTTP 404", path) from ValueError(f"GET /{path}?sig={self.hidden}")


class CannotTravelError(NotFoundError):
    def __reduce__(self) -> tuple[Any, ...]:
        return CannotTravelError, ()


@fails("errors_say_what_was_tried")
class ErrorsDoNotSurvivePickling(Right):
    def _get(self, path: str, operation: str) -> Any:
        try:
            return super()._get(path, operation)
        except BackendError:
            raise self.failure(CannotTravelError, "HTTP 404", path) from None


class Remote(Right):
    """There is no server behind it, or one that does not accept its credentials."""

    def _get(self, path: str, operation: str) -> Any:
        if path.startswith("model/"):
            self.fail()
        return super()._get(path, operation)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        if prefix == "model":
            self.fail()
        return super().list(prefix)

    def fail(self) -> NoReturn:
        raise self.failure(UnavailableError, "connection refused")


@fails("an_unreachable_server_is_unavailable")
class TriesAgainForEver(Remote):
    hang_seconds = 1.0

    def fail(self) -> NoReturn:
        while True:
            time.sleep(0.01)


@fails("an_unreachable_server_is_unavailable")
class GivesUpForGood(Remote):
    def fail(self) -> NoReturn:
        raise self.failure(NotFoundError, "connection refused")


@fails("refused_credentials_are_denied")
class TriesAgainWithRefusedCredentials(Remote):
    def fail(self) -> NoReturn:
        raise self.failure(UnavailableError, "HTTP 403")


@fails("refused_credentials_are_denied")
class ShowsRefusedCredentials(Remote):
    def fail(self) -> NoReturn:
        raise self.failure(AccessDeniedError, f"the key {self.hidden} is not known")


@fails("list_of_a_missing_authority_is_not_found")
class TakesAMissingBucketForAnEmptyOne(Right):
    pass


# -- running the contract on them --------------------------------------------------------------------------------------


class Base(StorageContract):
    """The contract for a wrong storage (or the right one), with everything that can be switched on."""

    kind: type[Right]
    page_size = 60

    @pytest.fixture
    def storage(self) -> Right:
        return self.kind()

    @pytest.fixture
    def put(self, storage: Right) -> Callable[[str, bytes], object]:
        return storage.put

    @pytest.fixture
    def secrets(self) -> list[str]:
        return [SECRET]

    @pytest.fixture
    def stalled(self) -> tuple[Right, str]:
        return self.kind(), "silent"

    @pytest.fixture
    def missing_authority(self) -> Right | None:
        return self.kind() if self.kind is TakesAMissingBucketForAnEmptyOne else None

    @pytest.fixture
    def unreachable(self) -> Right | None:
        return self.kind() if issubclass(self.kind, (TriesAgainForEver, GivesUpForGood)) else None

    @pytest.fixture
    def denied(self) -> Right | None:
        if "_credentials_" not in f"{WRONG.get(self.kind)} ":
            return None
        storage = self.kind()
        storage.refused = True
        return storage

    @pytest.fixture
    def without_credentials(self) -> Right:
        storage = self.kind()
        storage.anonymous = True
        return storage


_RUN = """
import importlib.util
spec = importlib.util.spec_from_file_location("wrong_storages", {path!r})
wrong = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wrong)
for kind in (wrong.Right, *wrong.WRONG):
    body = {{"kind": kind, "hang_seconds": kind.hang_seconds}}
    globals()["Test" + kind.__name__] = type("Test" + kind.__name__, (wrong.Base,), body)
"""

#: The right storage goes through all tests; each wrong one through those that have to find its fault, to save time.
_SELECT = """
def pytest_collection_modifyitems(items):
    from test_wrong import wrong
    items[:] = [item for item in items if item.name in wrong.WRONG.get(item.cls.kind, [item.name])]
"""


def run_pytest(directory: Path, *arguments: str) -> tuple[dict[tuple[str, str], str], str]:
    """How each test below ``directory`` ended, by class and name, run in a process of its own; and what was printed."""
    report = directory / "report.xml"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    done = subprocess.run(
        [*command, "--rootdir", directory, "-c", os.devnull, directory],
        cwd=directory,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        ends = [child for child in case if child.tag in {"failure", "error", "skipped"}]
        kind = ends[0].tag if ends else "passed"
        if ends and ends[0].get("type") == "pytest.xfail":
            kind = "xfailed"
        outcomes[case.get("classname", "").rpartition(".")[2], case.get("name", "")] = kind
    return outcomes, done.stdout + done.stderr


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[tuple[str, str], str], str]:
    """How the contract went on every storage of this module."""
    directory = tmp_path_factory.mktemp("wrong")
    (directory / "test_wrong.py").write_text(_RUN.format(path=__file__))
    (directory / "conftest.py").write_text(_SELECT)
    return run_pytest(directory, "--tb=line", "--numprocesses=4")  # most of these storages wait for something


def test_there_are_wrong_storages() -> None:
    """Enough of them, and no test of the contract can fail for none of them."""
    caught = {test.partition("[")[0] for tests in WRONG.values() for test in tests}
    rules = {name for name in dir(StorageContract) if name.startswith("test_")}

    assert len(WRONG) >= 12
    assert {"test_it_is_a_storage"} == rules - caught


def test_the_kit_knows_the_digests_that_core_knows() -> None:
    """Each by its name."""
    assert DIGESTS == tuple(name for name in DIGESTS if best_digest({name: "0"}))
    assert best_digest({"sha512": "0"}) is None


def test_a_right_storage_passes(outcomes: tuple[dict[tuple[str, str], str], str]) -> None:
    """What follows is not the kit's own fault."""
    ended, printed = outcomes

    right = {name: how for (cls, name), how in ended.items() if cls == "TestRight"}
    assert len(right) > 40, printed
    assert {} == {name: how for name, how in right.items() if how not in {"passed", "skipped"}}, printed


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_a_wrong_storage_is_caught(outcomes: tuple[dict[tuple[str, str], str], str], kind: type[Right]) -> None:
    """By the tests that are about its fault."""
    ended, printed = outcomes

    failed = {name for (cls, name), how in ended.items() if cls == f"Test{kind.__name__}" and how == "failure"}
    assert set() == WRONG[kind] - failed, printed


# -- contracts that are weakened ---------------------------------------------------------------------------------------

_HEAD = """
import pytest
from modelexpress_core.storage.memory import MemoryStorage
from modelexpress_core.testing import StorageContract

class Filled(StorageContract):
    __test__ = False

    @pytest.fixture
    def storage(self):
        return MemoryStorage()

    @pytest.fixture
    def put(self, storage):
        return storage.put

"""

#: What an author may try, and what the kit says to it.
_WEAKENED = {
    "overrides": (
        "class TestIt(Filled):\n    __test__ = True\n    def test_reads_any_range(self): pass",
        "TestIt overrides test_reads_any_range, which is part of the contract",
    ),
    "deletes": (
        "class TestIt(Filled):\n    __test__ = True\n    test_reads_any_range = None",
        "TestIt removes test_reads_any_range",
    ),
    "deletes_from_the_kit": (
        "class TestIt(Filled):\n    __test__ = True\ndel StorageContract.test_reads_any_range",
        "TestIt removes test_reads_any_range",
    ),
    "overrides_later": (
        "class TestIt(Filled):\n    __test__ = True\nTestIt.test_reads_any_range = lambda self: None",
        "TestIt overrides test_reads_any_range",
    ),
    "overrides_by_a_mixin": (
        "class Mixin:\n    def test_empty_objects(self): pass\nclass TestIt(Mixin, Filled):\n    __test__ = True",
        "TestIt overrides test_empty_objects",
    ),
    "skips_a_test": (
        "class TestIt(Filled):\n    __test__ = True\n    @pytest.mark.skip\n    def test_empty_objects(self): pass",
        "TestIt overrides test_empty_objects",
    ),
    "expects_a_failure": (
        "class TestIt(Filled):\n    __test__ = True\n    @pytest.mark.xfail\n    def test_empty_objects(self): pass",
        "TestIt overrides test_empty_objects",
    ),
    "expects_all_to_fail": (
        "@pytest.mark.xfail(reason='hard')\nclass TestIt(Filled):\n    __test__ = True",
        "TestIt is marked xfail, which weakens the contract",
    ),
    "skips_all": (
        "@pytest.mark.skip\nclass TestIt(Filled):\n    __test__ = True",
        "TestIt is marked skip, which weakens the contract",
    ),
    "marks_the_module": (
        "pytestmark = pytest.mark.xfail(reason='hard')\nclass TestIt(Filled):\n    __test__ = True",
        "TestIt is marked xfail",
    ),
    "gives_no_reason": (
        "class TestIt(Filled):\n    __test__ = True\n    known_gaps = {'test_empty_objects': ' '}",
        "known_gaps of TestIt has no reason for test_empty_objects",
    ),
    "names_no_test": (
        "class TestIt(Filled):\n    __test__ = True\n    known_gaps = {'test_empty': 'hard'}",
        "known_gaps of TestIt lists test_empty, which is not a test of the contract",
    ),
    "takes_the_guard_away": (
        "class TestIt(Filled):\n    __test__ = True\n    def pytest_generate_tests(self, metafunc): pass",
        "TestIt overrides pytest_generate_tests",
    ),
}


@pytest.mark.parametrize("how", [how for how in _WEAKENED if how != "deletes_from_the_kit"])
def test_a_weakened_contract_is_refused(weakened: dict[str, str], how: str) -> None:
    """Whatever the way, collecting the tests fails, and the message says what to do instead."""
    assert _WEAKENED[how][1] in weakened[how]
    assert "known_gaps" in weakened[how]


@pytest.fixture(scope="module")
def weakened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What pytest said to each way of weakening; all in one process."""
    directory = tmp_path_factory.mktemp("weakened")
    for how, (code, _) in _WEAKENED.items():
        if how != "deletes_from_the_kit":
            (directory / f"test_{how}.py").write_text(_HEAD + code + "\n")

    ended, printed = run_pytest(directory, "--continue-on-collection-errors")

    assert {"error"} == set(ended.values()), printed
    sections = printed.split("ERROR collecting ")[1:]
    return {section.partition(".py")[0].removeprefix("test_"): section for section in sections}


def test_a_test_deleted_from_the_kit_is_missed(tmp_path: Path) -> None:
    """In a process of its own, since it is the kit that is changed."""
    code, says = _WEAKENED["deletes_from_the_kit"]
    (tmp_path / "test_deleted.py").write_text(_HEAD + code + "\n")

    ended, printed = run_pytest(tmp_path)

    assert {"error"} == set(ended.values()), printed
    assert says in printed


def test_a_known_gap_is_an_expected_failure_until_it_is_mended(tmp_path: Path) -> None:
    """With its reason in the report; a gap that is none any more fails, and tests of one's own may do as they like."""
    (tmp_path / "test_gaps.py").write_text(
        _HEAD
        + "class Short(MemoryStorage):\n"
        + "    def list(self, prefix):\n        return (i for i in super().list(prefix) if i.size)\n"
        + "class TestGap(Filled):\n    __test__ = True\n    known_gaps = {'test_empty_objects': 'it closes once'}\n"
        + "    @pytest.fixture\n    def storage(self):\n        return Short()\n"
        + "    @pytest.mark.skip(reason='mine')\n    def test_of_its_own(self): pass\n"
        + "class TestMended(Filled):\n    __test__ = True\n    known_gaps = {'test_empty_objects': 'it closes once'}\n"
    )

    ended, printed = run_pytest(tmp_path, "-rx", "-k", "empty_objects or its_own")

    expected = {
        ("TestGap", "test_empty_objects"): "xfailed",
        ("TestGap", "test_of_its_own"): "skipped",
        ("TestMended", "test_empty_objects"): "failure",
    }
    assert expected == ended, printed
    assert "it closes once" in printed
    assert "XPASS(strict)" in printed


def test_a_contract_without_its_fixtures_says_what_is_missing(tmp_path: Path) -> None:
    """The first thing that an author sees."""
    (tmp_path / "test_bare.py").write_text(
        "from modelexpress_core.testing import StorageContract\nclass TestBare(StorageContract): pass\n"
    )

    ended, printed = run_pytest(tmp_path, "-k", "empty_objects")

    assert {("TestBare", "test_empty_objects"): "error"} == ended
    assert "TestBare needs a fixture `storage` that returns (or yields) a new storage" in printed


def test_the_kit_imports_neither_torch_nor_pytest_before_it_is_used() -> None:
    """The fakes are usable without pytest; the contracts bring it, and still no torch."""
    code = (
        "import sys, modelexpress_core.testing as kit\n"
        "kit.FaultyStorage, kit.FaultPolicy; assert 'pytest' not in sys.modules\n"
        "kit.StorageContract, kit.PluginContract; assert 'torch' not in sys.modules and 'pytest' in sys.modules\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert 0 == done.returncode, done.stderr
