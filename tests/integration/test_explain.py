"""``mx.explain`` and ``mx explain``: each place that a load may read from, with the reason why it does or does not."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import save, save_file

import modelexpress_core as mx
from devtools.seaweedfs import SeaweedFS
from modelexpress_core import open_checkpoint
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.errors import BackendError, InvalidURIError
from modelexpress_core.explaining import Place
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.identity import own_identity
from modelexpress_core.sources.worker_service import Leases
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from mx_grpc_stream import plugin as grpc_plugin
from tests.support.peers import ServingWorker, serving_worker
from tests.support.plugins import core_and
from tests.support.serving import Serving

Start = Callable[..., Serving]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

_TENSORS = {"a": torch.zeros(1000), "b": torch.zeros(3, 5, dtype=torch.int16)}
_IDENTITY = own_identity("acme/model", _TENSORS, content_version="1")
_READY = p2p_pb2.SOURCE_STATUS_READY


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    save_file(_TENSORS, tmp_path / "model.safetensors")
    return tmp_path.as_uri()


class Lister:
    """A server, and what publishes records to it."""

    def __init__(self, serving: Serving) -> None:
        self.environ = {"MODEL_EXPRESS_URL": serving.url, "MX_SERVER_DEADLINE_SECONDS": "5"}
        self._client = ServerClient.from_env(self.environ)

    def publish(
        self,
        worker_id: str,
        endpoint: str,
        identity: SourceIdentity = _IDENTITY,
        *,
        transports: str = "grpc",
        status: p2p_pb2.SourceStatus = _READY,
        rank: int = 0,
    ) -> None:
        record = p2p_pb2.WorkerMetadata(worker_rank=rank, status=status, worker_grpc_endpoint=endpoint)
        record.topology.update({"mx_transports": transports, "mx_endpoint": endpoint})
        assert self._client.publish(identity, record, worker_id).success

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def lister(start: Start) -> Iterator[Lister]:
    with contextlib.closing(Lister(start())) as lister:
        yield lister


@pytest.fixture
def worker() -> Iterator[ServingWorker]:
    with serving_worker(_TENSORS, ["grpc"], source_id=_IDENTITY.source_id) as worker:
        yield worker


def explained(uri: str, environ: Mapping[str, str], identity: SourceIdentity | None = _IDENTITY) -> mx.Explanation:
    return mx.explain(uri, {name: tensor.clone() for name, tensor in _TENSORS.items()}, identity, environ=environ)


def place_of(found: mx.Explanation, worker_id: str) -> Place:
    [place] = [place for place in found.places if place.worker_id == worker_id]
    return place


def test_a_worker_is_chosen_and_the_checkpoint_is_next(lister: Lister, worker: ServingWorker, checkpoint: str) -> None:
    """In the order of a load; the lease is released, and the load chooses the same place."""
    lister.publish("w", f"127.0.0.1:{worker.port}")
    tensors = {name: torch.ones_like(tensor) for name, tensor in _TENSORS.items()}

    found = mx.explain(checkpoint, tensors, _IDENTITY, environ=lister.environ)

    assert [("chosen", worker.uri("grpc")), ("next", checkpoint)] == [
        (each.status, each.place) for each in found.places
    ]
    assert "grants a lease" in found.places[0].reason
    assert "" == found.places[1].content_version  # as in the report of a load of local files
    assert (2, 1, 4030) == (found.places[1].tensors, found.places[1].files, found.places[1].bytes)
    assert 0 == worker.leases.out()
    assert all((tensor == 1).all() for tensor in tensors.values())
    report = mx.load_into(tensors, checkpoint, identity=_IDENTITY, environ=lister.environ)
    assert found.chosen is not None
    assert found.chosen.place == report.uri


def test_workers_that_the_server_leaves_out_are_shown_with_the_reason(lister: Lister, checkpoint: str) -> None:
    """Another identity with the fields that differ, another rank, another state; other models are not shown."""
    other = attrs.evolve(_IDENTITY, torch_version="1.0", extra_parameters={"content_version": "2"})
    lister.publish("other identity", "127.0.0.1:1", other)
    lister.publish("other rank", "127.0.0.1:1", rank=3)
    lister.publish("loading", "127.0.0.1:1", status=p2p_pb2.SOURCE_STATUS_INITIALIZING)
    lister.publish("withdrawn", "127.0.0.1:1", status=p2p_pb2.SOURCE_STATUS_STALE)
    lister.publish("other model", "127.0.0.1:1", SourceIdentity("acme/other"))

    found = explained(checkpoint, lister.environ)

    assert checkpoint == (found.chosen and found.chosen.place)
    assert {"unusable"} == {each.status for each in found.places[1:]}
    assert {"other identity", "other rank", "loading", "withdrawn"} == {each.worker_id for each in found.places[1:]}
    differing = {name: theirs for name, theirs, _ in place_of(found, "other identity").differences}
    assert {"torch_version": "1.0", "content_version": "2", "layout_signature": ""} == differing
    assert "torch_version is 1.0, not " in place_of(found, "other identity").reason
    assert "it has rank 3, and rank 0 is needed" == place_of(found, "other rank").reason
    assert "not ready yet" in place_of(found, "loading").reason
    assert "stale" in place_of(found, "withdrawn").reason


def test_a_worker_that_cannot_be_used_is_named_with_the_reason(lister: Lister, checkpoint: str) -> None:
    """Each of them would be tried: unreachable, drained, of another layout, without leases left, another's port."""
    drained, full = Leases(600), Leases(600)
    drained.drain(0)
    for reader in range(8):
        for _ in range(128):
            full.grant(f"reader {reader}")
    other = {"a": torch.zeros(1000), "b": torch.zeros(5, 3, dtype=torch.int16)}
    with contextlib.ExitStack() as running:

        def serve(worker_id: str, tensors: Mapping[str, torch.Tensor], **options: Leases | str) -> None:
            given = {"source_id": _IDENTITY.source_id, "worker_id": worker_id, **options}
            served = running.enter_context(serving_worker(tensors, ["grpc"], **given))  # type: ignore[arg-type]
            lister.publish(worker_id, f"127.0.0.1:{served.port}")

        serve("drained", _TENSORS, leases=drained)
        serve("full", _TENSORS, leases=full)
        serve("other layout", other)
        serve("other content", _TENSORS, source_id="0123456789abcdef")
        lister.publish("gone", "127.0.0.1:1")
        # A worker with another id took the port of one that has ended.
        with serving_worker(_TENSORS, ["grpc"], source_id=_IDENTITY.source_id, worker_id="its successor") as successor:
            lister.publish("restarted", f"127.0.0.1:{successor.port}")

            found = explained(checkpoint, lister.environ)

    assert checkpoint == (found.chosen and found.chosen.place)
    reasons = {each.worker_id: each.reason for each in found.places if each.worker_id}
    for worker_id, words in {
        "drained": "the worker is draining",
        "full": "readers hold 1024 leases",
        "other layout": "1 tensors in another layout, or not at all: b",
        "other content": "this worker holds source '0123456789abcdef'",
        "restarted": "this is worker 'its successor', not 'restarted'",
        "gone": "no server listens there",
    }.items():
        assert words in reasons.pop(worker_id), found
    assert {} == reasons
    assert "MX_WORKER_GRPC_PORT" in place_of(found, "gone").hint
    assert all(each.hint for each in found.places if each.status == "unusable")


