"""Loads from a peer in the same process: in place, over to a checkpoint, and what becomes of the destination."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from safetensors.torch import save
from torch import nn

import modelexpress_core as mx
from modelexpress_core import loader as loader_module
from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Peer, Tier
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.contracts.transport import PeerAccess, TensorRead
from modelexpress_core.errors import (
    BackendError,
    DeadlineError,
    IntegrityError,
    InvalidURIError,
    NotFoundError,
    UnavailableError,
)
from modelexpress_core.events import LoadFailed, LoadFinished, LoadStarted
from modelexpress_core.loads.destination import Destination
from modelexpress_core.loads.targets import DeferredTarget, Target
from modelexpress_core.placement.destinations import Destinations
from modelexpress_core.providers import DiscoveryProvider, TransportProvider
from modelexpress_core.storage.memory import store
from modelexpress_core.transport import inproc
from tests.support.peers import ServingWorker, serving_worker

_IDENTITY = SourceIdentity("acme/model", extra_parameters={"content_version": "1"})


def new_model(fill: float | None = None) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    model[1].register_buffer("scale", torch.randn(3))
    model.register_parameter("tied", model[0].weight)
    if fill is not None:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(fill)
    return model


class Discovery:
    """Names the workers that it is given, before the place that was asked for."""

    def __init__(self, *uris: str) -> None:
        self.uris = uris

    def candidates(self, request: LoadRequest) -> list[Candidate]:
        assert request.identity == _IDENTITY
        return [Candidate(mx.ModelURI.parse(uri), "test") for uri in self.uris]

    def close(self) -> None:
        pass


class Plugin:
    """A discovery that names ``uris``, a transport ``odd`` made of ``session``, and an observer of loads."""

    def __init__(self, *uris: str, session: type[inproc.InprocSession] = inproc.InprocSession) -> None:
        self.uris = uris
        self.session = session
        self.events: list[object] = []

    @mx.hookimpl
    def mx_register_discoveries(self) -> list[DiscoveryProvider]:
        return [DiscoveryProvider("test", ("test",), lambda uri, settings: Discovery(*self.uris))]

    @mx.hookimpl
    def mx_register_transports(self) -> list[TransportProvider]:
        plugin = self

        class Transport(inproc.InprocTransport):
            def connect(self, access: PeerAccess) -> inproc.InprocSession:
                session = super().connect(access)
                return plugin.session(session._served, access.lease_id, str(self._uri))

        return [TransportProvider("odd", ("odd",), lambda uri, settings: Transport(uri), tier=Tier.PEER)]

    @mx.hookimpl
    def mx_load_started(self, event: LoadStarted) -> None:
        self.events.append(event)

    @mx.hookimpl
    def mx_load_finished(self, event: LoadFinished) -> None:
        self.events.append(event)

    @mx.hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self.events.append(event)


@pytest.fixture
def source() -> nn.Module:
    """The model that the peer holds."""
    return new_model()


@pytest.fixture
def served(source: nn.Module) -> Iterator[ServingWorker]:
    """A worker that offers it over ``inproc``, and over the transport of ``Plugin``."""
    plugins = mx.PluginManager.discover({})
    plugins.register(Plugin(), name="mx-test")
    state = source.state_dict()
    with serving_worker(state, ["inproc", "odd"], source_id=_IDENTITY.source_id, plugins=plugins) as worker:
        yield worker


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest) -> tuple[str, Mapping[str, torch.Tensor]]:
    """A checkpoint with other values than the peer's, so that it shows which of them was loaded."""
    state = {name: tensor.clone() for name, tensor in new_model().state_dict().items()}
    name = request.node.name.replace("[", "-").replace("]", "").replace(" ", "-")
    state["tied"] = state["0.weight"]
    stored = {key: value.clone() for key, value in state.items()}
    store(name).put("model/model.safetensors", save(stored))
    return f"memory://{name}/model", state


def load(
    uri: str, plugin: Plugin, target: nn.Module, destination: Destination | None = None, **environ: str
) -> mx.LoadReport:
    plugins = mx.PluginManager.discover({})
    plugins.register(plugin, name="mx-test")
    loader = loader_module.Loader({"MX_DISCOVERY": "test://", **environ}, plugins)
    if destination is None:
        destination = Target(Destinations(target, torch.device("cpu")), strict=True, cast=False)
    return loader.load(loader.request(uri, identity=_IDENTITY), destination)


