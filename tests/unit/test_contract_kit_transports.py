"""The contract of transports finds transports that are wrong in one way each."""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch

from modelexpress_core.contracts.candidates import Peer, Tier
from modelexpress_core.contracts.transport import PeerAccess, PeerSession, TensorRead, TensorTable
from modelexpress_core.errors import BackendError, NotFoundError, UnavailableError
from modelexpress_core.providers import TransportProvider
from modelexpress_core.testing import TransportContract
from modelexpress_core.testing.transport_contract import OpenWorker
from modelexpress_core.transport.inproc import InprocServed, InprocSession, InprocTransport
from modelexpress_core.uri import ModelURI
from tests.unit.test_contract_kit import run_pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("contract kit of transports")]

#: When the process ends.
_ended = threading.Event()

#: Wrong transport -> tests of the contract that have to fail for it.
WRONG: dict[type[Right], set[str]] = {}


class Session(InprocSession):
    """A session in which nothing is wrong, for others to spoil."""

    def served(self) -> InprocServed:
        return self._served

    def memory(self, name: str) -> torch.Tensor:
        return self._served.table.tensors[name]

    def failure(self, reason: str, **more: Any) -> UnavailableError:
        return UnavailableError(reason, **{"uri": self._uri, "operation": "read", "provider": "wrong", **more})

    def stall(self) -> None:
        """Wait until the session is closed."""
        while not self._closed:
            time.sleep(0.01)
        reason = "the session was closed"
        raise self.failure(reason, retryable=False)


class StalledSession(Session):
    """One whose worker does not answer."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        self.stall()
        yield from super().read(reads)


class Right(InprocTransport):
    """A transport in which nothing is wrong."""

    session: type[Any] = Session
    served: type[Any] = InprocServed
    stalled: type[Any] = StalledSession
    tier: Any = Tier.PEER
    hang_seconds = 30.0

    def connect(self, access: PeerAccess) -> Any:
        found = super().connect(access)
        return self.session(found._served, access.lease_id, str(self._uri))

    def serve(self, table: TensorTable) -> Any:
        served = super().serve(table)
        served.__class__ = self.served
        return served


def fails(*tests: str, **replaced: Any) -> Callable[[type[Any]], type[Any]]:
    """Says which tests find the fault of a class: a transport, or a session or served tensors of one."""

    def register(cls: type[Any]) -> type[Any]:
        kind = cls
        if issubclass(cls, InprocSession):
            kind = type(cls.__name__, (Right,), {"session": cls, **replaced})
        elif issubclass(cls, InprocServed):
            kind = type(cls.__name__, (Right,), {"served": cls, **replaced})
        WRONG[kind] = {f"test_{test}" for test in tests}
        return cls

    return register


def changed(read: TensorRead, destination: torch.Tensor | None = None, **fields: Any) -> TensorRead:
    return attrs.evolve(read, destination=read.destination if destination is None else destination, **fields)


# -- reading -----------------------------------------------------------------------------------------------------------


@fails("reads_any_range", "a_whole_load_is_equal")
class OffsetIsOffByOne(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for position, read in enumerate(reads):
            further = min(read.offset + 1, len(self.memory(read.name)) - len(read.destination))
            yield from (position for _ in super().read([changed(read, offset=further)]))


@fails("reads_any_range", "reads_a_batch_of_whole_chunks")
class OffsetIsCutTo16Bits(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        yield from super().read([changed(read, offset=read.offset & 0xFFFF) for read in reads])


@fails("reads_a_batch_of_whole_chunks", "reads_many_small_tensors")
class SwapsRanges(Session):
    """Bytes of the first range go where those of the last should be."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        targets = [read.destination for read in reads]
        if len(reads) > 2 and len(targets[0]) == len(targets[1]):
            targets[0], targets[1] = targets[1], targets[0]
        yield from super().read([changed(*each) for each in zip(reads, targets, strict=True)])


@fails("reads_any_range", "a_range_may_be_read_again")
class LeavesOutTheLastByte(Session):
    """As where a range's end is taken to be inclusive."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        shorter = [read.destination[: max(1, len(read.destination) - 1)] for read in reads]
        yield from super().read([changed(*each) for each in zip(reads, shorter, strict=True)])


@fails("reads_any_range")
class WritesBehindTheRange(Session):
    """Rounds up to whole words, in whatever memory follows."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for position in super().read(reads):
            target = reads[position].destination
            end = target.storage_offset() + len(target)
            if end < target.untyped_storage().nbytes():
                target.as_strided((1,), (1,), end).zero_()
            yield position


