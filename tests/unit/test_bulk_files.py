"""Files over the bulk channel: ranges, pieces that are gathered, and bytes that are still arriving."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from modelexpress_core.bulk import output, requests
from modelexpress_core.bulk.file_content import FileContent
from modelexpress_core.bulk.output import PIECE_BYTES
from modelexpress_core.bulk.reading import BulkOffer, BulkRead, BulkReader
from modelexpress_core.bulk.requests import Run
from modelexpress_core.bulk.serving import BulkServer, Content
from modelexpress_core.bulk.tensor_content import TensorContent
from modelexpress_core.bulk.tickets import Ticket, Tickets
from modelexpress_core.errors import BackendError, IntegrityError, StillArrivingError, UnavailableError
from modelexpress_core.storage.file_runs import fill_runs
from modelexpress_core.storage.http.connections import Connection
from modelexpress_core.storage.http.requests import Origin
from modelexpress_core.wire.settings import TlsSettings
from modelexpress_core.wire.tls import client_contexts, server_contexts
from tests.support.waiting import eventually

_BYTES = random.Random(7).randbytes(2 * PIECE_BYTES + 12_345)


class Arriving:
    """A file whose first bytes are there, and the others come."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self.size = len(_BYTES)
        self.present = self.size
        self.error: Exception | None = None
        self.waits = self.closed = 0
        self._changed = threading.Condition()

    def wait(self, start: int, end: int, seconds: float) -> bool:
        with self._changed:
            self.waits += 1
            self._changed.wait_for(lambda: self.error or end <= self.present, seconds)
            if self.error:
                raise self.error
            return end <= self.present

    def close(self) -> None:
        self.closed += 1

    def advance(self, present: int) -> None:
        with self._changed:
            self.present = present
            self._changed.notify_all()


class Serving:
    """A server of one file, and of the same bytes as a tensor."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.file = Arriving(path)
        self.opened = self.ended = self.sent = 0
        self.tickets = Tickets()
        self.server = BulkServer(self, self.tickets, host="127.0.0.1", **options)

    def holds(self, ticket: Ticket) -> bool:
        return True

    def content(self, ticket: Ticket, name: str) -> Content | None:
        if name == "tensor":
            import torch

            return TensorContent(torch.frombuffer(bytearray(_BYTES), dtype=torch.uint8))
        if name != "file":
            return None
        return FileContent(
            self.file.size, self._open, close=self._close, present_bytes=lambda: max(0, self.file.present)
        )

    def _open(self, seconds: float) -> Arriving | None:
        if not self.file.wait(0, 0, seconds):
            return None
        self.opened += 1
        return self.file

    def _close(self) -> None:
        self.ended += 1

    def count_sent(self, ticket: Ticket, nbytes: int) -> None:
        self.sent += nbytes

    def ticket(self) -> str:
        return self.tickets.issue("", content="model", version="v", seconds=60)

    def reader(self, **options: Any) -> BulkReader:
        offer = BulkOffer(Origin("127.0.0.1", self.server.port, tls="tls_context" in options), self.ticket(), "model")
        return BulkReader(offer, connect_timeout_seconds=10, patience_seconds=30, **options)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bulk") / "file"
    path.write_bytes(_BYTES)
    return path


@pytest.fixture
def made(path: Path) -> Iterator[Serving]:
    made = Serving(path)
    yield made
    made.server.close()
    os.close(made.file.descriptor)


def bytes_of(run: Run) -> bytes:
    starts = range(run.offset, run.offset + run.count * max(run.stride, 1), max(run.stride, 1))
    return b"".join(_BYTES[start : start + run.length] for start in starts[: run.count])


def read_all(made: Serving, runs: list[Run], *, with_checksums: bool = False, **options: Any) -> list[bytes]:
    reads = [BulkRead(run, memoryview(bytearray(run.nbytes))) for run in runs]
    with contextlib.closing(made.reader(**options)) as reader:
        assert [*range(len(reads))] == list(reader.read(reads, checksums=with_checksums))
    return [bytes(read.destination) for read in reads]


_RUNS = [
    Run("file", 0, len(_BYTES)),
    Run("file", 17, PIECE_BYTES + 1),
    Run("file", 5, 1),
    Run("file", 3, 1000, 8000, 1000),
    Run("file", 1, 2, 3, 100_000),
    Run("file", 0, 16, 64, 100_000),
    Run("file", 7, 3584, 28_672, 200),
    Run("file", 9, 100_001, 200_003, 40),
    Run("file", 0, 8, 8, 1 << 19),
    Run("file", len(_BYTES) - 5, 5),
]


@pytest.mark.parametrize("with_checksums", [False, True])
@pytest.mark.parametrize("name", ["file", "tensor"])
def test_ranges_and_pieces_are_in_place(made: Serving, name: str, with_checksums: bool) -> None:
    """In one request; the wire has what is needed, and the file is closed afterwards."""
    runs = [Run(name, run.offset, run.length, run.stride, run.count) for run in _RUNS]

    assert [bytes_of(run) for run in runs] == read_all(made, runs, with_checksums=with_checksums)
    assert eventually(lambda: sum(run.nbytes for run in runs) == made.sent)
    assert eventually(lambda: made.opened == made.file.closed)
    assert made.opened <= 1


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=2000),
    offset=st.integers(0, 200),
    run_bytes=st.integers(1, 70),
    gap=st.integers(0, 130),
    count=st.integers(1, 60),
)
def test_runs_of_files_are_those_of_memory(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, offset: int, run_bytes: int, gap: int, count: int
) -> None:
    """Of any length and distance, as many as the file has."""
    path = tmp_path_factory.mktemp("runs") / "file"
    path.write_bytes(data)
    buffer = memoryview(bytearray(run_bytes * count))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = fill_runs(descriptor, buffer, offset, run_bytes, run_bytes + gap)
    finally:
        os.close(descriptor)

    starts = [offset + number * (run_bytes + gap) for number in range(count)]
    whole = [data[start : start + run_bytes] for start in starts if start + run_bytes <= len(data)]
    assert b"".join(whole) == bytes(buffer[:done])


def test_runs_are_gathered_without_numpy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of eight, four, two and one bytes."""
    monkeypatch.setitem(__import__("sys").modules, "numpy", None)
    with path.open("rb") as file:
        for run in (Run("", 3, 16, 64, 9000), Run("", 1, 12, 20, 9000), Run("", 0, 6, 10, 999), Run("", 0, 5, 7, 999)):
            buffer = memoryview(bytearray(run.nbytes))
            assert run.nbytes == fill_runs(file.fileno(), buffer, run.offset, run.length, run.stride)
            assert bytes_of(run) == bytes(buffer)


