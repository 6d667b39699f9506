"""The story of a load: candidates, events, what happens when one fails."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

import modelexpress_core as mx
from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.events import LoadFailed, LoadFinished, LoadStarted
from modelexpress_core.fetch import concurrency
from modelexpress_core.loader import Loader
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from modelexpress_core.storage.memory import MemoryStorage, store

STATE = {
    "a": torch.arange(1000, dtype=torch.float32),
    "b": torch.randn(64, 32),
    "c": torch.tensor(5, dtype=torch.int64),
}


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """The URI of a checkpoint in memory that only this test uses."""
    name = request.node.name.replace("[", "-").replace("]", "")
    store(name).put("model/model.safetensors", save(STATE))
    return f"memory://{name}/model"


def manager(*plugins: object) -> mx.PluginManager:
    result = mx.PluginManager.discover({})
    for number, plugin in enumerate(plugins):
        result.register(plugin, name=f"test-{number}")
    return result


class Ranking:
    """A policy plugin that puts other places before (or in place of) the one that was asked for."""

    def __init__(self, *uris: str, keep: bool = True) -> None:
        self.uris = uris
        self.keep = keep

    @mx.hookimpl
    def mx_rank_candidates(self, request: LoadRequest, candidates: Sequence[Candidate]) -> list[Candidate]:
        assert [candidate.uri for candidate in candidates] == [request.uri]
        others = [Candidate(mx.ModelURI.parse(uri), "ranking") for uri in self.uris]
        return [*others, *candidates] if self.keep else others


class Events:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    @mx.hookimpl
    def mx_load_started(self, event: LoadStarted) -> None:
        self.seen.append(event)

    @mx.hookimpl
    def mx_load_finished(self, event: LoadFinished) -> None:
        self.seen.append(event)

    @mx.hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self.seen.append(event)


def assert_state(actual: Mapping[str, torch.Tensor]) -> None:
    assert sorted(STATE) == sorted(actual)
    for name, tensor in STATE.items():
        assert tensor.dtype == actual[name].dtype
        assert torch.equal(tensor, actual[name]), name


# -- candidates -----------------------------------------------------------------------------------------------------


def test_the_next_candidate_is_tried_and_the_log_says_why(model: str, caplog: pytest.LogCaptureFixture) -> None:
    """A place that has nothing gives way; one line names it and the reason."""
    events = Events()

    with caplog.at_level(logging.WARNING):
        state = mx.load_state_dict(model, environ={}, plugins=manager(Ranking("memory://empty/model"), events))

    assert_state(state)
    assert [type(event) for event in events.seen] == [LoadFailed, LoadStarted, LoadFinished]
    assert "memory://empty/model" in caplog.text


def test_the_last_candidates_error_is_raised() -> None:
    """Where no place has the model, the error is that of the one that was tried last."""
    plugins = manager(Ranking("memory://empty/one"))

    for load in (mx.load_state_dict, mx.open_checkpoint):
        with pytest.raises(mx.NotFoundError, match="memory://empty/two"):
            load("memory://empty/two", environ={}, plugins=plugins)


def test_a_candidate_that_fails_half_way_is_made_good_by_the_next(model: str) -> None:
    """What the first place wrote is overwritten, wholly, by the second."""
    name = model.split("/")[2]
    store(name).put("bad/model.safetensors", save({key: torch.zeros_like(value) for key, value in STATE.items()}))

    class Replacing:
        @mx.hookimpl
        def mx_load_started(self, event: LoadStarted) -> None:
            if event.uri.endswith("bad"):
                store(name).put("bad/model.safetensors", save(STATE)[:-1] + b"x")

    target = {key: torch.full_like(value, 7) for key, value in STATE.items()}

    report = mx.load_into(target, model, environ={}, plugins=manager(Ranking(f"memory://{name}/bad"), Replacing()))

    assert_state(target)
    assert report.uri == model


def test_deferred_weights_open_the_next_candidate(model: str) -> None:
    """Before anything was recorded, the next place can still be taken."""
    target = {key: torch.empty_like(value) for key, value in STATE.items()}

    with mx.deferred_weights(model, model=target, environ={}, plugins=manager(Ranking("memory://empty/x"))) as weights:
        for name, tensor in weights:
            target[name].copy_(tensor)

    assert_state(target)


def test_a_ranking_that_leaves_nothing_is_an_error(model: str) -> None:
    """It is the plugin that dropped them, and the message says how to go on without it."""
    with pytest.raises(mx.ResolveError, match="MX_DISABLED_PLUGINS"):
        mx.load_state_dict(model, environ={}, plugins=manager(Ranking(keep=False)))


def test_a_uri_can_be_rewritten(model: str) -> None:
    """A plugin may give names of its own to places; the report names the place."""

    class Alias:
        @mx.hookimpl
        def mx_rewrite_uri(self, uri: mx.ModelURI) -> mx.ModelURI | None:
            return mx.ModelURI.parse(model) if uri.scheme == "models" else None

    checkpoint = mx.open_checkpoint("models://current", environ={}, plugins=manager(Alias()))

    assert str(checkpoint.uri) == model


# -- failures -------------------------------------------------------------------------------------------------------


def test_an_observer_that_fails_does_not_break_a_load(model: str) -> None:
    """Whoever only watches has no say."""

    class Broken:
        @mx.hookimpl
        def mx_load_started(self, event: LoadStarted) -> None:
            raise RuntimeError(event.uri)

    assert_state(mx.load_state_dict(model, environ={}, plugins=manager(Broken())))


def test_an_error_in_the_block_ends_the_load_and_is_raised_as_it_is(model: str) -> None:
    """The very exception comes out, and observers hear of it."""
    events = Events()
    error = KeyboardInterrupt("from the block")

    with (
        pytest.raises(KeyboardInterrupt) as caught,
        mx.deferred_weights(model, environ={}, plugins=manager(events)) as weights,
    ):
        for _name, tensor in weights:
            torch.empty_like(tensor).copy_(tensor)
        raise error

    assert caught.value is error
    assert isinstance(events.seen[-1], LoadFailed)
    assert events.seen[-1].error is error
    assert weights.report is None


def test_nothing_is_written_after_a_load_has_failed(tmp_path: Path) -> None:
    """When the error reaches the caller, the destination is the caller's again."""
    save_file({f"t{number}": torch.ones(20_000) for number in range(50)}, tmp_path / "model.safetensors")
    inside, release = threading.Event(), threading.Event()

    class Slow(MemoryStorage):
        def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
            if len(buffer) == 80_000:  # a tensor, not a header
                inside.set()
                release.wait(30)
            return super().read_into(path, offset, buffer, version=version)

        def close(self) -> None:
            release.set()

    slow = Slow()
    slow.put("model.safetensors", (tmp_path / "model.safetensors").read_bytes())

    class Plugin:
        @mx.hookimpl
        def mx_register_storages(self) -> list[StorageProvider]:
            return [StorageProvider("slow", ("slow",), lambda uri, settings: slow)]

    others = set(threading.enumerate())
    target = {f"t{number}": torch.zeros(20_000) for number in range(50)}
    with (
        pytest.raises(RuntimeError, match="enough"),
        mx.deferred_weights("slow://x", environ={"MX_CHUNK_BYTES": "80000"}, plugins=manager(Plugin())) as weights,
    ):
        for name, tensor in weights:
            target[name].copy_(tensor)
        weights._load.recorder._pending.submit()  # type: ignore[union-attr]  # what a full batch does
        assert inside.wait(30)
        raise RuntimeError("enough")
    before = {name: tensor.clone() for name, tensor in target.items()}

    release.set()
    assert set(threading.enumerate()) <= others
    assert all(torch.equal(before[name], tensor) for name, tensor in target.items())
    assert any(not tensor.all() for tensor in target.values())