@fails("reads_a_batch_of_whole_chunks", "a_whole_load_is_equal")
class ReadsAMebibyteAtMost(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        yield from super().read([changed(read, destination=read.destination[: 1 << 20]) for read in reads])


@fails("reads_many_small_tensors")
class ReadsTenRangesAtMost(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        yield from super().read(reads[:10])


@fails("reads_many_small_tensors")
class KnowsAsciiNames(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        yield from super().read([changed(read, name=read.name.encode("ascii").decode()) for read in reads])


@fails("reads_no_ranges")
class NeedsARange(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        assert max(len(read.destination) for read in reads)
        yield from super().read(reads)


@fails("a_range_may_be_read_again")
class ReadsARangeOnce(Session):
    """A cache that believes that what was read is in place."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.known: set[tuple[str, int]] = set()

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for position, read in enumerate(reads):
            if (read.name, read.offset) not in self.known:
                list(super().read([read]))
                self.known.add((read.name, read.offset))
            yield position


@fails("reads_any_range")
class SkipsRangesOfOneByte(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for position, read in enumerate(reads):
            if len(read.destination) > 1:
                list(super().read([read]))
            yield position


@fails("reads_any_range", "a_whole_load_is_equal")
class CopiesWholeWords(Session):
    """Takes destinations to be aligned."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for read in reads:
            read.destination[: len(read.destination) // 8 * 8].view(torch.int64)
        yield from super().read(reads)


@fails("reads_any_range", "a_whole_load_is_equal")
class ChangesTheSource(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for position in super().read(reads):
            self.memory(reads[position].name)[-1] ^= 1
            yield position


@fails("a_whole_load_is_equal")
class LosesABit(Session):
    """Once, in large tensors."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for position in super().read(reads):
            if reads[position].name == "large" and not reads[position].offset and not hasattr(self, "lost"):
                self.lost = True
                reads[position].destination[5] ^= 1
            yield position


# -- positions ---------------------------------------------------------------------------------------------------------


@fails("reads_any_range", "reads_a_batch_of_whole_chunks")
class YieldsBeforeTheBytes(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        yield from range(len(reads))
        list(super().read(reads))


@fails("reads_any_range")
class YieldsAPositionTwice(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for position in super().read(reads):
            yield position
            yield position


@fails("reads_any_range")
class LeavesOutAPosition(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        yield from (position for position in super().read(reads) if position or len(reads) == 1)


@fails("reads_any_range", "reads_many_small_tensors")
class CountsFromOne(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        yield from (position + 1 for position in super().read(reads))


@fails("reads_any_range")
class YieldsRanges(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[Any]:
        yield from (reads[position] for position in super().read(reads))


# -- figures -----------------------------------------------------------------------------------------------------------


@fails("what_is_sent_is_counted")
class CountsNothing(Right):
    hang_seconds = 2.0

    def serve(self, table: TensorTable) -> Any:
        return super().serve(attrs.evolve(table, count_sent=lambda _lease, _nbytes: None))


@fails("what_is_sent_is_counted")
class CountsRangesAndPieces(Right):
    hang_seconds = 2.0

    def serve(self, table: TensorTable) -> Any:
        def twice(lease_id: str, nbytes: int) -> None:
            table.count_sent(lease_id, nbytes)
            table.count_sent(lease_id, nbytes)

        return super().serve(attrs.evolve(table, count_sent=twice))


# -- sessions ----------------------------------------------------------------------------------------------------------


@fails("threads_read_at_the_same_time")
class SharesABuffer(Session):
    """All threads read into one buffer, and copy from it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.buffer = torch.empty(4 << 20, dtype=torch.uint8)

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for position, read in enumerate(reads):
            length = len(read.destination)
            list(super().read([changed(read, destination=self.buffer[:length])]))
            time.sleep(0.002)
            read.destination.copy_(self.buffer[:length])
            yield position


@fails("what_has_landed_is_not_written_again")
class ReportsTooEarly(Session):
    """Before the bytes are there."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for read in reads:
            if read.landed is not None:
                read.landed(len(read.destination))
        yield from super().read(reads)


@fails("what_has_landed_is_not_written_again")
class WritesAgain(Session):
    """The bytes that it has reported."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        yield from super().read(reads)
        for read in reads:
            if read.landed is not None:
                read.landed(len(read.destination))
        yield from super().read(reads[:0])
        list(super().read(reads))


@fails("workers_and_sessions_are_apart")
class KeepsTensorsByName(Right):
    """As if there were one worker."""

    tensors: ClassVar[dict[str, torch.Tensor]] = {}

    def serve(self, table: TensorTable) -> Any:
        KeepsTensorsByName.tensors.update(table.tensors)
        return super().serve(attrs.evolve(table, tensors=KeepsTensorsByName.tensors))


@fails("workers_and_sessions_are_apart")
class ClosesEverySession(Session):
    opened: ClassVar[list[ClosesEverySession]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.opened.append(self)

    def close(self) -> None:
        for each in self.opened:
            Session.close(each)


@fails("a_read_that_is_abandoned_disturbs_no_other")
class CountsReads(Session):
    """Lets the next read begin when the one before was read to its end."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.busy = False

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        if self.busy:
            reason = "another read is running"
            raise self.failure(reason)
        self.busy = True
        yield from super().read(reads)
        self.busy = False


@fails("a_read_that_is_abandoned_disturbs_no_other", "close_ends_reads_in_other_threads")
class WritesAfterClose(Session):
    """Reads run in threads of their own, for which ``close`` does not wait."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ended = threading.Event()

    def close(self) -> None:
        super().close()
        self.ended.set()

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        contents = [self.memory(each.name)[each.offset :][: len(each.destination)].clone() for each in reads]

        def late() -> None:
            self.ended.wait(20)
            time.sleep(0.1)
            for each, content in zip(reads, contents, strict=True):
                each.destination.copy_(content)

        threading.Thread(target=late, daemon=True).start()
        yield from super().read(reads)


@fails("close_ends_reads_in_other_threads", "reads_after_close_fail", hang_seconds=2.0)
class StaysOpen(Session):
    def close(self) -> None:
        pass


@fails("close_of_a_session_may_be_called_again")
class ClosesOnce(Session):
    def close(self) -> None:
        if self._closed:
            reason = "the session was closed before"
            raise self.failure(reason)
        super().close()


@fails("close_ends_reads_in_other_threads")
class RefusesToClose(Session):
    """Raises although the worker answers, so that no memory could be used again."""

    def close(self) -> None:
        super().close()
        reason = "reads may still be running"
        raise self.failure(reason)


@fails("reads_after_close_fail", "close_ends_reads_in_other_threads")
class BlamesTheWorkerForClose(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        try:
            yield from super().read(reads)
        except BackendError as exc:
            exc.peer_at_fault = True
            raise


@fails("closed_sessions_leave_nothing_behind")
class LeavesAThread(Session):
    """Begun with the session, and ended with the process."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        threading.Thread(target=_ended.wait, daemon=True).start()


@fails("closed_sessions_leave_nothing_behind")
class LeavesASocket(Session):
    sockets: ClassVar[list[socket.socket]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sockets.append(socket.socket())


@fails("close_ends_a_read_that_waits")
class WaitsForItsTimeout(Right):
    class Stalled(Session):
        def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
            time.sleep(2.7)
            raise self.failure("time-out", retryable=False)
            yield from super().read(reads)

    stalled = Stalled


# -- what is refused ---------------------------------------------------------------------------------------------------


@fails("bytes_that_are_not_served_are_refused[other-0-1]")
class DoesNotTranslate(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for read in reads:
            self.memory(read.name)
        yield from super().read(reads)


@fails("bytes_that_are_not_served_are_refused[weight-1000-1]", "bytes_that_are_not_served_are_refused[weight-999-2]")
class ReadsOtherMemory(Session):
    """Checks no bounds: what lies around the tensor is read."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for position, read in enumerate(reads):
            memory = self._served.table.tensors.get(read.name)
            end = read.offset + len(read.destination)
            if memory is not None and len(memory) < end <= len(memory) + 64:
                start = memory.storage_offset() + read.offset
                read.destination.copy_(memory.as_strided((len(read.destination),), (1,), start))
                yield position
            else:
                yield from (position for _ in super().read([read]))


@fails("bytes_that_are_not_served_are_refused[weight-0-1001]", "bytes_that_are_not_served_are_refused[weight-999-2]")
class ReadsWhatThereIs(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for position, read in enumerate(reads):
            memory = self._served.table.tensors.get(read.name, torch.empty(0))
            left = max(1, len(memory) - read.offset)
            yield from (position for _ in super().read([changed(read, destination=read.destination[:left])]))


class Unleased(Session):
    """Reads without a lease, if ``unchecked`` is set."""

    unchecked = True

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        table = self._served.table
        if self.unchecked:
            self._served.table = attrs.evolve(table, holds_lease=lambda _: True)
        try:
            yield from super().read(reads)
        finally:
            self._served.table = table


@fails(
    "without_a_lease_nothing_is_read[empty]",
    "without_a_lease_nothing_is_read[unknown]",
    "without_a_lease_nothing_is_read[released]",
    "a_lease_that_ends_ends_the_read",
)
class NeedsNoLease(Unleased):
    pass


@fails("a_lease_that_ends_ends_the_read")
class ChecksTheLeaseOnce(Unleased):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        self.unchecked = self._served.table.holds_lease(self._lease_id)
        yield from super().read(reads)


@fails("without_a_lease_nothing_is_read[released]")
class ChecksTheLeaseAfterwards(Unleased):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        list(super().read(reads))
        yield from Session.read(self, reads)


@fails("a_lease_that_ends_ends_the_read", "without_a_lease_nothing_is_read[unknown]")
class EndsWithoutAnError(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        with contextlib.suppress(BackendError):
            yield from super().read(reads)


@fails("a_lease_that_ends_ends_the_read", "closed_tensors_are_not_read")
class BlamesTheReader(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        try:
            yield from super().read(reads)
        except BackendError as exc:
            exc.peer_at_fault = False
            raise


@fails("without_a_lease_nothing_is_read[unknown]", "a_lease_that_ends_ends_the_read")
class TellsTheLease(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        try:
            yield from super().read(reads)
        except BackendError as exc:
            reason = f"{exc.message}: {self._lease_id}"
            raise self.failure(reason, peer_at_fault=exc.peer_at_fault) from exc


@fails("without_a_lease_nothing_is_read[empty]", "reads_after_close_fail")
class NamesNoWorker(Session):
    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        try:
            yield from super().read(reads)
        except BackendError as exc:
            exc.uri = ""
            raise


# -- served tensors ----------------------------------------------------------------------------------------------------


@fails("closed_tensors_are_not_read")
class ClosesServedTensorsOnce(InprocServed):
    calls = 0

    def close(self) -> None:
        self.calls += 1
        if self.calls == 2:
            reason = "the tensors were closed before"
            raise NotFoundError(reason)
        super().close()


@fails("closed_tensors_are_not_read", "close_of_served_tensors_waits_for_reads[0]", hang_seconds=2.0)
class IsNeverClosed(InprocServed):
    def close(self) -> None:
        pass


@fails("close_of_served_tensors_waits_for_reads[0]")
class DoesNotWaitForReads(InprocServed):
    """A copy takes a while, as over a network."""

    def copy(self, read: TensorRead, lease_id: str) -> bool:
        if self._closed or not self.table.holds_lease(lease_id):
            return False
        half = len(read.destination) // 2
        content = self.table.tensors[read.name][read.offset : read.offset + len(read.destination)]
        read.destination[:half].copy_(content[:half])
        time.sleep(0.15)
        read.destination[half:].copy_(content[half:])
        return True


@fails("a_reader_that_stops_does_not_hold_up_close", hang_seconds=1.0)
class WaitsForReaders(Session):
    """The worker counts a read until its reader has taken all of it."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        self._served._copies += 1
        try:
            yield from super().read(reads)
        finally:
            self._served._copies -= 1


@fails("served_tensors_say_what_readers_need")
class DescribesEveryTensor(Right):
    """The description has the address of each tensor, in words."""

    class Long(InprocServed):
        @property
        def description(self) -> bytes:
            return self.__dict__["description"].ljust(250 * len(self.table.tensors))

    served = Long

    def connect(self, access: PeerAccess) -> Any:
        return super().connect(attrs.evolve(access, description=access.description[:16]))


@fails("served_tensors_say_what_readers_need")
class PublishesNumbers(InprocServed):
    topology: Mapping[str, Any] = {"port": 5}


@fails("a_description_of_something_else_is_refused")
class PicklesItsDescription(Right):
    """And so runs code of any worker."""

    class Pickled(InprocServed):
        @property
        def description(self) -> bytes:
            return pickle.dumps(self.__dict__["description"])

    served = Pickled

    def connect(self, access: PeerAccess) -> Any:
        return super().connect(attrs.evolve(access, description=pickle.loads(access.description)))


@fails("a_worker_that_is_gone_is_unavailable")
class RaisesOSError(Right):
    def connect(self, access: PeerAccess) -> Any:
        try:
            return super().connect(access)
        except NotFoundError:
            raise ConnectionRefusedError from None


@fails("a_worker_that_is_gone_is_unavailable", "a_description_of_something_else_is_refused")
class WaitsForTheWorker(Right):
    hang_seconds = 1.0

    def connect(self, access: PeerAccess) -> Any:
        try:
            return super().connect(access)
        except NotFoundError:
            time.sleep(4)
            raise


@fails("any_worker_can_be_ranked")
class BelievesWhatWorkersPublish(Right):
    @staticmethod
    def tier(peer: Peer, environ: Mapping[str, str]) -> Tier:
        return Tier.FABRIC_PEER if peer.topology["mx_wrong_rail"] == "7" else Tier.OTHER_PEER


@fails("it_is_a_transport")
class HasNoClose(Right):
    def __getattribute__(self, name: str) -> Any:
        if name == "close":
            raise AttributeError(name)
        return super().__getattribute__(name)


class Base(TransportContract):
    """The contract with the class ``kind`` as the transport."""

    kind: type[Right]

    @pytest.fixture
    def provider(self) -> TransportProvider:
        return TransportProvider("mx-wrong", ("wrong",), lambda uri, _: self.kind(uri), tier=self.kind.tier)

    @pytest.fixture
    def stalled(
        self, serve: Callable[[Mapping[str, torch.Tensor]], OpenWorker]
    ) -> Iterator[tuple[PeerSession, TensorRead]]:
        worker = serve({"weight": torch.zeros(100, dtype=torch.uint8)})
        found = InprocTransport(ModelURI.parse(worker.uri)).connect(PeerAccess(None, "", worker.served.description))  # type: ignore[arg-type]  # it asks for no peer
        session = self.kind.stalled(found._served, worker.lease(), worker.uri)
        yield session, TensorRead("weight", 0, torch.zeros(100, dtype=torch.uint8))
        session.close()


_RUN = """
import importlib.util
spec = importlib.util.spec_from_file_location("wrong_transports", {path!r})
wrong = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wrong)
for kind in (wrong.Right, *wrong.WRONG):
    body = {{"kind": kind, "hang_seconds": kind.hang_seconds}}
    globals()["Test" + kind.__name__] = type("Test" + kind.__name__, (wrong.Base,), body)
"""

#: The right transport goes through all tests; each wrong one through those that have to find its fault, to save time.
_SELECT = """
def pytest_collection_modifyitems(items):
    from test_wrong import wrong
    items[:] = [item for item in items if item.name in wrong.WRONG.get(item.cls.kind, [item.name])]
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[tuple[str, str], str], str]:
    """How the contract went on every transport of this module."""
    directory = tmp_path_factory.mktemp("wrong")
    (directory / "test_wrong.py").write_text(_RUN.format(path=__file__))
    (directory / "conftest.py").write_text(_SELECT)
    return run_pytest(directory, "--tb=line")


def test_there_are_wrong_transports() -> None:
    """Enough of them, and no test of the contract can fail for none of them."""
    caught = {test.partition("[")[0] for tests in WRONG.values() for test in tests}
    rules = {name for name in dir(TransportContract) if name.startswith("test_")}

    assert len(WRONG) >= 12
    assert set() == rules - caught


def test_a_right_transport_passes(outcomes: tuple[dict[tuple[str, str], str], str]) -> None:
    """What follows is not the kit's own fault."""
    ended, printed = outcomes

    right = {name: how for (cls, name), how in ended.items() if cls == "TestRight"}
    assert len(right) > 25, printed
    assert {} == {name: how for name, how in right.items() if how != "passed"}, printed


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_a_wrong_transport_is_caught(outcomes: tuple[dict[tuple[str, str], str], str], kind: type[Right]) -> None:
    """By the tests that are about its fault."""
    ended, printed = outcomes

    failed = {name for (cls, name), how in ended.items() if cls == f"Test{kind.__name__}" and how == "failure"}
    assert set() == WRONG[kind] - failed, printed


@pytest.mark.parametrize(
    "message",
    [
        "these are the bytes of 'weight' from",
        "nothing was written there",
        "that is what the worker's memory was used for later",
        "the error shows the lease",
        "close of a session, once and again, raised UnavailableError",
    ],
)
def test_messages_name_the_mistake(outcomes: tuple[dict[tuple[str, str], str], str], message: str) -> None:
    """So that an author need not look for it in the bytes."""
    assert message in outcomes[1]


def test_a_contract_without_its_fixture_says_what_is_missing(tmp_path: Path) -> None:
    """The first thing that an author sees."""
    (tmp_path / "test_bare.py").write_text(
        "from modelexpress_core.testing import TransportContract\nclass TestBare(TransportContract): pass\n"
    )

    ended, printed = run_pytest(tmp_path, "-k", "no_ranges")

    assert {("TestBare", "test_reads_no_ranges"): "error"} == ended
    assert "TestBare needs a fixture `provider` that returns the record of the transport" in printed
