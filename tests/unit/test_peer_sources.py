"""Which workers a load reads from at once, and what it reports."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import save

import modelexpress_core as mx
from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Tier
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.contracts.transport import PeerAccess, TensorRead
from modelexpress_core.errors import UnavailableError
from modelexpress_core.events import LoadFailed, LoadProgress
from modelexpress_core.loader import Loader
from modelexpress_core.loads.targets import Target
from modelexpress_core.placement.destinations import Destinations
from modelexpress_core.providers import DiscoveryProvider, TransportProvider
from modelexpress_core.storage.memory import store
from modelexpress_core.transport import inproc
from tests.support.peers import ServingWorker, serving_worker

_IDENTITY = SourceIdentity("acme/model", extra_parameters={"content_version": "1"})
_TENSORS = 60
_BYTES = 32 << 10


def tensors(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"w{number:02}": torch.randint(0, 256, (_BYTES,), dtype=torch.uint8, generator=generator)
        for number in range(_TENSORS)
    }


class Plugin:
    """A discovery that names ``uris``, and a transport ``odd``.

    No session gives a range before ``together`` of them are asked for some. Workers in ``lost_after`` fail after so
    many ranges, and the others give nothing before that.
    """

    def __init__(self, *uris: str, together: int = 1) -> None:
        self.uris = uris
        self.connected: list[str] = []
        self.ranges: dict[str, list[str]] = {}
        self.events: list[Any] = []
        self.lost_after: Mapping[str, int] = {}
        self._asked = threading.Condition()
        self._together = together

    @mx.hookimpl
    def mx_register_discoveries(self) -> list[DiscoveryProvider]:
        plugin = self

        class Discovery:
            def candidates(self, request: LoadRequest) -> list[Candidate]:
                return [Candidate(mx.ModelURI.parse(uri), "test") for uri in plugin.uris]

            def close(self) -> None:
                pass

        return [DiscoveryProvider("test", ("test",), lambda uri, settings: Discovery())]

    @mx.hookimpl
    def mx_register_transports(self) -> list[TransportProvider]:
        plugin = self

        class Session(inproc.InprocSession):
            def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
                worker = self._served.table.worker_id
                plugin.wait_for_others(worker)
                for position in super().read(reads):
                    if not plugin.gives(worker, reads[position].name):
                        reads[position].destination.zero_()
                        reason = "the connection broke"
                        raise UnavailableError(reason, uri=self._uri, peer_at_fault=True)
                    yield position

        class Transport(inproc.InprocTransport):
            def connect(self, access: PeerAccess) -> inproc.InprocSession:
                session = super().connect(access)
                plugin.connected.append(access.peer.worker_id)
                return Session(session._served, access.lease_id, str(self._uri))

        return [TransportProvider("odd", ("odd",), lambda uri, settings: Transport(uri), tier=Tier.PEER)]

    def wait_for_others(self, worker: str) -> None:
        with self._asked:
            self.ranges.setdefault(worker, [])
            self._asked.notify_all()
            assert self._asked.wait_for(lambda: len(self.ranges) >= self._together, 60)
            if worker not in self.lost_after:
                assert self._asked.wait_for(self._are_lost, 60)

    def _are_lost(self) -> bool:
        return all(len(self.ranges.get(worker, "many")) >= most for worker, most in self.lost_after.items())

    def gives(self, worker: str, name: str) -> bool:
        with self._asked:
            if len(self.ranges[worker]) >= self.lost_after.get(worker, 1 << 30):
                return False
            self.ranges[worker].append(name)
            self._asked.notify_all()
            return True

    @mx.hookimpl
    def mx_rank_candidates(self, request: LoadRequest, candidates: Sequence[Candidate]) -> list[Candidate]:
        return list(candidates)

    @mx.hookimpl
    def mx_load_progress(self, event: LoadProgress) -> None:
        self.events.append(event)

    @mx.hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self.events.append(event)


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, ServingWorker]]:
    """Five workers with the same tensors, one with others, and one with another layout."""
    plugins = mx.PluginManager.discover({})
    plugins.register(Plugin(), name="mx-test")
    held = {name: tensors() for name in "abcde"}
    held["other bytes"] = tensors(seed=2)
    held["other layout"] = {"w00": torch.zeros(1)}
    with contextlib.ExitStack() as serving:
        yield {
            name: serving.enter_context(
                serving_worker(
                    state,
                    ["inproc", "odd"],
                    source_id=_IDENTITY.source_id,
                    worker_id=name.replace(" ", "-"),
                    plugins=plugins,
                )
            )
            for name, state in held.items()
        }


def load(plugin: Plugin, *, renew: bool = False, uri: str = "memory://nowhere/model", **environ: str) -> mx.LoadReport:
    """Load, and compare every byte; without ``renew`` a second load would fail."""
    plugins = mx.PluginManager.discover({})
    plugins.register(plugin, name="mx-test")
    loader = Loader({"MX_DISCOVERY": "test://", **environ}, plugins)
    target = {name: torch.full_like(tensor, 0x5A) for name, tensor in tensors().items()}
    options: dict[str, Any] = {} if renew else {"renew": None}
    destination = Target(Destinations(target, torch.device("cpu")), strict=True, cast=False, **options)
    report = loader.load(loader.request(uri, identity=_IDENTITY), destination)
    assert [] == [name for name, tensor in tensors().items() if not torch.equal(tensor, target[name])]
    return report


def test_a_load_reads_from_four_workers_by_default(workers: dict[str, ServingWorker]) -> None:
    """The best four; the report says who delivered what, and progress how many deliver."""
    uris = [workers[name].uri("odd") for name in "abcde"]
    plugin = Plugin(*uris, together=4)

    report = load(plugin)

    assert set(uris[:4]) == {source.uri for source in report.sources}
    assert {"a", "b", "c", "d"} == set(plugin.connected)
    assert _TENSORS * _BYTES == report.bytes_needed == sum(source.bytes for source in report.sources)
    assert all(source.bytes == len(plugin.ranges[source.uri[-1]]) * _BYTES for source in report.sources)
    assert report.uri == max(report.sources, key=lambda source: source.bytes).uri
    assert "and 3 more" in str(report)
    assert 4 == len(report.to_dict()["sources"])
    assert 4 == max(event.sources for event in plugin.events) == sum(source.bytes > 0 for source in report.sources)
    assert 0 == sum(worker.leases.out() for worker in workers.values())


@pytest.mark.parametrize("most", [1, 2])
def test_the_user_sets_how_many_workers_are_read(workers: dict[str, ServingWorker], most: int) -> None:
    """With one, there is no second connection."""
    plugin = Plugin(*(workers[name].uri("odd") for name in "abc"), together=most)

    report = load(plugin, MX_P2P_SOURCES=str(most))

    assert most == len(plugin.connected) == len(report.sources)


def test_a_worker_is_read_over_one_transport(workers: dict[str, ServingWorker]) -> None:
    """Over the best of them."""
    plugin = Plugin(workers["a"].uri("odd"), workers["a"].uri("inproc"), workers["b"].uri("odd"), together=2)

    report = load(plugin)

    assert [workers["a"].uri("odd"), workers["b"].uri("odd")] == [source.uri for source in report.sources]


def test_workers_below_a_checkpoint_are_not_read_before_it(workers: dict[str, ServingWorker]) -> None:
    """The order of the ranking stands."""
    plugin = Plugin(workers["a"].uri("odd"), "memory://nowhere/model", workers["b"].uri("odd"))

    load(plugin)

    assert ["a"] == plugin.connected


@pytest.mark.parametrize("name", ["other bytes", "other layout", "nobody"])
def test_a_worker_that_does_not_fit_is_left_out(
    workers: dict[str, ServingWorker], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With one line in the log; the next one joins in its place."""
    caplog.set_level("INFO", "modelexpress_core")
    strange = workers[name].uri("odd") if name in workers else f"odd://127.0.0.1:1/{_IDENTITY.source_id}/nobody"
    plugin = Plugin(workers["a"].uri("odd"), strange, workers["b"].uri("odd"), together=2)

    report = load(plugin, MX_P2P_SOURCES="2")

    assert ["a", "b"] == [source.uri[-1] for source in report.sources]
    assert 1 == sum(f"{strange} is not read" in each.getMessage() for each in caplog.records)