def test_a_transport_that_is_not_installed_comes_with_its_command(
    lister: Lister, worker: ServingWorker, checkpoint: str
) -> None:
    """The worker is still read over the transport that both sides have."""
    lister.publish("w", f"127.0.0.1:{worker.port}", transports="nixl,grpc")
    lister.publish("without any", "127.0.0.1:1", transports="no scheme")

    tensors = {name: tensor.clone() for name, tensor in _TENSORS.items()}

    found = mx.explain(
        checkpoint, tensors, _IDENTITY, environ=lister.environ, plugins=core_and(mx_grpc_stream=grpc_plugin)
    )
    disabled = explained(checkpoint, {**lister.environ, "MX_PLUGINS": "mx-grpc-stream"})

    assert worker.uri("grpc") == (found.chosen and found.chosen.place)
    [over_nixl] = [each for each in found.places if each.place.startswith("nixl://")]
    assert ("unusable", "w") == (over_nixl.status, over_nixl.worker_id)
    assert "pip install " in over_nixl.hint
    assert any("MX_PLUGINS does not name it" in each.reason for each in disabled.places)
    assert "names no transport" in place_of(found, "without any").reason


def test_a_publisher_that_is_not_trusted(start: Start, worker: ServingWorker, checkpoint: str, tmp_path: Path) -> None:
    """Its name, and the setting that would trust it."""
    (tmp_path / "tokens").write_text(f"others:{'0ther' * 8}\nreader:{'read' * 8}\n")
    for name in ("0ther", "read"):
        (tmp_path / name).write_text(name * 8)
    serving = start(MX_AUTH_MODE="token", MX_AUTH_TOKENS_PATH=str(tmp_path / "tokens"))
    environ = {"MODEL_EXPRESS_URL": serving.url}
    record = p2p_pb2.WorkerMetadata(status=_READY, worker_grpc_endpoint=f"127.0.0.1:{worker.port}")
    record.topology["mx_transports"] = "grpc"
    with ServerClient.from_env({**environ, "MX_AUTH_TOKEN_PATH": str(tmp_path / "0ther")}) as publisher:
        assert publisher.publish(_IDENTITY, record, "w").success
    reader = {**environ, "MX_AUTH_TOKEN_PATH": str(tmp_path / "read")}

    found = explained(checkpoint, reader)
    trusted = explained(checkpoint, {**reader, "MX_TRUSTED_PUBLISHERS": "others"})

    place = place_of(found, "w")
    assert "unusable" == place.status
    assert "published by 'others'" in place.reason
    assert "MX_TRUSTED_PUBLISHERS" in place.hint
    assert worker.uri("grpc") == (trusted.chosen and trusted.chosen.place)


