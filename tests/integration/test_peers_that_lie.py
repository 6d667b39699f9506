"""Workers that lie about what they hold, readers that lie about their leases and grants, workers that are replaced."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import grpc
import pytest
import torch
from google.protobuf.message import Message
from safetensors.torch import save

import modelexpress_core as mx
from modelexpress_core.errors import BackendError, DeadlineError, IntegrityError, NotFoundError
from modelexpress_core.events import LoadFailed, LoadStarted
from modelexpress_core.sources.worker_client import WorkerClient
from modelexpress_core.storage.memory import store
from modelexpress_core.wire.grants import GrantAuthenticator, ReadGrant, new_grant_key, sign_grant
from modelexpress_core.wire.proto.modelexpress import access_pb2, p2p_pb2, peer_pb2
from modelexpress_core.wire.rpc import LEASE, PEER, WORKER, Service
from tests.support.peers import ServingWorker, serving_worker

_SOURCE = "0123456789abcdef"
_TENSORS = {"a": torch.arange(1000.0), "b": torch.arange(15, dtype=torch.int16).reshape(3, 5)}
_CHECKPOINT = {name: tensor + 1 for name, tensor in _TENSORS.items()}


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 7) for name, tensor in _TENSORS.items()}


class Liar:
    """A gRPC server that answers as a worker does, and counts the calls of each method.

    Args:
        **answers: What a method answers with, in place of an answer that a worker could give.
    """

    def __init__(self, **answers: Callable[[Any], Message]) -> None:
        self.calls: dict[str, int] = {}
        self._answers = {
            "DescribeTensors": lambda request: honest_page(request.first),
            "PrepareTensorRead": lambda _: p2p_pb2.PrepareTensorReadResponse(lease_id="lease", manifest=manifest()),
            "GetTensorManifest": lambda _: manifest(),
            "ReleaseTensorRead": lambda _: p2p_pb2.ReleaseTensorReadResponse(),
            "RenewLease": lambda _: access_pb2.RenewLeaseResponse(),
            "GetAccess": lambda _: peer_pb2.GetAccessResponse(),
            **answers,
        }
        self.ended = threading.Event()
        liar = self

        class Every(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the annotations alone
            def service(self, details: grpc.HandlerCallDetails) -> Any:
                name = details.method.rpartition("/")[2]
                request: Any = next(each.methods[name].request for each in _SERVICES if name in each.methods)

                def answer(data: bytes, _: grpc.ServicerContext) -> bytes:
                    liar.calls[name] = liar.calls.get(name, 0) + 1
                    return liar._answers[name](request.FromString(data)).SerializeToString()

                return grpc.unary_unary_rpc_method_handler(answer)

        self._server = grpc.server(ThreadPoolExecutor(4), handlers=[Every()])
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> Liar:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.stop(0).wait()

    def load(self) -> mx.LoadReport:
        tensors = empty()
        try:
            return mx.load_into(tensors, f"grpc://127.0.0.1:{self.port}/{_SOURCE}/w", environ={})
        finally:
            assert all((tensor == 7).all() for tensor in tensors.values()), "a byte of the liar was written"


_SERVICES: tuple[Service, ...] = (WORKER, LEASE, PEER)


def manifest(source_id: str = _SOURCE, worker_id: str = "w") -> p2p_pb2.GetTensorManifestResponse:
    return p2p_pb2.GetTensorManifestResponse(mx_source_id=source_id, worker_id=worker_id)


def honest_page(first: int) -> peer_pb2.DescribeTensorsResponse:
    """What a worker that holds the tensors says, from one that does."""
    with serving_worker(_TENSORS, []) as worker:
        return worker.offered.page(first)


# -- workers that lie --------------------------------------------------------------------------------------------------


def page(total: int, *tensors: peer_pb2.TensorDescription) -> peer_pb2.DescribeTensorsResponse:
    return peer_pb2.DescribeTensorsResponse(total=total, tensors=tensors)


def described(**fields: Any) -> peer_pb2.TensorDescription:
    return peer_pb2.TensorDescription(**{"name": "a", "shape": [1000], "stride": [1], "dtype": "float32", **fields})


@pytest.mark.parametrize(
    ("describe", "message"),
    [
        (lambda _: page(10_000_000, described()), "describes 10000000 tensors"),
        (lambda _: page(0xFFFFFFFF), "describes 4294967295 tensors"),
        (lambda _: page(2, *[described()] * 3), "describes 2 tensors"),
        (lambda _: page(2, described(name="a" * (1 << 20))), "describes 2 tensors, in 1048"),
        (lambda _: page(2), "described 0 of 2 tensors"),
        (lambda _: page(2, described(digests=range(9_999))), "describes 2 tensors, in 8"),
        (lambda _: page(2, described(shape=[1000, 1])), "cannot exist"),
        (lambda _: page(2, described(), described()), "in another layout, or not at all"),
        (lambda _: page(1, described()), "in another layout, or not at all: b"),
        (lambda _: page(0), "in another layout, or not at all: a, b"),
    ],
    ids=[
        "10 million tensors",
        "the largest number",
        "more than it says",
        "a long name",
        "an empty page",
        "many digests",
        "nonsense",
        "one tensor twice",
        "one tensor too few",
        "none",
    ],
)
def test_descriptions_that_no_worker_of_the_model_gives(describe: Callable[[Any], Message], message: str) -> None:
    """Refused after the first page, before a lease; nothing is written."""
    with Liar(DescribeTensors=describe) as liar:
        with pytest.raises(BackendError, match=message):
            liar.load()

        assert {"DescribeTensors": 1} == liar.calls


def test_pages_without_end_are_refused() -> None:
    """A worker that gives one tensor at a time, of ever more tensors, ends where the reader's model does."""
    with Liar(DescribeTensors=lambda request: page(request.first + 2, described())) as liar:
        with pytest.raises(NotFoundError, match="describes 3 tensors"):
            liar.load()

        assert {"DescribeTensors": 2} == liar.calls