def assert_equal(expected: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(expected[name], tensor), name


def test_a_model_is_loaded_from_a_peer(
    source: nn.Module, served: ServingWorker, checkpoint: tuple[str, Mapping[str, torch.Tensor]]
) -> None:
    """Its tensors, read once each, straight into place; the checkpoint is not opened."""
    plugin = Plugin(served.uri("inproc"))
    target = new_model(fill=7)
    addresses = [tensor.data_ptr() for tensor in target.state_dict().values()]

    report = load(checkpoint[0], plugin, target)

    assert_equal(source.state_dict(), target)
    assert addresses == [tensor.data_ptr() for tensor in target.state_dict().values()]
    assert [LoadStarted, LoadFinished] == [type(event) for event in plugin.events]
    needed = sum(tensor.nbytes for name, tensor in source.state_dict().items() if name != "tied")
    assert (needed, needed, 5) == (report.bytes_needed, report.bytes_fetched, report.tensors)
    assert 5 == report.verified["digests"]
    assert report.uri == served.uri("inproc")
    assert 0 == served.leases.out()


class Lost(inproc.InprocSession):
    """The worker is gone after the first tensor."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        yield next(super().read(reads))
        reason = "the connection broke"
        raise UnavailableError(reason, uri=self._uri, peer_at_fault=True)


class Short(inproc.InprocSession):
    """The transport ends without the last range."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        yield from super().read(reads[:-1])


class Twice(inproc.InprocSession):
    """The transport says twice that it read the first range."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        yield from (0 for _ in super().read(reads))


class Raises(inproc.InprocSession):
    """The transport does not translate its errors."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        reason = "no such thing"
        raise KeyError(reason)


class Flips(inproc.InprocSession):
    """Each first byte arrives with a flipped bit."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        for position in super().read(reads):
            reads[position].destination[0] ^= 4
            yield position


class Silent(inproc.InprocSession):
    """Nothing arrives until the session is closed."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        while not self._closed:
            time.sleep(0.01)
        reason = "the session was closed"
        raise UnavailableError(reason)
        yield from super().read(reads)


_BROKEN = {
    Lost: UnavailableError,
    Short: BackendError,
    Twice: BackendError,
    Raises: BackendError,
    Flips: IntegrityError,
    Silent: DeadlineError,
}


@pytest.mark.parametrize("session", _BROKEN, ids=lambda cls: cls.__name__)
def test_after_a_failing_peer_the_checkpoint_is_loaded(
    served: ServingWorker,
    checkpoint: tuple[str, Mapping[str, torch.Tensor]],
    session: type[inproc.InprocSession],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The model then holds the checkpoint's values, and none of the peer's."""
    uri, state = checkpoint
    plugin = Plugin(served.uri("odd"), session=session)
    target = new_model(fill=7)

    report = load(uri, plugin, target, MX_STALL_SECONDS="0.3")

    assert_equal(state, target)
    assert (uri, 1) == (report.uri, report.files)
    assert isinstance(plugin.events[-1], LoadFinished)
    assert 1 == sum(isinstance(event, LoadFailed) for event in plugin.events)
    assert "odd://" in caplog.text


@pytest.mark.parametrize("confirms", [True, False])
def test_memory_that_reads_may_still_write_to_ends_the_load(
    served: ServingWorker, checkpoint: tuple[str, Mapping[str, torch.Tensor]], confirms: bool
) -> None:
    """No other candidate follows, whether or not the worker confirms the end of the lease."""

    class StillWriting(Lost):
        def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
            if not confirms:
                served.leases.drain(0)
            yield from super().read(reads)

        def close(self) -> None:
            super().close()
            reason = "a read has not ended"
            raise UnavailableError(reason)

    plugin = Plugin(served.uri("odd"), session=StillWriting)

    with pytest.raises(mx.ModelExpressError, match="continue after the load has failed") as caught:
        load(checkpoint[0], plugin, new_model(fill=7))

    assert "end this process" == caught.value.hint
    assert 0 == served.leases.out()


@pytest.mark.parametrize("session", _BROKEN, ids=lambda cls: cls.__name__)
def test_a_touched_destination_is_initialized_again_before_the_next_candidate(
    served: ServingWorker,
    checkpoint: tuple[str, Mapping[str, torch.Tensor]],
    session: type[inproc.InprocSession],
) -> None:
    """Its owner initializes it once, and only if something may have been written."""
    uri, state = checkpoint
    target = new_model(fill=7)
    renewed: list[bool] = []

    def make_anew() -> None:
        renewed.append(destination.touched)
        with torch.no_grad():
            for tensor in target.state_dict().values():
                tensor.fill_(9)

    class Watched(Target):
        def check_checkpoint(self, checkpoint: mx.Checkpoint) -> None:
            assert all((tensor == 9).all() for tensor in target.state_dict().values())
            assert not self.touched
            super().check_checkpoint(checkpoint)

    tensors = Destinations(target, torch.device("cpu"))
    destination = Watched(tensors, strict=True, cast=False, renew=make_anew)
    load(uri, Plugin(served.uri("odd"), session=session), target, destination, MX_STALL_SECONDS="0.3")

    assert [True] == renewed
    assert_equal(state, target)


@pytest.mark.parametrize("session", _BROKEN, ids=lambda cls: cls.__name__)
def test_a_touched_destination_that_cannot_be_initialized_again_ends_the_load(
    served: ServingWorker,
    checkpoint: tuple[str, Mapping[str, torch.Tensor]],
    session: type[inproc.InprocSession],
) -> None:
    """The peer's error is raised; the checkpoint is not opened."""
    target = new_model(fill=7)
    plugin = Plugin(served.uri("odd"), session=session)
    destination = Target(Destinations(target, torch.device("cpu")), strict=True, cast=False, renew=None)

    with pytest.raises(_BROKEN[session]):
        load(checkpoint[0], plugin, target, destination, MX_STALL_SECONDS="0.3")

    assert destination.touched
    assert [LoadStarted, LoadFailed] == [type(event) for event in plugin.events]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("other/w", None),
        (f"{_IDENTITY.source_id}/other", None),
        (f"{_IDENTITY.source_id}/w", lambda model: model[0].register_buffer("extra", torch.zeros(1))),
        (f"{_IDENTITY.source_id}/w", lambda model: setattr(model[1], "scale", torch.zeros(3, dtype=torch.float64))),
        (f"{_IDENTITY.source_id}/w", lambda model: setattr(model, "tied", nn.Parameter(torch.zeros(32, 64)))),
    ],
    ids=["another source", "another worker", "one more tensor", "another dtype", "not tied"],
)
def test_a_peer_that_holds_something_else_is_not_read(
    served: ServingWorker, path: str, change: Callable[[nn.Module], object] | None
) -> None:
    """Names, shapes, strides, dtypes and ties are compared before the lease; nothing is written."""
    target = new_model(fill=7)
    if change is not None:
        change(target)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    source_id, _, worker_id = path.partition("/")
    peer = Peer(source_id, worker_id)

    class Naming(Plugin):
        @mx.hookimpl
        def mx_rank_candidates(self, request: LoadRequest, candidates: Sequence[Candidate]) -> list[Candidate]:
            return [Candidate(mx.ModelURI.parse(f"inproc://127.0.0.1:{served.port}/{path}"), "test", peer)]

    destination = Target(Destinations(target, torch.device("cpu")), strict=True, cast=False)
    with pytest.raises(NotFoundError):
        load("memory://nowhere/model", Naming(), target, destination)

    assert not destination.touched
    assert_equal(before, target)