def test_files_are_sent_by_the_system(made: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checksums and TLS, no byte of a range passes through this program."""
    sent: list[int] = []
    send_file = Connection.send_file

    def noting(self: Connection, descriptor: int, offset: int, count: int, seconds: float) -> None:
        sent.append(count)
        send_file(self, descriptor, offset, count, seconds)

    monkeypatch.setattr(Connection, "send_file", noting)

    read_all(made, [Run("file", 1, len(_BYTES) - 1)])
    assert len(_BYTES) - 1 == sum(sent)


def test_tls(path: Path, tmp_path: Path) -> None:
    """Bytes pass through a buffer then."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert"))
    server_tls = TlsSettings(None, str(tmp_path / "cert"), str(tmp_path / "cert"))
    made = Serving(path, tls=server_contexts(server_tls, ask_for_certificates=False))
    try:
        contexts = client_contexts(TlsSettings(authorities=str(tmp_path / "ca.pem")))
        assert [bytes_of(run) for run in _RUNS] == read_all(made, _RUNS, tls_context=contexts)
    finally:
        made.server.close()


@pytest.mark.parametrize(
    ("run", "status"),
    [
        (["file", 0, 2, 1, 2], 400),
        (["file", 0, 2, 2, 0], 400),
        (["file", 0, 2, 2, -1], 400),
        (["file", 0, 2, 2], 400),
        (["file", 0, 2, 2, 2, 2], 400),
        (["file", 0, 2, 2.0, 2], 400),
        (["file", 0, 2, 2, True], 400),
        (["file", 0, 1, 1 << 40, 2], 404),
        (["file", 0, 1, 1, requests.MAX_PIECES + 1], 413),
        (["file", 0, 1 << 70, 1 << 70, 2], 404),
    ],
)
def test_pieces_that_make_no_sense(made: Serving, run: list[Any], status: int) -> None:
    """They are refused before a byte is sent."""
    connection = http.client.HTTPConnection("127.0.0.1", made.server.port, timeout=20)
    with contextlib.closing(connection):
        body = json.dumps({"runs": [run]}).encode()
        connection.request("POST", "/model", body, {"Authorization": f"Bearer {made.ticket()}"})
        assert status == connection.getresponse().status
    assert made.opened == made.file.closed
    assert not made.sent