def test_without_an_identity_or_a_content_version_no_worker_is_asked(lister: Lister, checkpoint: str) -> None:
    """The reason is one line for all workers, with the next step."""
    without_identity = explained(checkpoint, lister.environ, None)
    unknown = own_identity("acme/model", _TENSORS)
    without_version = explained(checkpoint, lister.environ, unknown)
    without_server = explained(checkpoint, {})

    for found, words in [
        (without_identity, "no identity"),
        (without_version, "content version"),
        (without_server, "no server is named"),
    ]:
        assert checkpoint == (found.chosen and found.chosen.place)
        [others] = [each for each in found.places if each.place == "other workers"]
        assert words in others.reason
        assert others.hint


def test_a_server_that_cannot_be_asked_is_shown(checkpoint: str) -> None:
    """As a place of its own, and the checkpoint is chosen."""
    found = explained(checkpoint, {"MODEL_EXPRESS_URL": "127.0.0.1:1", "MX_SERVER_DEADLINE_SECONDS": "2"})

    assert ["chosen", "unusable"] == [each.status for each in found.places]
    assert "server://" == found.places[1].place
    assert "127.0.0.1:1" in found.places[1].reason


def test_nothing_can_be_loaded(tmp_path: Path) -> None:
    """The error is what a load raises; a checkpoint that does not fit ends a load, too."""
    missing = tmp_path / "nothing"
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")

    found = explained(missing.as_uri(), {})
    other = explained(tmp_path.as_uri(), {})

    assert not found.usable
    assert isinstance(found.error, BackendError)
    assert found.places[0].reason == found.error.headline
    assert "does not fit" in str(other.error)
    with pytest.raises(type(other.error)):  # type: ignore[arg-type]  # it is an error, as the line above shows
        mx.load_into(dict(_TENSORS), tmp_path.as_uri(), environ={})
    with pytest.raises(InvalidURIError):
        explained("s3:/x", {})


def test_more_than_a_few_workers_are_not_opened(lister: Lister, worker: ServingWorker, checkpoint: str) -> None:
    """An explanation of a fleet takes no lease from each of its workers."""
    for number in range(20):
        lister.publish(f"w{number}", "127.0.0.1:1")

    found = explained(checkpoint, lister.environ)

    workers = [each for each in found.places if each.worker_id]
    assert 20 == len(workers)
    assert ["unusable"] * 8 + ["next"] * 12 == [each.status for each in workers]
    assert "at most 8" in workers[-1].reason
    assert checkpoint == (found.chosen and found.chosen.place)