def test_code_that_copies_deferred_tensors_cannot_read_from_a_peer(served: ServingWorker) -> None:
    """It needs the tensors of a checkpoint; the peer is skipped before a byte moves."""
    plugin = Plugin()
    peer = Peer(_IDENTITY.source_id, "w")

    class Naming(Plugin):
        @mx.hookimpl
        def mx_rank_candidates(self, request: LoadRequest, candidates: Sequence[Candidate]) -> list[Candidate]:
            return [Candidate(mx.ModelURI.parse(f"inproc://127.0.0.1:{served.port}/x/w"), "test", peer)]

    destination = DeferredTarget(None)
    with pytest.raises(BackendError, match="takes tensors of a checkpoint"):
        load("memory://nowhere/model", Naming(), new_model(), destination)

    assert not destination.touched
    assert [] == plugin.events


@pytest.mark.parametrize("when", ["no lease", "no read", "no end"])
def test_a_worker_that_takes_its_memory_back_is_not_believed(
    served: ServingWorker, checkpoint: tuple[str, Mapping[str, torch.Tensor]], when: str
) -> None:
    """Whenever it does; the checkpoint is loaded instead."""
    uri, state = checkpoint
    served_leases = served.leases

    class Drains(inproc.InprocSession):
        def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
            yield from super().read(reads)
            if when == "no end":
                served_leases.drain(0)

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            if when == "no read":
                served_leases.drain(0)

    if when == "no lease":
        served_leases.drain(0)
    target = new_model(fill=7)

    report = load(uri, Plugin(served.uri("odd"), session=Drains), target)

    assert_equal(state, target)
    assert uri == report.uri


