"""Loads from a peer in the same process: in place, over to a checkpoint, and what becomes of the destination."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import save
from torch import nn

import modelexpress_core as mx
from modelexpress_core import loader as loader_module
from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Peer, Tier
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.contracts.transport import Completion, TensorRead, TensorTable
from modelexpress_core.errors import BackendError, IntegrityError, NotFoundError, UnavailableError
from modelexpress_core.events import LoadFailed, LoadFinished, LoadStarted
from modelexpress_core.loads.destination import Destination
from modelexpress_core.loads.targets import DeferredTarget, Target
from modelexpress_core.placement.destinations import Destinations
from modelexpress_core.providers import DiscoveryProvider, TransportProvider
from modelexpress_core.storage.memory import store
from modelexpress_core.transport import inproc

_IDENTITY = SourceIdentity("acme/model")


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
    """A discovery that names ``uris``, a transport ``broken`` made of ``sessions``, and an observer of loads."""

    def __init__(self, *uris: str, session: Callable[[inproc.InprocServed, str], Any] = inproc.InprocSession) -> None:
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
            def connect(self, peer: Peer) -> Any:
                session = super().connect(peer)
                return plugin.session(session._served, str(self._uri))

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
def served(source: nn.Module) -> Iterator[inproc.InprocServed]:
    transport = inproc.InprocTransport(mx.ModelURI.parse("inproc://"))
    served = transport.serve(TensorTable(_IDENTITY.source_id, "w", source.state_dict()))
    yield served
    served.close()


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest) -> tuple[str, Mapping[str, torch.Tensor]]:
    """A checkpoint with other values than the peer's, so that it shows which of them was loaded."""
    state = {name: tensor.clone() for name, tensor in new_model().state_dict().items()}
    name = request.node.name.replace("[", "-").replace("]", "")
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
    source: nn.Module, served: inproc.InprocServed, checkpoint: tuple[str, Mapping[str, torch.Tensor]]
) -> None:
    """Its tensors, read once each, straight into place; the checkpoint is not opened."""
    plugin = Plugin(f"inproc://{served.endpoint}/{_IDENTITY.source_id}/w")
    target = new_model(fill=7)
    addresses = [tensor.data_ptr() for tensor in target.state_dict().values()]

    report = load(checkpoint[0], plugin, target)

    assert_equal(source.state_dict(), target)
    assert addresses == [tensor.data_ptr() for tensor in target.state_dict().values()]
    assert [LoadStarted, LoadFinished] == [type(event) for event in plugin.events]
    needed = sum(tensor.nbytes for name, tensor in source.state_dict().items() if name != "tied")
    assert (needed, needed, 5) == (report.bytes_needed, report.bytes_fetched, report.tensors)
    assert report.uri == f"inproc://{served.endpoint}/{_IDENTITY.source_id}/w"
    assert served.drain(0)  # the lease was given back


class Lost(inproc.InprocSession):
    """The worker is gone after the first tensor."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[Completion]:
        yield next(super().read(reads))
        reason = "the connection broke"
        raise UnavailableError(reason, uri=self._uri, peer_at_fault=True)


class Changed(inproc.InprocSession):
    """The worker takes its memory back while it is read."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[Completion]:
        yield from super().read(reads)
        self._served.drain(0)