@pytest.mark.parametrize("most", [1, 2])
def test_the_load_goes_on_after_a_worker_is_lost(
    workers: dict[str, ServingWorker], most: int, caplog: pytest.LogCaptureFixture
) -> None:
    """From another one, which joins then if it was not read before; what was verified is not read again."""
    plugin = Plugin(workers["a"].uri("odd"), workers["a"].uri("inproc"), workers["b"].uri("odd"), together=most)
    plugin.lost_after = {"a": 4}

    report = load(plugin, MX_P2P_SOURCES=str(most))

    lost, other = report.sources
    assert ("UnavailableError", "") == (lost.error, other.error)
    assert (4 * _BYTES, (_TENSORS - 4) * _BYTES) == (lost.bytes, other.bytes)
    assert not set(plugin.ranges["a"]) & set(plugin.ranges["b"])
    assert ["a", "b"] == sorted(plugin.connected)
    assert 1 == sum("goes on without" in each.getMessage() for each in caplog.records)
    assert [] == [event for event in plugin.events if isinstance(event, LoadFailed)]


def test_after_all_workers_the_checkpoint_is_read(
    workers: dict[str, ServingWorker], request: pytest.FixtureRequest
) -> None:
    """None of them is tried twice; one load has failed."""
    store(request.node.name).put("model/model.safetensors", save(tensors()))
    plugin = Plugin(*(workers[name].uri("odd") for name in "abc"))
    plugin.lost_after = {"a": 1, "b": 2, "c": 3}

    report = load(plugin, renew=True, uri=f"memory://{request.node.name}/model", MX_P2P_SOURCES="2")

    assert (f"memory://{request.node.name}/model", ()) == (report.uri, report.sources)
    assert ["a", "b", "c"] == sorted(plugin.connected)
    assert 1 == sum(isinstance(event, LoadFailed) for event in plugin.events)


def test_a_worker_with_other_bytes_is_read_alone(workers: dict[str, ServingWorker]) -> None:
    """By the next load, once the first workers are lost; it then needs a destination that can be written again."""
    plugin = Plugin(workers["other bytes"].uri("odd"), workers["a"].uri("odd"))
    plugin.lost_after = {"other-bytes": 3}

    report = load(plugin, renew=True)

    assert [workers["a"].uri("odd")] == [source.uri for source in report.sources]
    assert 1 == sum(isinstance(event, LoadFailed) for event in plugin.events)
    assert _TENSORS == len(plugin.ranges["a"])