def test_a_shape_that_differs_is_refused_before_a_byte_moves(model: str) -> None:
    """Both shapes are named, and nothing is touched."""
    target = {key: torch.full_like(value, 7) for key, value in STATE.items()}
    target["b"] = torch.full((32, 64), 7.0)

    with pytest.raises(mx.PlacementError, match=r"b is \[64, 32\].*\[32, 64\]"):
        mx.load_into(target, model, environ={})

    assert all((tensor == 7).all() for tensor in target.values())


def test_a_dtype_that_differs_is_refused_unless_a_cast_is_asked_for(model: str) -> None:
    """Silent conversion is nobody's surprise here."""
    target = {key: torch.empty(value.shape, dtype=torch.float64) for key, value in STATE.items()}

    with pytest.raises(mx.PlacementError, match="cast=True"):
        mx.load_into(target, model, environ={})
    mx.load_into(target, model, environ={}, cast=True)

    assert all(torch.equal(STATE[name].double(), tensor) for name, tensor in target.items())


def test_missing_and_unexpected_tensors_are_named(model: str) -> None:
    """Both lists are on the error; strict=False allows the one, nothing allows the other."""
    target = {"a": torch.empty(1000), "z": torch.empty(3)}

    with pytest.raises(mx.IncompleteLoadError, match="z") as caught:
        mx.load_into(target, model, environ={}, strict=False)
    with pytest.raises(mx.IncompleteLoadError, match="strict=False"):
        mx.load_into({"a": torch.empty(1000)}, model, environ={})
    mx.load_into({"a": target["a"]}, model, environ={}, strict=False)

    assert caught.value.missing == ("z",)
    assert set(caught.value.unexpected) == {"b", "c"}
    assert torch.equal(STATE["a"], target["a"])


