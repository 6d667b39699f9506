"""A worker that offers what it holds, in a thread of its own, and readers that call it over gRPC."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import grpc
import pytest
import trustme

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import AccessDeniedError, ModelExpressError, NotFoundError, UnavailableError
from modelexpress_core.sources.worker_client import WorkerClient
from modelexpress_core.sources.worker_service import RENEWAL_SECONDS, Leases, TooManyLeasesError, WorkerServer
from modelexpress_core.wire.channel import open_channel
from modelexpress_core.wire.client import Security
from modelexpress_core.wire.grants import GrantAuthenticator, new_grant_key
from modelexpress_core.wire.proto.modelexpress import health_pb2, p2p_pb2
from modelexpress_core.wire.rpc import STANDARD_HEALTH, WORKER, stub
from modelexpress_core.wire.settings import TlsSettings, TokenSettings
from tests.support.waiting import eventually

_TOKEN = "t0ken" * 8


def manifest(tensors: int = 3) -> p2p_pb2.GetTensorManifestResponse:
    return p2p_pb2.GetTensorManifestResponse(
        tensors=[
            p2p_pb2.TensorDescriptor(name=f"layers.{i}.weight", addr=2**40 + i, size=1 << 20, dtype="bfloat16")
            for i in range(tensors)
        ],
        mx_source_id="5a5f555570065064",
        worker_id="w-1",
        metadata_endpoint="10.0.0.1:5555",
        agent_name="agent",
        worker_rank=1,
        accelerator="cpu",
    )


def client(server: WorkerServer, **options: Security) -> WorkerClient:
    return WorkerClient(f"127.0.0.1:{server.port}", deadline_seconds=20, **options)


def test_a_call_that_succeeds_without_a_response_is_an_error() -> None:
    """As if its bytes were changed on the way: gRPC then gives no message, and no error either."""

    class Silent(grpc.GenericRpcHandler):
        def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_stream_rpc_method_handler(lambda request, context: iter(()))

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Silent()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with (
            WorkerClient(f"127.0.0.1:{port}", deadline_seconds=20) as reader,
            pytest.raises(UnavailableError, match=r"call GetAccess .*: the call ended without a response"),
        ):
            reader.access("lease", "grpc")
    finally:
        server.stop(None).wait()


def test_the_manifest_comes_back_whole() -> None:
    """Whether the worker is named or not, and with 200,000 tensors in it."""
    said = manifest(200_000)
    with WorkerServer(said, "127.0.0.1:0") as server, client(server) as reader:
        assert said == reader.manifest("5a5f555570065064")
        assert said == reader.manifest("5a5f555570065064", "w-1")
        with reader.lease("5a5f555570065064", "w-1") as lease:
            assert said == lease.manifest
            assert 1 == server.leases.out()
        assert 0 == server.leases.out()


def test_what_is_not_held_is_refused() -> None:
    """With the statuses of the protocol: another source or worker, and none at all."""
    with WorkerServer(manifest(), "127.0.0.1:0") as server, client(server) as reader:
        for ids in (("0" * 16, None), ("5a5f555570065064", "w-2")):
            with pytest.raises(NotFoundError, match=r"FAILED_PRECONDITION.*not '"):
                reader.manifest(*ids)
            with pytest.raises(NotFoundError, match="FAILED_PRECONDITION"), reader.lease(*ids):
                pytest.fail("a lease of what is not there")
        with pytest.raises(ModelExpressError, match="INVALID_ARGUMENT"):
            reader.manifest("")
        assert 0 == server.leases.out()


def test_draining_waits_for_readers_and_takes_no_more() -> None:
    """The drain ends when the last lease is back; who comes meanwhile is told so."""
    with WorkerServer(manifest(), "127.0.0.1:0") as server, client(server) as reader:
        with ThreadPoolExecutor() as pool:
            with reader.lease("5a5f555570065064"):
                drained = pool.submit(server.drain, 60.0)
                assert eventually(lambda: server.leases.draining)
                with pytest.raises(UnavailableError, match="draining"), reader.lease("5a5f555570065064"):
                    pytest.fail("a lease of a worker that drains")
                with pytest.raises(UnavailableError, match="draining"):
                    reader.manifest("5a5f555570065064")
                assert not drained.done()
            assert drained.result(60)
        with open_channel(Endpoint.parse(f"127.0.0.1:{server.port}")) as channel:
            health = stub(STANDARD_HEALTH, channel)["Check"](health_pb2.HealthCheckRequest(), timeout=10)

    assert health_pb2.HealthCheckResponse.NOT_SERVING == health.status


def test_a_reader_whose_lease_ended_is_told_so() -> None:
    """What it read may have changed under it; one whose own work failed hears of that instead."""
    with (
        WorkerServer(manifest(), "127.0.0.1:0", leases=Leases(0.001)) as server,
        client(server) as reader,
        pytest.raises(NotFoundError, match="may have changed"),
        reader.lease("5a5f555570065064"),
    ):
        assert server.drain(60.0)
    with WorkerServer(manifest(), "127.0.0.1:0") as server, client(server) as reader:
        with pytest.raises(ZeroDivisionError), reader.lease("5a5f555570065064"):
            raise ZeroDivisionError
        assert 0 == server.leases.out()


def test_a_drain_that_gives_up_says_so_to_readers() -> None:
    """The worker goes on, and may change its memory: what is read under the lease is not confirmed."""
    with (
        WorkerServer(manifest(), "127.0.0.1:0") as server,
        client(server) as reader,
        pytest.raises(NotFoundError, match="may have changed"),
        reader.lease("5a5f555570065064"),
    ):
        assert not server.drain(0.1)


def test_what_was_given_back_is_forgotten() -> None:
    """Once the lease would have ended: no worker fills its memory with readers of long ago."""
    now = 0.0
    leases = Leases(10, clock=lambda: now)
    for _ in range(100):
        lease = leases.grant()
        assert lease is not None
        assert leases.release(lease)
    now = 11.0
    leases.out()

    assert {} == leases._released


def test_leases_of_one_reader_are_limited() -> None:
    """One that takes them without end is refused, and others are not; what it gave back, or let expire, it may take."""
    now = 0.0
    leases = Leases(10, clock=lambda: now)
    taken = [leases.grant("greedy") for _ in range(128)]
    with pytest.raises(TooManyLeasesError, match="greedy holds 128"):
        leases.grant("greedy")
    assert leases.grant("other") is not None
    assert leases.release(str(taken[0]))
    assert leases.grant("greedy") is not None
    with pytest.raises(TooManyLeasesError):
        leases.grant("greedy")
    now = 11.0

    assert leases.grant("greedy") is not None
    assert 1 == leases.out()


def test_leases_of_all_readers_are_limited() -> None:
    """However many names and addresses they have."""
    leases = Leases(10)
    for number in range(1024):
        assert leases.grant(f"reader-{number}") is not None

    with pytest.raises(TooManyLeasesError, match="1024"):
        leases.grant("one more")


def test_leases_that_come_and_go_fill_no_memory() -> None:
    """Of each reader some released leases are remembered: nobody makes the worker forget those of others."""
    leases = Leases(10)
    mine = leases.grant("me")
    assert mine is not None
    assert leases.release(mine)
    for _ in range(10_000):
        lease = leases.grant("greedy")
        assert lease is not None
        assert leases.release(lease)

    assert leases.release(mine)
    assert len(leases._released) <= 129


def test_a_refused_lease(tmp_path: Path) -> None:
    """The error says what is limited."""
    with (
        WorkerServer(manifest(), "127.0.0.1:0") as server,
        client(server) as reader,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(128):
            stack.enter_context(reader.lease("5a5f555570065064"))
        with pytest.raises(ModelExpressError, match=r"RESOURCE_EXHAUSTED.*128 leases"):
            stack.enter_context(reader.lease("5a5f555570065064"))


def test_leases_end_by_themselves() -> None:
    """A reader that died keeps nobody from draining; giving back twice is giving back once."""
    now = 0.0
    leases = Leases(10, clock=lambda: now)
    first, second = leases.grant(), leases.grant()
    assert first is not None
    assert second is not None

    assert leases.release(first)
    assert leases.release(first)
    assert not leases.release("no such lease")
    assert 1 == leases.out()
    now = 11.0
    assert 0 == leases.out()
    assert not leases.release(second)
    assert leases.drain(0)
    assert leases.grant() is None


def test_many_readers_and_a_drain(tmp_path: Path) -> None:
    """Once the drain has ended, nobody holds a lease, however many came and went at the same time."""
    held = 0
    most = 0
    lock = threading.Lock()
    with WorkerServer(manifest(), "127.0.0.1:0") as server, client(server) as reader:

        def read(_: int) -> bool:
            nonlocal held, most
            try:
                with reader.lease("5a5f555570065064"):
                    with lock:
                        held += 1
                        most = max(most, held)
                    time.sleep(0.05)
                    with lock:
                        held -= 1
            except UnavailableError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            reads = [pool.submit(read, i) for i in range(200)]
            assert eventually(lambda: held > 2)
            assert server.drain(60)
            assert 0 == held
            outcomes = [each.result(60) for each in reads]

    assert most > 2
    assert any(outcomes)
    assert not all(outcomes)


def test_readers_show_grants_over_tls(tmp_path: Path) -> None:
    """A worker that wants grants answers no reader without one, and speaks TLS alone if it has a certificate."""
    token = tmp_path / "token"
    token.write_text(_TOKEN)
    authority = trustme.CA()
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    (tmp_path / "cert.pem").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    tls = TlsSettings(*(str(tmp_path / name) for name in ("ca.pem", "cert.pem", "key.pem")))
    trusting = TlsSettings(authorities=tls.authorities)

    authenticator = GrantAuthenticator("5a5f555570065064", "w", required=True)
    with WorkerServer(manifest(), "127.0.0.1:0", tls=tls, authenticator=authenticator) as server:
        url = f"https://127.0.0.1:{server.port}"
        with WorkerClient(url, security=Security(trusting, TokenSettings(str(token)))) as reader:
            with pytest.raises(UnavailableError, match="not yet been published"):
                reader.manifest("5a5f555570065064")
            authenticator.accept_key(new_grant_key())
            with pytest.raises(AccessDeniedError, match="none was sent") as refused:
                reader.manifest("5a5f555570065064")
            assert "MODEL_EXPRESS_URL" in str(refused.value)
            with pytest.raises(AccessDeniedError, match="none was sent"), reader.lease("5a5f555570065064"):
                pytest.fail("a lease without a grant")
        with client(server) as plain, pytest.raises(UnavailableError, match="speaks TLS"):
            plain.manifest("5a5f555570065064")


def test_a_port_that_is_taken() -> None:
    """Is an error that names it, and leaves no thread behind."""
    with WorkerServer(manifest(), "127.0.0.1:0") as server:
        before = threading.active_count()
        with pytest.raises(ModelExpressError, match=f"127.0.0.1:{server.port}"):
            WorkerServer(manifest(), f"127.0.0.1:{server.port}")
        assert before == threading.active_count()


def test_random_bytes_do_no_harm() -> None:
    """Whatever is sent to whatever method: an error or an answer, and a worker that goes on."""
    random = Random(2)
    message = p2p_pb2.ReleaseTensorReadRequest(mx_source_id="5a5f555570065064", worker_id="w-1", lease_id="0" * 32)
    good = message.SerializeToString()
    allowed = {"INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND"}
    with WorkerServer(manifest(), "127.0.0.1:0", leases=Leases(0.01)) as server:
        with open_channel(Endpoint.parse(f"127.0.0.1:{server.port}")) as channel:
            for name in WORKER.methods:
                call = channel.unary_unary(WORKER.path(name))
                for _ in range(1000):
                    data = bytearray(good if random.random() < 0.7 else random.randbytes(random.randrange(1, 99)))
                    data[random.randrange(len(data))] = random.randrange(256)
                    try:
                        call(bytes(data), timeout=10)
                    except grpc.RpcError as exc:
                        assert exc.code().name in allowed, exc  # noqa: PT017 - an answer is as good
        with client(server) as reader:
            assert manifest() == reader.manifest("5a5f555570065064")


# -- renewals ----------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_that_its_reader_renews_ends_soon_after_the_reader() -> None:
    """While a lease of a reader that does not know renewals keeps the long time."""
    clock = Clock()
    leases = Leases(600, clock)
    renewed, long = leases.grant(renews=True), leases.grant()
    assert renewed is not None
    assert long is not None
    for _ in range(10):
        clock.now += RENEWAL_SECONDS - 1
        assert leases.renew(renewed)
    assert 2 == leases.out()
    clock.now += RENEWAL_SECONDS

    assert 1 == leases.out()
    assert not leases.renew(renewed)
    assert not leases.release(renewed)
    assert leases.release(long)


def test_renewals_do_not_prolong_a_lease_without_end() -> None:
    """A reader has the time that the worker gives, and no more."""
    clock = Clock()
    leases = Leases(20, clock)
    lease = leases.grant(renews=True)
    assert lease is not None
    clock.now = 10
    assert leases.renew(lease)
    clock.now = 19.9
    assert leases.renew(lease)
    clock.now = 20

    assert not leases.renew(lease)
    assert not leases.release(lease)


def test_a_reader_renews_its_lease_while_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a lease lasts without renewal; afterwards nothing renews it."""
    monkeypatch.setattr("modelexpress_core.sources.worker_service.RENEWAL_SECONDS", 1)
    with WorkerServer(manifest(), "127.0.0.1:0") as server, client(server) as reader:
        with reader.lease("5a5f555570065064", "w-1"):
            time.sleep(2.5)
            assert 1 == server.leases.out()

        assert 0 == server.leases.out()
    assert not [thread for thread in threading.enumerate() if thread.name == "mx-lease"]


def test_a_reader_that_died_holds_up_a_worker_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease ends by itself, and the worker may change its memory."""
    monkeypatch.setattr("modelexpress_core.sources.worker_service.RENEWAL_SECONDS", 1)
    with WorkerServer(manifest(), "127.0.0.1:0") as server, open_channel(Endpoint("127.0.0.1", server.port)) as channel:
        request = p2p_pb2.PrepareTensorReadRequest(mx_source_id="5a5f555570065064", renews=True)
        answer = stub(WORKER, channel)["PrepareTensorRead"](request, timeout=10)
        begun = time.monotonic()

        assert 1 == answer.renew_within_seconds
        assert server.drain(30)
        assert time.monotonic() - begun < 10