def test_a_bit_that_changes_once_is_read_again(
    source: nn.Module, served: ServingWorker, checkpoint: tuple[str, Mapping[str, torch.Tensor]]
) -> None:
    """The chunk arrives with its digest then, and the report counts it."""

    class FlipsOnce(inproc.InprocSession):
        def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
            for position in super().read(reads):
                if not flipped:
                    flipped.append(reads[position].name)
                    reads[position].destination[-1] ^= 128
                yield position

    flipped: list[str] = []
    target = new_model(fill=7)

    report = load(checkpoint[0], Plugin(served.uri("odd"), session=FlipsOnce), target)

    assert_equal(source.state_dict(), target)
    assert 1 == report.retries == len(flipped)
    assert report.bytes_reread == source.state_dict()[flipped[0]].nbytes


def test_memory_that_changed_since_the_offer_is_noticed(
    source: nn.Module, served: ServingWorker, checkpoint: tuple[str, Mapping[str, torch.Tensor]]
) -> None:
    """One bit of one tensor, without the offer being withdrawn: the error names tensor and worker."""
    source[1].bias.data.view(torch.uint8)[5] ^= 1
    plugin = Plugin(served.uri("inproc"))
    destination = Target(Destinations(new_model(), torch.device("cpu")), strict=True, cast=False, renew=None)

    with pytest.raises(IntegrityError, match=r"1\.bias") as caught:
        load(checkpoint[0], plugin, new_model(), destination)

    assert served.uri("inproc") in str(caught.value)
    assert caught.value.peer_at_fault


def test_a_worker_at_fault_is_not_tried_over_another_transport(
    source: nn.Module, served: ServingWorker, checkpoint: tuple[str, Mapping[str, torch.Tensor]]
) -> None:
    """It is the same memory."""
    source[1].bias.data.view(torch.uint8)[5] ^= 1
    uri, state = checkpoint
    peer = Peer(_IDENTITY.source_id, "w")

    class Both(Plugin):
        @mx.hookimpl
        def mx_rank_candidates(self, request: LoadRequest, candidates: Sequence[Candidate]) -> list[Candidate]:
            peers = [Candidate(mx.ModelURI.parse(served.uri(scheme)), "test", peer) for scheme in ("odd", "inproc")]
            return [*peers, *candidates]

    plugin, target = Both(), new_model(fill=7)

    load(uri, plugin, target)

    assert_equal(state, target)
    assert [served.uri("odd")] == [event.uri for event in plugin.events if isinstance(event, LoadFailed)]