def test_pages_that_come_slowly_are_refused() -> None:
    """A worker decides how many pages there are, but not how long all of them take."""
    with Liar(DescribeTensors=lambda _: (liar.ended.wait(0.05), page(1000, described()))[1]) as liar:
        with WorkerClient(f"127.0.0.1:{liar.port}") as reader, pytest.raises(DeadlineError, match="few tensors"):
            reader.describe(_SOURCE, "w", most_tensors=1000, most_bytes=1 << 30, most_seconds=0.2)

        assert liar.calls["DescribeTensors"] < 10


@pytest.mark.parametrize("answered", [manifest(worker_id="another"), manifest(source_id="f" * 16)])
def test_a_worker_that_answers_as_another_one_is_not_read(answered: p2p_pb2.GetTensorManifestResponse) -> None:
    """Its lease is given back, and no session begins."""
    prepared = p2p_pb2.PrepareTensorReadResponse(lease_id="lease", manifest=answered)
    with Liar(PrepareTensorRead=lambda _: prepared) as liar:
        with pytest.raises(NotFoundError, match="the worker answers as") as caught:
            liar.load()

        assert caught.value.peer_at_fault
        assert {"DescribeTensors": 1, "PrepareTensorRead": 1, "ReleaseTensorRead": 1} == liar.calls


def test_a_description_of_a_transport_that_is_too_long_is_refused() -> None:
    """16 MiB are enough for any; the message names the size and the worker."""
    with Liar(GetAccess=lambda _: peer_pb2.GetAccessResponse(description=bytes((16 << 20) + 1))) as liar:
        with pytest.raises(BackendError, match="in 16777217 bytes") as caught:
            liar.load()

        assert f"127.0.0.1:{liar.port}" in str(caught.value)
        assert 1 == liar.calls["ReleaseTensorRead"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda digests: [*digests, 5], NotFoundError, "gives 2 digests of a, not 1"),
        (lambda _: [], NotFoundError, "gives 0 digests of a, not 1"),
        (lambda digests: [digests[0] ^ 1], IntegrityError, "of a arrived twice with other bytes"),
    ],
    ids=["too many", "none", "another"],
)
def test_digests_that_do_not_fit(
    change: Callable[[list[int]], list[int]], error: type[BackendError], message: str
) -> None:
    """Their number is compared before the lease; their values where the bytes arrived. The worker is at fault."""
    with serving_worker(_TENSORS, ["grpc"], source_id=_SOURCE) as worker:
        digests = worker.offered._described[0].digests
        digests[:] = change([*digests])

        with pytest.raises(error, match=message) as caught:
            mx.load_into(empty(), worker.uri("grpc"), environ={})

        assert caught.value.peer_at_fault
        assert 0 == worker.leases.out()


# -- readers that lie --------------------------------------------------------------------------------------------------


def refused(port: int, service: Service, method: str, request: Message, grant: str | None = None) -> grpc.StatusCode:
    """The status with which a worker refuses a call."""
    metadata = (("authorization", f"Bearer {grant}"),) if grant is not None else ()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(service.path(method))
        with pytest.raises(grpc.RpcError) as raised:
            call(request.SerializeToString(), timeout=30, metadata=metadata)
        code: grpc.StatusCode = raised.value.code()
        return code