def test_names_choose_tensors(model: str) -> None:
    """Only what was asked for is read; a wrong name is an error that names it."""
    state = mx.load_state_dict(model, names=["b"], environ={})

    assert list(state) == ["b"]
    assert torch.equal(STATE["b"], state["b"])
    with pytest.raises(mx.PlacementError, match="'nosuch'"):
        mx.load_state_dict(model, names=["nosuch"], environ={})


def test_a_module_on_the_meta_device_gets_memory(tmp_path: Path) -> None:
    """Built without memory, loaded into memory of its own, with ties kept."""
    reference = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    mx.load_into(model, tmp_path, environ={})

    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert isinstance(model[0].weight, nn.Parameter)


def test_concurrent_loads_do_not_disturb_each_other(model: str) -> None:
    """Several threads, one plugin manager."""
    plugins = manager()
    results: list[dict[str, torch.Tensor]] = []

    def load() -> None:
        results.append(mx.load_state_dict(model, environ={}, plugins=plugins))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(results) == 8
    for state in results:
        assert_state(state)


def test_a_path_object_is_a_place(tmp_path: Path) -> None:
    """os.PathLike works as a plain path does, odd characters and all."""
    directory = tmp_path / "odd # name?%20"
    directory.mkdir()
    save_file(STATE, directory / "model.safetensors")

    assert_state(mx.load_state_dict(directory, environ={}))
    assert_state(mx.load_state_dict(os.fspath(directory), environ={}))


def test_deferred_weights_serve_one_block(model: str) -> None:
    """They cannot be iterated outside it, nor entered twice."""
    weights = mx.deferred_weights(model, environ={})
    with pytest.raises(mx.PlacementError, match="with block"):
        list(weights)
    with weights:
        {name: tensor.clone() for name, tensor in weights}

    with pytest.raises(mx.PlacementError, match="again"), weights:
        pass


def test_destinations_that_share_a_part_of_their_memory_are_refused(model: str) -> None:
    """One would undo the other, in silence; tensors tied as a whole are another matter."""
    memory = torch.zeros(1500)

    with pytest.raises(mx.PlacementError, match="share a part"):
        mx.load_into(
            {"a": memory[:1000], "c": memory[998:1000].view(torch.int64).squeeze()}, model, environ={}, strict=False
        )
    with pytest.raises(mx.PlacementError, match="expand"):
        mx.load_into(
            {"a": torch.zeros(1).expand(1000), "b": torch.zeros(64, 32), "c": torch.tensor(0)}, model, environ={}
        )


@pytest.mark.parametrize("target", [5, {"a": [1.0]}, [torch.zeros(3)]])
def test_what_is_no_destination_is_refused(target: Any, model: str) -> None:
    """The message says what can be loaded into."""
    with pytest.raises(mx.PlacementError, match=r"torch\.nn\.Module"):
        mx.load_into(target, model, environ={})