def test_a_transport_whose_sdk_is_missing_does_not_end_a_load(
    checkpoint: tuple[str, Mapping[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    """If a discovery found its worker: the checkpoint follows, with a warning. One that was asked for raises."""
    uri, state = checkpoint

    class Missing(Plugin):
        @mx.hookimpl
        def mx_register_transports(self) -> list[TransportProvider]:
            def opened(uri: mx.ModelURI, settings: Mapping[str, str]) -> Any:
                raise ModuleNotFoundError(name="pigeons")

            return [TransportProvider("mx-pigeon", ("pigeon",), opened, tier=Tier.FABRIC_PEER)]

    target = new_model(fill=7)
    peer = f"pigeon://127.0.0.1:1/{_IDENTITY.source_id}/w"

    report = load(uri, Missing(peer), target)

    assert uri == report.uri
    assert_equal(state, target)
    assert f"loading from {peer} failed: " in caplog.text
    assert "the package pigeons is missing" in caplog.text
    with pytest.raises(mx.PluginLoadError, match="the package pigeons is missing"):
        load(peer, Missing(), target)


def test_loads_from_peers_are_counted(
    source: nn.Module, served: ServingWorker, checkpoint: tuple[str, Mapping[str, torch.Tensor]]
) -> None:
    """By outcome and transport, with bytes and wrong digests."""

    def counted(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    def figures() -> list[float]:
        return [
            counted("mx_p2p_source_attempts_total", policy="load_aware", result="ok"),
            counted("mx_p2p_source_attempts_total", policy="load_aware", result="IntegrityError"),
            counted("mx_p2p_transfer_seconds_count", outcome="ok"),
            counted("mx_p2p_transfer_seconds_count", outcome="error"),
            counted("mx_p2p_read_bytes_total", transport="inproc"),
            counted("mx_p2p_digest_mismatches_total", transport="odd", peer=f"127.0.0.1:{served.port}"),
            *(counted("mx_p2p_phase_seconds_count", phase=phase) for phase in ("open", "read", "verify", "release")),
        ]

    before = figures()
    report = load(checkpoint[0], Plugin(served.uri("inproc")), new_model())
    load(checkpoint[0], Plugin(served.uri("odd"), session=Flips), new_model())

    ok, failed, ok_seconds, failed_seconds, read, mismatches, *phases = map(operator.sub, figures(), before)
    assert [2, 2, 2, 1] == phases  # the load that failed did not come to the end of its lease
    assert (1, 1, 1, 1, report.bytes_fetched) == (ok, failed, ok_seconds, failed_seconds, read)
    assert mismatches >= 2


def test_a_worker_that_has_not_digested_its_tensors_is_not_read(source: nn.Module) -> None:
    """It says so."""
    state = source.state_dict()
    with (
        serving_worker(state, ["inproc"], prepare=lambda _: None) as worker,
        pytest.raises(UnavailableError, match="not yet taken the digests"),
    ):
        mx.load_into(new_model(), worker.uri("inproc"))


def test_a_worker_over_a_transport_that_it_does_not_offer(source: nn.Module) -> None:
    """The message names those that it offers."""
    with (
        serving_worker(source.state_dict(), []) as worker,
        pytest.raises(NotFoundError, match="'inproc', but over none"),
    ):
        mx.load_into(new_model(), worker.uri("inproc"))


@pytest.mark.parametrize("path", ["", "/"])
def test_a_uri_that_names_no_source(path: str) -> None:
    """The message shows the form."""
    with pytest.raises(InvalidURIError, match="source id"):
        mx.load_into(new_model(), f"inproc://127.0.0.1:1{path}")


def test_a_destination_that_no_worker_can_fill_takes_the_next_place(caplog: pytest.LogCaptureFixture) -> None:
    """Elements that share memory in part have no bytes of their own; a copy of each element can write them."""
    shared = {"w": torch.zeros(9).as_strided((4, 4), (1, 1))}
    with serving_worker({"w": torch.zeros(4, 4)}, ["inproc"], source_id=_IDENTITY.source_id) as worker:
        for description in worker.offered._described:  # it says that it has the reader's layout
            description.stride[:] = [1, 1]
        destination = Destination()
        destination.run_time_tensors = lambda: shared  # type: ignore[method-assign]

        with pytest.raises(NotFoundError, match="memory://nowhere"):
            load("memory://nowhere/model", Plugin(worker.uri("inproc")), new_model(), destination)

    assert not destination.touched
    assert "share memory in part" in caplog.text


def test_tensors_with_gaps_and_without_elements() -> None:
    """Gaps keep what is in them; there is nothing to read of a tensor without elements."""
    there = {"wide": torch.arange(48.0).reshape(6, 8)[:, 2:5], "none": torch.empty(0, 3), "one": torch.tensor(3)}
    base = torch.full((6, 8), 7.0)
    here = {"wide": base[:, 2:5], "none": torch.empty(0, 3), "one": torch.tensor(0)}
    with serving_worker(there, ["inproc"]) as worker:
        report = mx.load_into(here, worker.uri("inproc"))

    assert all(torch.equal(there[name], here[name]) for name in there)
    assert (base[:, :2] == 7).all()
    assert (base[:, 5:] == 7).all()
    assert 6 * 3 * 4 + 8 == report.bytes_needed