def test_observers_and_metrics_do_not_see_an_explanation(worker: ServingWorker, checkpoint: str) -> None:
    """It is no load."""
    events: list[object] = []

    class Observer:
        @mx.hookimpl
        def mx_load_started(self, event: object) -> None:
            events.append(event)

        @mx.hookimpl
        def mx_load_failed(self, event: object) -> None:
            events.append(event)

    plugins = mx.PluginManager.discover({})
    plugins.register(Observer(), name="observer")
    tensors = dict(_TENSORS)

    mx.explain(worker.uri("grpc"), tensors, environ={}, plugins=plugins)

    assert [] == events
    mx.load_into(tensors, worker.uri("grpc"), environ={}, plugins=plugins)
    assert 1 == len(events)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_shows_the_workers_of_a_model(
    mx: Run, lister: Lister, worker: ServingWorker, checkpoint: str
) -> None:
    """What is known of them; their identity is not compared, because there is no model in memory."""
    lister.publish("w", f"127.0.0.1:{worker.port}")
    lister.publish("gone", "127.0.0.1:1")
    lister.publish("other rank", "127.0.0.1:1", rank=1)

    done = mx("explain", checkpoint, "--model", "acme/model", "--json", environ=lister.environ)
    text = mx("explain", checkpoint, "--model", "acme/model", environ=lister.environ)

    found = json.loads(done.stdout)
    assert 0 == done.returncode, done.stderr
    assert found["usable"]
    places = {each["worker_id"]: each for each in found["places"] if each["worker_id"]}
    assert ("possible", worker.uri("grpc")) == (places["w"]["status"], places["w"]["place"])
    assert _IDENTITY.torch_version == places["w"]["identity"]["torch_version"]
    assert ("unusable", "unusable") == (places["gone"]["status"], places["other rank"]["status"])
    assert "has rank 1" in places["other rank"]["reason"]
    assert f"1. {checkpoint}: chosen" in text.stdout
    assert f"{worker.uri('grpc')}: possible" in text.stdout
    assert 0 == worker.leases.out()


def test_the_command_compares_the_content(mx: Run, lister: Lister, worker: ServingWorker, s3_server: SeaweedFS) -> None:
    """That of the URI is known without a model in memory: a worker with another one is never read."""
    with contextlib.closing(s3_server.client()) as client:
        client.put_object(Bucket="models", Key="explained/model.safetensors", Body=save(_TENSORS))
    environ = {**lister.environ, **s3_server.environ()}
    version = open_checkpoint("s3://models/explained", environ=environ).content_version
    assert version
    lister.publish("other content", f"127.0.0.1:{worker.port}")
    with serving_worker(_TENSORS, ["grpc"], source_id=_IDENTITY.with_content_version(version).source_id) as same:
        lister.publish("w", f"127.0.0.1:{same.port}", _IDENTITY.with_content_version(version))

        done = mx("explain", "s3://models/explained", "--model", "acme/model", "--json", environ=environ)

    found = json.loads(done.stdout)
    assert ("chosen", version) == (found["places"][0]["status"], found["places"][0]["content_version"])
    places = {each["worker_id"]: each for each in found["places"] if each["worker_id"]}
    assert ("possible", "unusable") == (places["w"]["status"], places["other content"]["status"])
    assert [["content_version", "1", version]] == places["other content"]["differences"]


def test_content_that_the_uri_does_not_tell_may_be_given(
    lister: Lister, worker: ServingWorker, checkpoint: str
) -> None:
    """A local file has no version; an engine may know its commit."""
    lister.publish("w", f"127.0.0.1:{worker.port}")
    lister.publish("other content", f"127.0.0.1:{worker.port}", _IDENTITY.with_content_version("2"))

    found = mx.explain(checkpoint, model_name="acme/model", content_version="1", environ=lister.environ)

    assert ("possible", "unusable") == (place_of(found, "w").status, place_of(found, "other content").status)


def test_the_command_ends_with_the_code_of_the_error(mx: Run, tmp_path: Path) -> None:
    """1 if nothing can be loaded, 2 for a URI that is none."""
    missing = mx("explain", str(tmp_path / "nothing"))
    invalid = mx("explain", "s3:/x", "--json")

    assert (1, 2) == (missing.returncode, invalid.returncode)
    assert "No place can be read" in missing.stdout
    assert "InvalidURIError" == json.loads(invalid.stdout)["error"]["type"]
