"""The bulk channel: tickets, requests, what strangers can use up, and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme
from awscrt import checksums

from modelexpress_core.bulk import output, requests, serving
from modelexpress_core.bulk.output import PIECE_BYTES
from modelexpress_core.bulk.reading import BulkOffer, BulkRead, BulkReader
from modelexpress_core.bulk.requests import Run
from modelexpress_core.bulk.serving import BulkServer, Content
from modelexpress_core.bulk.tensor_content import TensorContent
from modelexpress_core.bulk.tickets import Ticket, Tickets
from modelexpress_core.errors import AccessDeniedError, BackendError, IntegrityError, UnavailableError
from modelexpress_core.storage.http.requests import Origin
from modelexpress_core.transport.staging import Staging
from modelexpress_core.wire.settings import TlsSettings
from modelexpress_core.wire.tls import client_contexts, server_contexts
from tests.support.waiting import eventually

_BYTES = torch.arange(0, 2 * PIECE_BYTES + 1000, dtype=torch.int64).remainder(251).to(torch.uint8)


class Source:
    """Two tensors, under one lease."""

    def __init__(self) -> None:
        self.lasts = True
        self.sent = 0
        self.contents: dict[str, Content] = {
            "large": TensorContent(_BYTES),
            "layers.0/weight ü": TensorContent(_BYTES[7:20]),
        }

    def holds(self, ticket: Ticket) -> bool:
        return self.lasts and ticket.lease_id == "lease"

    def content(self, ticket: Ticket, name: str) -> Content | None:
        return self.contents.get(name)

    def count_sent(self, ticket: Ticket, nbytes: int) -> None:
        self.sent += nbytes


class Serving:
    """A server, and what tests need of it."""

    def __init__(self, **options: Any) -> None:
        self.source, self.tickets = Source(), Tickets()
        self.server = BulkServer(self.source, self.tickets, host="127.0.0.1", **options)

    def ticket(self, **changes: Any) -> str:
        given = {"lease_id": "lease", "content": "worker", "version": "v1", "seconds": 60.0, **changes}
        return self.tickets.issue(given.pop("lease_id"), **given)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        with contextlib.closing(connection):
            headers.setdefault("Authorization", f"Bearer {self.ticket()}")
            sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, sent, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def reader(self, ticket: str | None = None, **options: Any) -> BulkReader:
        origin = Origin("127.0.0.1", self.server.port, tls="tls_context" in options)
        offer = BulkOffer(origin, ticket or self.ticket(), "worker")
        return BulkReader(offer, connect_timeout_seconds=10, patience_seconds=20, **options)


@pytest.fixture
def serving_() -> Iterator[Serving]:
    made = Serving()
    yield made
    made.server.close()


def tensor_of(read: BulkRead) -> torch.Tensor:
    assert isinstance(read.destination, torch.Tensor)
    return read.destination


def reads_of(*runs: tuple[str, int, int]) -> list[BulkRead]:
    return [BulkRead(Run(*run), torch.zeros(run[2], dtype=torch.uint8)) for run in runs]


# -- tickets -----------------------------------------------------------------------------------------------------------


def test_a_ticket_is_what_was_issued() -> None:
    """With everything in it, until it ends."""
    now = 100.0
    tickets = Tickets(clock=lambda: now)
    text = tickets.issue("lease", content="w", version="v", seconds=5, reader="n")

    assert Ticket("lease", "w", "v", 105.0, "n") == tickets.verified(text)
    now = 105.0
    assert tickets.verified(text) is None


def test_no_other_text_is_a_ticket() -> None:
    """Changed in any place, made with another key, or nonsense."""
    tickets = Tickets()
    text = tickets.issue("lease", content="w", version="v", seconds=60)
    payload, _, signature = text.partition(".")
    other = Tickets().issue("lease", content="w", version="v", seconds=60)
    wrong = ["", ".", payload, f"{payload}.", f".{signature}", f"{other.partition('.')[0]}.{signature}", other, "ü" * 9]
    wrong += [text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :] for at in range(len(text) - 1)]

    assert [each for each in wrong if tickets.verified(each) is not None] == []
    assert tickets.verified("a" * 5000 + ".b") is None


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        ("", 200, slice(None)),
        ("bytes=0-0", 206, slice(0, 1)),
        ("bytes=5-", 206, slice(5, None)),
        ("bytes=-3", 206, slice(-3, None)),
        (f"bytes={PIECE_BYTES - 2}-{PIECE_BYTES + 2}", 206, slice(PIECE_BYTES - 2, PIECE_BYTES + 3)),
        ("bytes=1-2,4-5", 200, slice(None)),
        (f"bytes=10-{10**15}", 206, slice(10, None)),
    ],
)
def test_get_answers_ranges(serving_: Serving, asked: str, status: int, part: slice) -> None:
    """As HTTP has them."""
    answered, headers, content = serving_.ask("GET", "/worker/large", Range=asked)

    assert (status, bytes(_BYTES[part].numpy())) == (answered, content)
    assert '"v1"' == headers["ETag"]
    assert (status == 206) == ("Content-Range" in headers)


def test_head_and_names_with_any_character(serving_: Serving) -> None:
    """HEAD has the length alone."""
    path = "/worker/layers.0/weight%20%C3%BC"

    status, headers, content = serving_.ask("HEAD", path)
    assert (200, "13", b"") == (status, headers["Content-Length"], content)
    assert bytes(_BYTES[7:20].numpy()) == serving_.ask("GET", path)[2]


def test_post_gathers_ranges(serving_: Serving) -> None:
    """In the order of the request; with checksums, each piece is followed by its own."""
    runs = [["large", PIECE_BYTES - 3, PIECE_BYTES + 10], ["layers.0/weight ü", 1, 2], ["large", 0, 1]]
    expected = [bytes(_BYTES[PIECE_BYTES - 3 : 2 * PIECE_BYTES + 7].numpy()), bytes(_BYTES[8:10].numpy()), b"\0"]

    assert (200, b"".join(expected)) == serving_.ask("POST", "/worker", {"runs": runs})[::2]
    pieces = [expected[0][:PIECE_BYTES], expected[0][PIECE_BYTES:], *expected[1:]]
    sent = b"".join(piece + checksums.crc64nvme(piece, 0).to_bytes(8, "big") for piece in pieces)
    assert (200, sent) == serving_.ask("POST", "/worker", {"runs": runs, "checksums": True})[::2]
    assert eventually(lambda: 2 * sum(map(len, expected)) == serving_.source.sent)


_RUN = ["large", 0, 1]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/worker/large", None, {"Authorization": ""}, 401),
        ("GET", "/worker/large", None, {"Authorization": "Bearer x.y"}, 401),
        ("GET", "/other/large", None, {}, 403),
        ("GET", "/worker/none", None, {}, 404),
        ("GET", "/worker/", None, {}, 404),
        ("GET", "/worker/large", None, {"If-Match": '"v2"'}, 412),
        ("GET", "/worker/large", None, {"Range": f"bytes={len(_BYTES)}-"}, 416),
        ("GET", "/worker/large", b"x", {}, 400),
        ("PUT", "/worker/large", b"x", {}, 405),
        ("POST", "/worker", {"runs": [["large", 0, len(_BYTES) + 1]]}, {}, 404),
        ("POST", "/worker", {"runs": [["large", len(_BYTES), 1]]}, {}, 404),
        ("POST", "/worker", {"runs": [["large", -1, 5]]}, {}, 400),
        ("POST", "/worker", {"runs": [["large", 0, 0]]}, {}, 400),
        ("POST", "/worker", {"runs": [["large", 0, 1 << 70]]}, {}, 404),
        ("POST", "/worker", {"runs": [["large", True, 1]]}, {}, 400),
        ("POST", "/worker", {"runs": [["large", 0.0, 1]]}, {}, 400),
        ("POST", "/worker", {"runs": [[["large"], 0, 1]]}, {}, 400),
        ("POST", "/worker", {"runs": [_RUN], "checksums": 1}, {}, 400),
        ("POST", "/worker", {"runs": [_RUN] * (requests.MAX_RUNS + 1)}, {}, 413),
        ("POST", "/worker", [], {}, 400),
        ("POST", "/worker", b"[" * 100_000, {}, 400),
        ("POST", "/worker", b"\xff", {}, 400),
        ("POST", "/worker", b" " * ((1 << 20) + 1), {}, 413),
        ("POST", "/worker", None, {"Transfer-Encoding": "chunked"}, 400),
    ],
)
def test_what_is_not_answered(
    serving_: Serving, method: str, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    """It is refused, no byte of a tensor is sent, and the connection is closed."""
    answered, got, content = serving_.ask(method, path, body, **headers)

    assert (status, "close") == (answered, got["Connection"])
    assert len(content) < 1000
    assert not serving_.source.sent


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /worker/large HTTP/1.0\r\n\r\n",
        b"GET  /worker HTTP/1.1\r\n\r\n",
        b"GET worker HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n",
        b"GET / HTTP/1.1\r\nno header\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 300 + b"\r\n",
        b"GET /" + b"a" * 70_000,
    ],
)
def test_nonsense_is_refused(serving_: Serving, sent: bytes) -> None:
    """With an answer in HTTP."""
    with socket.create_connection(("127.0.0.1", serving_.server.port), 20) as sock:
        sock.sendall(sent)
        assert sock.recv(100).startswith(b"HTTP/1.1 400 ")


def test_a_connection_serves_many_requests(serving_: Serving) -> None:
    """One after another."""
    connection = http.client.HTTPConnection("127.0.0.1", serving_.server.port, timeout=20)
    with contextlib.closing(connection):
        for at in range(5):
            headers = {"Authorization": f"Bearer {serving_.ticket()}", "Range": f"bytes={at}-{at}"}
            connection.request("GET", "/worker/large", headers=headers)
            assert bytes([at]) == connection.getresponse().read()
            sock = connection.sock
        assert sock is connection.sock


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_curl_reads_it(serving_: Serving, tmp_path: Path) -> None:
    """With a ticket."""
    url = f"http://127.0.0.1:{serving_.server.port}/worker/large"
    ticket = f"Authorization: Bearer {serving_.ticket()}"
    subprocess.run(
        ["curl", "-sf", "--noproxy", "*", "-H", ticket, "-r", "9-4999", "-o", str(tmp_path / "out"), url],
        check=True,
        timeout=60,
    )

    assert bytes(_BYTES[9:5000].numpy()) == (tmp_path / "out").read_bytes()


# -- what strangers can use up -----------------------------------------------------------------------------------------


def test_requests_have_a_time(serving_: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether nothing comes, or a byte now and then."""
    monkeypatch.setattr(serving, "_FIRST_REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(requests, "_REQUEST_SECONDS", 0.2)
    for sent in (b"", b"GET / HT"):
        with socket.create_connection(("127.0.0.1", serving_.server.port), 20) as sock:
            sock.sendall(sent)
            begun = time.monotonic()
            with contextlib.suppress(OSError):
                while sock.recv(100):
                    pass
            assert time.monotonic() - begun < 10


def test_strangers_do_not_keep_readers_out(serving_: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest connection without a ticket makes room; those with one stay."""
    monkeypatch.setattr(serving, "_MAX_STRANGERS", 5)
    monkeypatch.setattr(serving, "_MAX_CONNECTIONS", 12)
    with contextlib.closing(serving_.reader()) as reader, contextlib.ExitStack() as opened:
        reader.check()
        address = ("127.0.0.1", serving_.server.port)
        strangers = [opened.enter_context(socket.create_connection(address, 20)) for _ in range(40)]
        assert 200 == serving_.ask("HEAD", "/worker/large")[0]
        assert b"" == strangers[0].recv(1)
        (read,) = reads_of(("large", 3, 100))
        assert [0] == list(reader.read([read]))
        assert eventually(lambda: len(serving_.server._connections) <= 12)


def test_connections_are_bounded(serving_: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for holders of tickets; while all are busy, the others are turned away."""
    monkeypatch.setattr(serving, "_MAX_CONNECTIONS", 3)
    reads = reads_of(*[("large", 0, PIECE_BYTES)] * 20)
    with contextlib.ExitStack() as opened:
        readers = [opened.enter_context(contextlib.closing(serving_.reader())) for _ in range(4)]
        readings: list[Any] = [reader.read(reads) for reader in readers[:3]]
        for reading in readings:
            next(reading)  # and the rest of the answer waits to be received

        with pytest.raises(UnavailableError):
            readers[3].check()
        readings[0].close()
        readers[0].close()
        assert eventually(lambda: len(serving_.server._connections) < 3)
        readers[3].check()


def test_the_longest_idle_connection_makes_room(serving_: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a new one; its reader connects again when it reads next."""
    monkeypatch.setattr(serving, "_MAX_CONNECTIONS", 3)
    (read,) = reads_of(("large", 3, 100))
    with contextlib.ExitStack() as opened:
        readers = [opened.enter_context(contextlib.closing(serving_.reader())) for _ in range(6)]
        for reader in readers:
            reader.check()
        assert eventually(lambda: len(serving_.server._connections) <= 3)
        assert [0] == list(readers[0].read([read]))
    assert torch.equal(_BYTES[3:103], tensor_of(read))


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_checksums", [False, True])
def test_ranges_are_in_place(serving_: Serving, with_checksums: bool) -> None:
    """Of any size, in one request."""
    reads = reads_of(("large", 1, 2 * PIECE_BYTES), ("layers.0/weight ü", 0, 13), ("large", 0, 1), ("large", 5, 70))
    with contextlib.closing(serving_.reader()) as reader:
        assert [0, 1, 2, 3] == list(reader.read(reads, checksums=with_checksums))

    for each in reads:
        start = each.run.offset + (7 if each.run.name != "large" else 0)
        assert torch.equal(_BYTES[start : start + each.run.length], tensor_of(each))


def test_changed_bytes_are_noticed(serving_: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their checksum."""
    monkeypatch.setattr(output, "_checksum", lambda *_: 0)
    with contextlib.closing(serving_.reader()) as reader, pytest.raises(IntegrityError, match="another checksum"):
        list(reader.read(reads_of(("large", 0, 1000)), checksums=True))


def test_a_lease_that_ends_ends_the_answer(serving_: Serving) -> None:
    """Before the next piece; then the ticket is worth nothing."""
    reads = reads_of(*[("large", 0, PIECE_BYTES)] * 20)
    with contextlib.closing(serving_.reader()) as reader:
        reading = reader.read(reads)
        next(reading)
        serving_.source.lasts = False
        with pytest.raises(UnavailableError, match="closed amid"):
            list(reading)
        with pytest.raises(AccessDeniedError, match="HTTP 401"):
            list(reader.read(reads[:1]))
    assert not tensor_of(reads[-1]).any()


def test_nothing_is_written_after_close(serving_: Serving) -> None:
    """Also if the rest of the answer has arrived already."""
    reads = reads_of(*[("large", 1, 1000)] * 50)
    reader = serving_.reader()
    reading = reader.read(reads)
    next(reading)
    reader.close()
    with pytest.raises(UnavailableError, match="the reader was closed"):
        list(reading)
    assert not tensor_of(reads[1]).any()


def test_nothing_is_sent_after_close_of_the_server(serving_: Serving) -> None:
    """Sends end, also one whose reader takes nothing."""
    sock = socket.create_connection(("127.0.0.1", serving_.server.port), 20)
    with sock, contextlib.closing(serving_.reader()) as reader:
        body = json.dumps({"runs": [["large", 0, len(_BYTES)]] * 40}).encode()
        head = f"POST /worker HTTP/1.1\r\nAuthorization: Bearer {serving_.ticket()}\r\nContent-Length: {len(body)}\r\n"
        sock.sendall(f"{head}\r\n".encode() + body)
        assert b"H" == sock.recv(1)
        reader.check()

        closing = threading.Thread(target=serving_.server.close)
        closing.start()
        closing.join(20)

        assert not closing.is_alive()
        with pytest.raises(UnavailableError):
            reader.check()


def test_answers_of_other_programs_are_refused() -> None:
    """An answer that is not of the expected length fills nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.recv(10_000)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

        threading.Thread(target=answer, daemon=True).start()
        offer = BulkOffer(Origin("127.0.0.1", listening.getsockname()[1], tls=False), "t", "worker")
        reader = BulkReader(offer, connect_timeout_seconds=10, patience_seconds=20)
        (read,) = reads_of(("large", 0, 1000))
        with contextlib.closing(reader), pytest.raises(BackendError, match="with 5 bytes"):
            list(reader.read([read]))
    assert not tensor_of(read).any()


def test_a_port_in_use_is_left_to_its_owner() -> None:
    """Another one is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        made = Serving(port=taken.getsockname()[1])
        assert made.server.port != taken.getsockname()[1]
        assert 200 == made.ask("HEAD", "/worker/large")[0]
        made.server.close()


def test_tls_and_the_name_in_the_certificate(tmp_path: Path) -> None:
    """A ticket for a name is worth nothing without the certificate."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    settings = {}
    for name in ("server.example", "reader.example", "thief.example"):
        authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(str(tmp_path / name))
        settings[name] = TlsSettings(str(tmp_path / "ca.pem"), str(tmp_path / name), str(tmp_path / name))
    made = Serving(tls=server_contexts(settings["server.example"], ask_for_certificates=True))
    try:
        ticket = made.ticket(reader="reader.example")

        def check(tls: TlsSettings, name: str = "server.example") -> None:
            with contextlib.closing(made.reader(ticket, tls_context=client_contexts(tls), tls_name=name)) as reader:
                reader.check()

        check(settings["reader.example"])
        for tls in (settings["thief.example"], TlsSettings(authorities=str(tmp_path / "ca.pem"))):
            with pytest.raises(AccessDeniedError, match="HTTP 401"):
                check(tls)
        with pytest.raises(UnavailableError, match="certificate"):
            check(settings["reader.example"], "other.example")
        with pytest.raises(UnavailableError), contextlib.closing(made.reader(ticket)) as plain:
            plain.check()
        with pytest.raises(UnavailableError, match="certificate"):
            check(TlsSettings())
    finally:
        made.server.close()


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 200, 1234])
def test_staging_copies_every_byte(length: int) -> None:
    """In both directions, whatever the size of a piece."""
    staging = Staging(torch.device("cpu"), piece_bytes=100)
    out = b"".join(bytes(piece) for piece in staging.copied_out(_BYTES[:length]))
    assert bytes(_BYTES[:length].numpy()) == out

    destination, position = torch.zeros(length, dtype=torch.uint8), 0

    def receive(view: memoryview) -> None:
        nonlocal position
        view[:] = out[position : position + len(view)]
        position += len(view)

    staging.copy_in(destination, receive)
    assert torch.equal(_BYTES[:length], destination)