def test_names_of_a_request_are_bounded(path: Path) -> None:
    """Each may be an open file."""
    made = Serving(path, max_names=1)
    try:
        with pytest.raises(BackendError, match="at most 1 names"):
            read_all(made, [Run("file", 0, 1), Run("tensor", 0, 1)])
    finally:
        made.server.close()


# -- bytes that arrive -------------------------------------------------------------------------------------------------


def test_bytes_are_sent_as_they_arrive(made: Serving) -> None:
    """The reader has the first ones while the others are still missing."""
    made.file.advance(PIECE_BYTES)
    destination = memoryview(bytearray(len(_BYTES)))
    landed: list[int] = []
    read = BulkRead(Run("file", 0, len(_BYTES)), destination, landed.append)
    done: list[int] = []
    with contextlib.closing(made.reader()) as reader:
        thread = threading.Thread(target=lambda: done.extend(reader.read([read])))
        thread.start()
        assert eventually(lambda: PIECE_BYTES in landed)
        assert not done

        made.file.advance(2 * PIECE_BYTES + 5)
        made.file.advance(len(_BYTES))
        thread.join(60)
    assert [0] == done
    assert _BYTES == bytes(destination)


def test_bytes_that_do_not_come(made: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer says when to ask again, if it has not begun; else it ends."""
    monkeypatch.setattr(output, "_WAIT_SECONDS", 0.2)
    made.file.advance(10)

    with pytest.raises(StillArrivingError, match="have not arrived yet") as raised:
        read_all(made, [Run("file", 5, 10)])
    assert 1.0 == raised.value.retry_after_seconds
    assert not made.sent
    with pytest.raises(UnavailableError, match="closed amid") as ended:
        read_all(made, [Run("file", 5, 5), Run("file", 5, 10)])
    assert not isinstance(ended.value, StillArrivingError)
    assert made.opened == made.file.closed == made.ended == 2


def test_a_file_that_does_not_begin(made: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is waited for like its bytes."""
    made.file.advance(-1)
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.extend(read_all(made, [Run("file", 5, 10)])))
    thread.start()
    assert eventually(lambda: made.file.waits > 1)
    made.file.advance(len(_BYTES))
    thread.join(60)
    assert [_BYTES[5:15]] == found

    monkeypatch.setattr(output, "_WAIT_SECONDS", 0.2)
    made.file.advance(-1)
    with pytest.raises(StillArrivingError):
        read_all(made, [Run("file", 5, 10)])
    assert eventually(lambda: made.ended == 2)
    assert 1 == made.opened == made.file.closed


def test_a_download_that_failed(made: Serving) -> None:
    """The answer has its reason, and is not one to be repeated."""
    made.file.error = IntegrityError("the file has another digest")

    with pytest.raises(BackendError, match="another digest") as raised:
        read_all(made, [Run("file", 5, 10)])
    assert not isinstance(raised.value, StillArrivingError)


@pytest.mark.parametrize("who", ["reader", "server"])
def test_waits_end_with_their_connection(made: Serving, who: str) -> None:
    """Whether the reader leaves, or the server closes."""
    made.file.advance(0)
    body = json.dumps({"runs": [["file", 0, 10]]}).encode()
    head = f"POST /model HTTP/1.1\r\nAuthorization: Bearer {made.ticket()}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", made.server.port), 20) as sock:
        sock.sendall(head.encode() + body)
        assert eventually(lambda: made.file.waits > 0)
        if who == "server":
            made.server.close()
    begun = time.monotonic()
    assert eventually(lambda: made.ended == 1)
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("with_checksums", [False, True])
@pytest.mark.parametrize("run", [Run("file", 0, 1000), Run("file", 0, 10, 100, 50)])
def test_a_file_that_was_truncated(tmp_path: Path, run: Run, with_checksums: bool) -> None:
    """The connection ends: no bytes are made up."""
    (tmp_path / "file").write_bytes(_BYTES[:700])
    made = Serving(tmp_path / "file")
    try:
        with pytest.raises(UnavailableError):
            read_all(made, [run], with_checksums=with_checksums)
    finally:
        made.server.close()
    assert made.opened == made.file.closed


def test_gathering_many_short_pieces_is_quick(made: Serving) -> None:
    """A million pieces in one entry: their number alone costs little."""
    run = Run("file", 0, 4, 8, requests.MAX_PIECES)
    begun = time.perf_counter()
    [gathered] = read_all(made, [run])
    assert bytes_of(run) == gathered
    assert time.perf_counter() - begun < 20