def with_grant_refused(port: int, grant: str | None) -> set[grpc.StatusCode]:
    """The statuses with which a worker refuses every method that needs a grant."""
    ids = {"mx_source_id": _SOURCE, "worker_id": "w"}
    return {
        refused(port, WORKER, "GetTensorManifest", p2p_pb2.GetTensorManifestRequest(**ids), grant),
        refused(port, WORKER, "PrepareTensorRead", p2p_pb2.PrepareTensorReadRequest(**ids), grant),
        refused(port, PEER, "DescribeTensors", peer_pb2.DescribeTensorsRequest(**ids), grant),
        refused(port, PEER, "ListReaders", peer_pb2.ListReadersRequest(**ids), grant),
    }


@pytest.fixture
def key() -> bytes:
    return new_grant_key()


@pytest.fixture
def guarded(key: bytes) -> Iterator[ServingWorker]:
    """A worker whose readers need a grant."""
    grants = GrantAuthenticator(_SOURCE, "w", required=True)
    grants.accept_key(key)
    grants.accept_server_time(int(time.time() * 1000))
    with serving_worker(_TENSORS, ["grpc"], source_id=_SOURCE, authenticator=grants) as worker:
        yield worker


def test_a_grant_opens_one_worker_and_one_source_for_a_while(guarded: ServingWorker, key: bytes) -> None:
    """No method that needs a grant answers to another one, and no lease is granted."""
    now = int(time.time() * 1000)
    good = ReadGrant("alice", _SOURCE, "w", now + 200_000)
    port = guarded.port

    unauthenticated, denied = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
    assert {denied} == with_grant_refused(port, sign_grant(attrs.evolve(good, source_id="f" * 16), key))
    assert {denied} == with_grant_refused(port, sign_grant(attrs.evolve(good, worker_id="other"), key))
    assert {unauthenticated} == with_grant_refused(port, sign_grant(attrs.evolve(good, expires_at_ms=now - 1), key))
    too_long = attrs.evolve(good, expires_at_ms=now + 86_400_000)
    assert {unauthenticated} == with_grant_refused(port, sign_grant(too_long, key))
    assert {unauthenticated} == with_grant_refused(port, sign_grant(good, new_grant_key()))
    assert {unauthenticated} == with_grant_refused(port, None)
    assert 0 == guarded.leases.out()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(WORKER.path("GetTensorManifest"))
        request = p2p_pb2.GetTensorManifestRequest(mx_source_id=_SOURCE).SerializeToString()
        assert call(request, timeout=30, metadata=(("authorization", f"Bearer {sign_grant(good, key)}"),))


def test_a_lease_that_was_invented_or_released_gives_nothing(guarded: ServingWorker) -> None:
    """Not a renewal, a description, a ticket, a byte or a confirmation; with a grant or without."""
    lease = guarded.leases.grant("alice")
    assert lease
    assert guarded.leases.release(lease)
    for lease_id in ("", "0" * 32, lease, lease.upper(), lease[:-1]):
        renewal = access_pb2.RenewLeaseRequest(lease_id=lease_id, read_bytes=1 << 60)
        access = peer_pb2.GetAccessRequest(lease_id=lease_id, transport="grpc")
        assert grpc.StatusCode.NOT_FOUND is refused(guarded.port, LEASE, "RenewLease", renewal)
        assert grpc.StatusCode.NOT_FOUND is refused(guarded.port, PEER, "GetAccess", access)
        if lease_id != lease:  # a release that is repeated gets the same answer
            release = p2p_pb2.ReleaseTensorReadRequest(mx_source_id=_SOURCE, lease_id=lease_id)
            assert grpc.StatusCode.NOT_FOUND is refused(guarded.port, WORKER, "ReleaseTensorRead", release)
    [reader] = guarded.leases.readers.listed()
    assert 0 == reader.read_bytes


def test_the_lease_of_another_reader_is_in_no_answer(guarded: ServingWorker, key: bytes) -> None:
    """Its id is a secret of its reader, since it suffices for reading; a worker names readers without it."""
    lease = guarded.leases.grant("alice")
    assert lease
    grant = sign_grant(ReadGrant("mallory", _SOURCE, "w", int(time.time() * 1000) + 200_000), key)
    ids = {"mx_source_id": _SOURCE, "worker_id": "w"}
    answers = []
    with grpc.insecure_channel(f"127.0.0.1:{guarded.port}") as channel:
        for service, method, request in (
            (WORKER, "GetTensorManifest", p2p_pb2.GetTensorManifestRequest(**ids)),
            (WORKER, "PrepareTensorRead", p2p_pb2.PrepareTensorReadRequest(**ids)),
            (PEER, "DescribeTensors", peer_pb2.DescribeTensorsRequest(**ids)),
            (PEER, "ListReaders", peer_pb2.ListReadersRequest(**ids)),
        ):
            call = channel.unary_unary(service.path(method))
            metadata = (("authorization", f"Bearer {grant}"),)
            answers.append(call(request.SerializeToString(), timeout=30, metadata=metadata))

    assert b"alice" in answers[-1]
    assert not [answer for answer in answers if lease.encode() in answer]