def test_a_storage_that_lets_its_sdks_errors_through_is_named() -> None:
    """Whose fault it is, and what came, instead of a bare traceback."""

    class Careless(MemoryStorage):
        def list(self, prefix: str) -> Any:
            raise ConnectionRefusedError(111, "Connection refused")

    class Plugin:
        @mx.hookimpl
        def mx_register_storages(self) -> list[StorageProvider]:
            return [StorageProvider("careless", ("careless",), lambda uri, settings: Careless())]

    with pytest.raises(mx.BackendError, match="did not translate ConnectionRefusedError") as caught:
        mx.load_state_dict("careless://x/y", environ={}, plugins=manager(Plugin()))

    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


def test_variables_that_choose_plugins_count_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the process has loaded before: plugins are found once, but anew for other values."""
    monkeypatch.delenv("MX_DISABLED_PLUGINS", raising=False)
    first = Loader(None, None).plugins
    assert first is Loader(None, None).plugins

    monkeypatch.setenv("MX_DISABLED_PLUGINS", "mx-s3")
    with pytest.raises(mx.UnknownSchemeError, match="disabled"):
        mx.open_checkpoint("s3://bucket/model")

    monkeypatch.delenv("MX_DISABLED_PLUGINS")
    assert first is Loader(None, None).plugins


class Far(MemoryStorage):
    """A storage whose answers to the first read, that of the header, take ``latency_seconds``."""

    def __init__(self, authority: str, latency_seconds: float) -> None:
        super().__init__(authority)
        self._latency_seconds = latency_seconds
        self._lock = threading.Lock()
        self._reading = 0
        self.most_reading = 0
        self.crowded = threading.Event()

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        if offset == 0:
            time.sleep(self._latency_seconds)
            return super().read_into(path, offset, buffer, version=version)
        with self._lock:
            self._reading += 1
            self.most_reading = max(self.most_reading, self._reading)
            if self._reading == 8:
                self.crowded.set()
        self.crowded.wait(0.3)
        with self._lock:
            self._reading -= 1
        return super().read_into(path, offset, buffer, version=version)


@pytest.mark.parametrize(("latency_seconds", "most_reading"), [(0.0, 4), (0.03, 8)])
def test_a_load_begins_with_as_many_reads_as_the_latency_asks_for(
    latency_seconds: float, most_reading: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long the headers took decides; on one CPU, four reads are enough for a storage that is near."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(concurrency, "_NEAR_SECONDS", 5.0 if not latency_seconds else 0.01)  # this machine may be slow
    state = {f"{number:02}": torch.full((1 << 18,), number, dtype=torch.uint8) for number in range(8)}
    storage = Far(f"far-{most_reading}", latency_seconds)
    storage.put("model.safetensors", save(state))
    capabilities = StorageCapabilities(concurrency=8, most_concurrency=8, request_cost_bytes=0)

    class Plugin:
        @mx.hookimpl
        def mx_register_storages(self) -> list[StorageProvider]:
            return [StorageProvider("far", ("far",), lambda *_: storage, capabilities=capabilities)]

    loaded = mx.load_state_dict("far://anywhere", environ={"MX_CHUNK_BYTES": str(1 << 18)}, plugins=manager(Plugin()))

    assert most_reading == storage.most_reading
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


class Counting(MemoryStorage):
    """Counts lists of files, and reads of headers."""

    def __init__(self) -> None:
        super().__init__("counting")
        self.lists = self.headers = 0

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        self.lists += 1
        return super().list(prefix)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        self.headers += offset == 0
        return super().read_into(path, offset, buffer, version=version)


@pytest.mark.parametrize(("stat_digests", "reads"), [(False, 1), (True, 2)])
def test_headers_that_told_the_content_version_are_not_read_again(stat_digests: bool, reads: int) -> None:
    """Unless a load has to ask for the digest of each file, which a load from a worker does not need."""
    storage = Counting()
    storage.put("model.safetensors", save(STATE))
    capabilities = StorageCapabilities(global_versions=True, stat_digests=stat_digests)

    class Plugin:
        @mx.hookimpl
        def mx_register_storages(self) -> list[StorageProvider]:
            return [StorageProvider("counting", ("counting",), lambda *_: storage, capabilities=capabilities)]

    tensors = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    identity = mx.own_identity("acme/model", tensors)
    report = mx.load_into(tensors, "counting://models", identity=identity, environ={}, plugins=manager(Plugin()))

    assert (reads, reads) == (storage.lists, storage.headers)
    assert report.content_version
    assert all(torch.equal(tensors[name], tensor) for name, tensor in STATE.items())