class Short(inproc.InprocSession):
    """The transport ends without the last tensor."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[Completion]:
        yield from super().read(reads[:-1])


class Half(inproc.InprocSession):
    """The transport says that it moved half of each tensor."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[Completion]:
        for completion in super().read(reads):
            yield attrs.evolve(completion, bytes=completion.bytes // 2)


class Draining(inproc.InprocSession):
    """The worker grants no lease."""

    def lease(self) -> None:
        self._served.drain(0)
        super().lease()


_BROKEN = {Lost: UnavailableError, Changed: UnavailableError, Short: IntegrityError, Half: IntegrityError}


@pytest.mark.parametrize("session", [*_BROKEN, Draining], ids=lambda cls: cls.__name__)
def test_after_a_failing_peer_the_checkpoint_is_loaded(
    served: inproc.InprocServed,
    checkpoint: tuple[str, Mapping[str, torch.Tensor]],
    session: type[inproc.InprocSession],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The model then holds the checkpoint's values, and none of the peer's."""
    uri, state = checkpoint
    plugin = Plugin(f"odd://{served.endpoint}/{_IDENTITY.source_id}/w", session=session)
    target = new_model(fill=7)

    report = load(uri, plugin, target)

    assert_equal(state, target)
    assert (uri, 1) == (report.uri, report.files)
    assert isinstance(plugin.events[-1], LoadFinished)
    assert 1 == sum(isinstance(event, LoadFailed) for event in plugin.events)
    assert "odd://" in caplog.text


@pytest.mark.parametrize("session", [*_BROKEN, Draining], ids=lambda cls: cls.__name__)
def test_a_touched_destination_is_initialized_again_before_the_next_candidate(
    served: inproc.InprocServed,
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
            wanted = 7 if session is Draining else 9
            assert all((tensor == wanted).all() for tensor in target.state_dict().values())
            assert not self.touched
            super().check_checkpoint(checkpoint)

    tensors = Destinations(target, torch.device("cpu"))
    destination = Watched(tensors, strict=True, cast=False, renew=make_anew)
    load(uri, Plugin(f"odd://{served.endpoint}/{_IDENTITY.source_id}/w", session=session), target, destination)

    assert ([] if session is Draining else [True]) == renewed
    assert_equal(state, target)


@pytest.mark.parametrize("session", _BROKEN, ids=lambda cls: cls.__name__)
def test_a_touched_destination_that_cannot_be_initialized_again_ends_the_load(
    served: inproc.InprocServed,
    checkpoint: tuple[str, Mapping[str, torch.Tensor]],
    session: type[inproc.InprocSession],
) -> None:
    """The peer's error is raised; the checkpoint is not opened."""
    target = new_model(fill=7)
    plugin = Plugin(f"odd://{served.endpoint}/{_IDENTITY.source_id}/w", session=session)
    destination = Target(Destinations(target, torch.device("cpu")), strict=True, cast=False, renew=None)

    with pytest.raises(_BROKEN[session]):
        load(checkpoint[0], plugin, target, destination)

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
    served: inproc.InprocServed, path: str, change: Callable[[nn.Module], object] | None
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
            return [Candidate(mx.ModelURI.parse(f"inproc://{served.endpoint}/{path}"), "test", peer)]

    destination = Target(Destinations(target, torch.device("cpu")), strict=True, cast=False)
    with pytest.raises(NotFoundError):
        load("memory://nowhere/model", Naming(), target, destination)

    assert not destination.touched
    assert_equal(before, target)


def test_code_that_copies_deferred_tensors_cannot_read_from_a_peer(served: inproc.InprocServed) -> None:
    """It needs the tensors of a checkpoint; the peer is skipped before a byte moves."""
    plugin = Plugin()
    peer = Peer(_IDENTITY.source_id, "w")

    class Naming(Plugin):
        @mx.hookimpl
        def mx_rank_candidates(self, request: LoadRequest, candidates: Sequence[Candidate]) -> list[Candidate]:
            return [Candidate(mx.ModelURI.parse(f"inproc://{served.endpoint}/x/w"), "test", peer)]

    destination = DeferredTarget(None)
    with pytest.raises(BackendError, match="takes tensors of a checkpoint"):
        load("memory://nowhere/model", Naming(), new_model(), destination)

    assert not destination.touched
    assert [] == plugin.events


def test_a_worker_that_ends_its_offer_is_not_found(served: inproc.InprocServed, source: nn.Module) -> None:
    """Its URI is not found from then on."""
    uri = mx.ModelURI.parse(f"inproc://{served.endpoint}/{_IDENTITY.source_id}/w")
    served.close()

    with pytest.raises(NotFoundError, match="no worker in this process has that name"):
        inproc.InprocTransport(uri).connect(Peer(_IDENTITY.source_id, "w"))