# -- workers that are replaced -----------------------------------------------------------------------------------------


class WhenOpen:
    """Acts when a load is open: it has a lease, and has read nothing."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.failed: list[BaseException] = []
        self._act = act

    @mx.hookimpl
    def mx_load_started(self, event: LoadStarted) -> None:
        if event.uri.startswith("grpc://"):
            self._act()

    @mx.hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self.failed.append(event.error)


def loaded_from_checkpoint(uri: str, name: str, act: Callable[[], object], **environ: str) -> str:
    """The error of the worker, after a load that ends with the checkpoint's values and none of the worker's."""
    store(name).put("model/model.safetensors", save(_CHECKPOINT))
    identity = mx.own_identity("acme/model", _TENSORS, content_version="1")
    variables = {"MX_DISCOVERY": "static://", "MX_STATIC_SOURCES": uri, **environ}
    plugins = mx.PluginManager.discover(variables)
    observer = WhenOpen(act)
    plugins.register(observer, name="when-open")
    tensors = empty()

    report = mx.load_into(tensors, f"memory://{name}/model", identity=identity, environ=variables, plugins=plugins)

    assert report.uri == f"memory://{name}/model"
    assert all(torch.equal(_CHECKPOINT[each], tensors[each]) for each in tensors)
    [error] = observer.failed
    return str(error)


@pytest.mark.parametrize("same_id", [True, False])
def test_a_worker_that_restarts_on_its_port_does_not_get_the_lease_of_the_one_before(same_id: bool) -> None:
    """Not even if it has the same id: what it holds may be another version."""
    others = {name: tensor + 5 for name, tensor in _TENSORS.items()}
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        worker = first.enter_context(serving_worker(_TENSORS, ["grpc"], source_id=_SOURCE))

        def restart() -> None:
            first.close()
            worker_id = "w" if same_id else "v"
            second.enter_context(
                serving_worker(others, ["grpc"], source_id=_SOURCE, worker_id=worker_id, port=worker.port)
            )

        error = loaded_from_checkpoint(worker.uri("grpc"), f"restarts-{same_id}", restart)

    assert "no such lease" in error
    assert "find the workers that hold the model again" in error


def test_a_worker_that_holds_another_version_now_is_not_read() -> None:
    """Before the lease: the id of what it holds is another one."""
    with serving_worker(_TENSORS, ["grpc"], source_id="f" * 16) as worker:
        uri = worker.uri("grpc").replace("f" * 16, _SOURCE)

        error = loaded_from_checkpoint(uri, "another-version", lambda: None)

    assert f"this worker holds source '{'f' * 16}', not '{_SOURCE}'" in error


@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_tensors_that_change_between_lease_and_read_are_not_believed(change: str) -> None:
    """Memory of another size is not what the worker described; the message names the tensor."""
    with serving_worker(_TENSORS, ["grpc"], source_id=_SOURCE) as worker:

        def alter() -> None:
            if change == "gone":
                del worker.offered.memory["a"]
            else:
                worker.offered.memory["a"] = worker.offered.memory["a"][:100]

        error = loaded_from_checkpoint(worker.uri("grpc"), f"changes-{change}", alter, MX_BULK_PORT="0")

    assert "there is no tensor 'a' with bytes 0 to 3999" in error


def test_a_manifest_that_changes_between_lease_and_read_moves_nothing() -> None:
    """Addresses in it are for other clients: ours reads by names, and proves each chunk by its digest."""
    manifests: list[p2p_pb2.GetTensorManifestResponse] = []
    with serving_worker(_TENSORS, ["grpc"], source_id=_SOURCE) as worker:
        with WorkerClient(f"127.0.0.1:{worker.port}") as reader, reader.lease(_SOURCE, "w") as lease:
            manifests.append(lease.manifest)
            lease.manifest.tensors[0].addr = 1
            manifests.append(reader.manifest(_SOURCE, "w"))
        tensors = empty()
        mx.load_into(tensors, worker.uri("grpc"), environ={})

    assert manifests[0] != manifests[1]
    assert all(torch.equal(_TENSORS[name], tensors[name]) for name in tensors)
