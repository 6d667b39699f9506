"""Who reads from a worker, over what and how fast: told by real workers to those that may read them."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

import modelexpress_core as mx_
from modelexpress_core.errors import AccessDeniedError, NotFoundError
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.identity import own_identity
from modelexpress_core.sources.offering import Offer
from modelexpress_core.sources.reader_lists import ask_readers
from modelexpress_core.sources.worker_client import WorkerClient
from modelexpress_core.sources.worker_service import WorkerServer
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from tests.support.peers import ServingWorker, empty_like, every_layout, serving_worker
from tests.support.serving import Serving
from tests.support.waiting import eventually

Start = Callable[..., Serving]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

_TENSORS = every_layout()
_IDENTITY = own_identity("acme/model", _TENSORS, content_version="1")
_READY = p2p_pb2.SOURCE_STATUS_READY


def needed_bytes() -> int:
    return sum(each.nbytes for name, each in _TENSORS.items() if name != "tied")


def served_bytes(transport: str) -> float:
    return REGISTRY.get_sample_value("mx_p2p_served_bytes_total", {"transport": transport}) or 0.0


@pytest.mark.parametrize(
    ("transport", "variables"),
    [("grpc", {}), ("grpc", {"MX_BULK_PORT": "0"}), ("inproc", {})],
    ids=["bulk channel", "frames", "inproc"],
)
def test_a_load_is_listed_with_its_bytes(transport: str, variables: Mapping[str, str]) -> None:
    """Those that the worker sent; the metrics count them by transport."""
    before = served_bytes(transport)
    with serving_worker(_TENSORS, [transport], environ=variables) as worker:
        mx_.load_into(empty_like(_TENSORS), worker.uri(transport), environ={})
        # A worker counts a piece when it is sent, and its reader may be done by then.
        assert eventually(lambda: served_bytes(transport) - before == needed_bytes())
        with WorkerClient(f"127.0.0.1:{worker.port}") as client:
            [reader] = client.readers(worker.source_id, worker.worker_id).readers
            with pytest.raises(NotFoundError):
                client.readers(worker.source_id, "another")

    assert ("127.0.0.1", transport) == (reader.name, reader.transport)
    assert (needed_bytes(), True) == (reader.read_bytes, reader.counted)
    assert reader.HasField("ended_seconds")


def test_over_nixl_the_readers_tell_what_they_read() -> None:
    """At the latest when they release their leases: the worker does not see their reads."""
    pytest.importorskip("nixl_cu12", reason="the wheel exists for x86-64")
    before = served_bytes("nixl")
    with serving_worker(_TENSORS, ["nixl"]) as worker:
        mx_.load_into(empty_like(_TENSORS), worker.uri("nixl"), environ={})
        [reader] = worker.leases.readers.listed()

    assert ("nixl", needed_bytes(), False) == (reader.transport, reader.read_bytes, reader.counted)
    assert needed_bytes() == served_bytes("nixl") - before


class Fleet:
    """A server with tokens, and an offer of ``workers``."""

    def __init__(self, serving: Serving, directory: Path) -> None:
        self._serving = serving
        self._directory = directory
        self.offer: Offer

    def environ(self, name: str, **more: str) -> dict[str, str]:
        return {
            "MODEL_EXPRESS_URL": self._serving.url,
            "MX_AUTH_TOKEN_PATH": str(self._directory / name),
            "MX_WORKER_HOST": "127.0.0.1",
            "MX_WORKER_GRPC_PORT": "0",
            "MX_TRUSTED_PUBLISHERS": "workers",
            **more,
        }


@pytest.fixture
def fleet(start: Start, tmp_path: Path) -> Iterator[Fleet]:
    names = {"workers": "w0rk" * 8, "reader": "read" * 8}
    (tmp_path / "tokens").write_text("".join(f"{name}:{token}\n" for name, token in names.items()))
    for name, token in names.items():
        (tmp_path / name).write_text(token)
    fleet = Fleet(start(MX_AUTH_MODE="token", MX_AUTH_TOKENS_PATH=str(tmp_path / "tokens")), tmp_path)
    with mx_.publish(_TENSORS, identity=_IDENTITY, transports=["grpc"], environ=fleet.environ("workers")) as offer:
        assert eventually(lambda: offer.state.status == "ready")
        fleet.offer = offer
        yield fleet


def test_mx_sources_shows_who_reads_from_whom(fleet: Fleet, mx: Run) -> None:
    """By the names that the server authenticated; in the table and as JSON; also a reader that still reads."""
    environ = fleet.environ("reader")
    mx_.load_into(empty_like(_TENSORS), "memory://nowhere/model", identity=_IDENTITY, environ=environ)
    assert eventually(lambda: fleet.offer.leases.readers.listed()[0].read_bytes == needed_bytes())
    with (
        WorkerClient.from_env(environ, url=fleet.offer.endpoint) as reader,
        reader.lease(_IDENTITY.source_id, fleet.offer.worker_id),
    ):
        done = mx("sources", "--readers", "--json", environ=environ)
        table = mx("sources", "--readers", environ=environ).stdout

    [source] = json.loads(done.stdout)
    assert "" == source["readers_problem"]
    now, before = source["readers"]
    assert ("reader at 127.0.0.1", 0, None) == (now["name"], now["read_bytes"], now["ended_seconds"])
    assert ("reader at 127.0.0.1", "grpc", needed_bytes()) == tuple(
        before[key] for key in ("name", "transport", "read_bytes")
    )
    assert before["ended_seconds"] is not None
    assert "reader at 127.0.0.1" in table
    assert "/s" in table


def test_a_stranger_does_not_learn_who_reads(fleet: Fleet) -> None:
    """As for the manifest, a grant is needed; and what is no grant is counted."""

    def refused() -> float:
        return REGISTRY.get_sample_value("mx_p2p_grants_refused_total", {"reason": "unauthenticated"}) or 0.0

    before = refused()
    with WorkerClient(fleet.offer.endpoint) as stranger, pytest.raises(AccessDeniedError, match="none was sent"):
        stranger.readers(_IDENTITY.source_id, fleet.offer.worker_id)
    assert before == refused()
    with grpc.insecure_channel(fleet.offer.endpoint) as channel, pytest.raises(grpc.RpcError):
        call = channel.unary_unary("/modelexpress.peer.PeerService/ListReaders")
        call(b"", timeout=10, metadata=(("authorization", "Bearer forged.grant"),))
    assert 1 == refused() - before


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A gRPC server that is no worker: it answers every call with the same bytes. Gives its port."""

    class Every(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the annotations alone
        def service(self, _: grpc.HandlerCallDetails) -> Any:
            return grpc.unary_unary_rpc_method_handler(lambda _request, _context: answer)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Every()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


def test_a_worker_that_does_not_answer_holds_up_none(start: Start) -> None:
    """Each has its line: unreachable, of another client, not trusted, with an answer that is too long."""
    environ = {"MODEL_EXPRESS_URL": start().url}
    with contextlib.ExitStack() as running:
        client = running.enter_context(ServerClient.from_env(environ))
        worker: ServingWorker = running.enter_context(
            serving_worker(_TENSORS, ["grpc"], source_id=_IDENTITY.source_id, worker_id="answers")
        )
        manifest = p2p_pb2.GetTensorManifestResponse(mx_source_id=_IDENTITY.source_id, worker_id="other client")
        other = running.enter_context(WorkerServer(manifest, "127.0.0.1:0"))
        endpoints = {
            "answers": f"127.0.0.1:{worker.port}",
            "other client": f"127.0.0.1:{other.port}",
            "too long": f"127.0.0.1:{running.enter_context(answering(bytes(2 << 20)))}",
            "gone": "127.0.0.1:1",
            "link-local": "169.254.169.254:80",
            "no address": "",
        }
        for worker_id, endpoint in endpoints.items():
            record = p2p_pb2.WorkerMetadata(status=_READY, topology={"mx_endpoint": endpoint} if endpoint else {})
            assert client.publish(_IDENTITY, record, worker_id).success
        listed = client.listing()

        answers = ask_readers(listed, environ, server=client.url)
        too_late = ask_readers(listed, environ, server=client.url, seconds=-1)

    problems = {source.worker_id: answer.problem for source, answer in zip(listed.instances, answers, strict=True)}
    assert all("not asked" in each.problem for each in too_late)
    assert "" == problems["answers"]
    assert "127.0.0.1:1" in problems["gone"]
    assert "another client" in problems["other client"]
    assert "RESOURCE_EXHAUSTED" in problems["too long"]
    assert "no worker can be" in problems["link-local"]
    assert "no address" in problems["no address"]
