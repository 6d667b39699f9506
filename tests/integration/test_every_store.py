"""One checkpoint in every store: the same bytes by each way of loading, through faults, and while it is replaced.

Each way of loading is compared with the safetensors library, by the SHA-256 of each tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from attrs import field, frozen
from safetensors.torch import load_file

import modelexpress_core as mx
from devtools.azurite import Azurite
from devtools.fake_gcs import FakeGcs
from devtools.fake_hub import FakeHub
from devtools.missing import ToolMissingError
from devtools.models import generate_sharded, real_checkpoint
from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.events import LoadFailed, LoadFinished, LoadStarted
from modelexpress_core.storage.memory import store as memory

# One worker starts the servers. They are started by the fixture `store`, where pytest does not see their names.
pytestmark = [pytest.mark.server, pytest.mark.xdist_group("every store")]

_LONG_RANGE_BYTES = 1_000_000


@frozen
class Store:
    """Where the checkpoint is, and what a load of it needs.

    Attributes:
        uri: Directory of the checkpoint.
        plugin: The plugin that reads it.
        variables: What a load needs in the environment of the process, and as its settings.
        digests: Whether the store publishes a digest of each file.
        port: Port of the server.
        through: Variables that lead to a proxy at the given port.
        upload: Stores a directory below a name; returns its URI.
        put: Replaces an object; its name begins below the bucket.
    """

    uri: str
    plugin: str
    variables: Mapping[str, str] = field(factory=dict)
    digests: bool = False
    port: int = 0
    through: Callable[[int], dict[str, str]] = lambda _: {}
    upload: Callable[[Path, str], str] = lambda *_: ""
    put: Callable[[str, bytes], object] = lambda *_: None


def _in_s3(server: SeaweedFS, directory: Path) -> Store:
    def upload(directory: Path, name: str) -> str:
        return server.upload(directory, "models", name, checksum="CRC64NVME")

    def put(name: str, content: bytes) -> None:
        with contextlib.closing(server.client()) as client:
            client.put_object(Bucket="models", Key=name, Body=content)

    return Store(
        upload(directory, "every-store"),
        "mx-s3",
        server.environ(),
        digests=True,
        port=int(server.endpoint.rpartition(":")[2]),
        through=lambda port: {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"},
        upload=upload,
        put=put,
    )


def _in_gcs(server: FakeGcs, directory: Path) -> Store:
    return Store(
        server.upload(directory, "models", "every-store"),
        "mx-gcs",
        server.environ(),
        digests=True,
        port=server.port,
        through=lambda port: {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"},
        upload=lambda directory, name: server.upload(directory, "models", name),
        put=server.put,
    )


def _in_azure(server: Azurite, directory: Path) -> Store:
    def put(name: str, content: bytes) -> None:
        with server.client() as client:
            client.get_blob_client("models", name).upload_blob(content, overwrite=True)

    return Store(
        server.upload(directory, "models", "every-store"),
        "mx-azure",
        server.environ(),
        digests=True,
        port=server.port,
        through=lambda port: {"AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{server.account}"},
        upload=lambda directory, name: server.upload(directory, "models", name),
        put=put,
    )


def _in_hub(server: FakeHub, directory: Path) -> Store:
    def put(name: str, content: bytes) -> None:
        repository, _, path = name.partition("/")
        server.put(f"org/{repository}", path, content)

    return Store(
        server.upload(directory, "org/every-store"),
        "mx-hf",
        server.environ(),
        digests=True,
        port=server.port,
        through=lambda port: {"HF_ENDPOINT": f"http://127.0.0.1:{port}"},
        upload=lambda directory, name: server.upload(directory, f"org/{name}"),
        put=put,
    )


def _in_memory(directory: Path) -> Store:
    for path in directory.iterdir():
        memory("every-store").put(f"model/{path.name}", path.read_bytes())
    return Store("memory://every-store/model", "modelexpress-core")


def _with_engine(store: Store) -> Store:
    """``store``, read by the engine of runai-model-streamer."""
    for part in ("s3", "gcs"):
        if find_spec(f"runai_model_streamer_{part}") is None:
            raise ToolMissingError(f"runai-model-streamer-{part}: its wheels need Linux with glibc 2.30")
    variables = {
        **store.variables,
        "MX_PREFER": f"{store.uri.partition(':')[0]}=mx-streamer",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": store.variables.get("STORAGE_EMULATOR_HOST", ""),
    }
    return Store(store.uri, "mx-streamer", variables, digests=store.digests)


#: Store -> the fixture of its server, and what puts a directory into it.
_SERVERS: Mapping[str, tuple[str, Callable[[Any, Path], Store]]] = {
    "s3": ("s3_server", _in_s3),
    "gcs": ("gcs_server", _in_gcs),
    "azure": ("azurite", _in_azure),
    "hub": ("hub", _in_hub),
}

_REMOTE = tuple(_SERVERS)

#: A load from the Hub stays with its commit, whatever is replaced; tests of mx-hf do that.
_REPLACING = ("s3", "gcs", "azure")
_LOCAL = ("path", "file")
_WITH_ENGINE = ("file with mx-streamer", "s3 with mx-streamer")

#: Objects in memory belong to one process: commands, which have their own, do not see them.
_ALL = ("memory", *_LOCAL, *_REMOTE, *_WITH_ENGINE)

#: The engine reads one kind of object store in a process. It reaches Azure by https only: tests of mx-streamer do that.
_FOR_COMMANDS = (*_ALL[1:], "gcs with mx-streamer")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files with an index, several dtypes, 15 MB."""
    return generate_sharded(tmp_path_factory.mktemp("model") / "checkpoint", shards=3, layers=2, hidden=512)


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    """Without a CDN of its own, so that whatever leads to the Hub leads to the bytes."""
    with FakeHub(own_cdn=False) as server:
        yield server


@pytest.fixture(scope="module")
def stored(checkpoint: Path, request: pytest.FixtureRequest) -> Callable[[str], Store]:
    """The store of a name. Its server is started, and the checkpoint uploaded, at first use."""
    stores: dict[str, Store] = {}

    def make(name: str) -> Store:
        where, _, engine = name.partition(" with ")
        if engine:
            return _with_engine(stored(where))
        if where in _SERVERS:
            fixture, store_in = _SERVERS[where]
            return store_in(request.getfixturevalue(fixture), checkpoint)
        if where == "memory":
            return _in_memory(checkpoint)
        return Store(checkpoint.as_uri() if where == "file" else str(checkpoint), "modelexpress-core")

    def stored(name: str) -> Store:
        if name not in stores:
            stores[name] = make(name)
        return stores[name]

    return stored


@pytest.fixture
def store(request: pytest.FixtureRequest, stored: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of the test's parameter, with its variables in the environment of the process."""
    found = stored(request.param)
    for name, value in found.variables.items():
        monkeypatch.setenv(name, value)
    return found


def environ(changed: Mapping[str, str] | None = None) -> dict[str, str]:
    """The settings of a load. Without them, a load would use the plugins that an earlier one found."""
    return {**os.environ, **(changed or {})}


def every(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("store", names, indirect=True)


def digest(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, str]:
    """Dtype, shape and SHA-256 of the bytes of ``tensor``."""
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tensor.shape, hashlib.sha256(content).hexdigest()


def digests(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, str]]:
    return {name: digest(tensor) for name, tensor in state.items()}


def read_by_safetensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Mapping[str, tuple[torch.dtype, torch.Size, str]]:
    return digests(read_by_safetensors(checkpoint))


@pytest.fixture
def empty(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Tensors to load into."""
    return {name: torch.zeros_like(tensor) for name, tensor in read_by_safetensors(checkpoint).items()}


# -- the same bytes ----------------------------------------------------------------------------------------------------


@every(*_ALL)
def test_a_state_dict_has_the_bytes_that_safetensors_reads(store: Store, expected: Any) -> None:
    """Names, dtypes, shapes and the SHA-256 of every tensor."""
    assert expected == digests(mx.load_state_dict(store.uri, environ=environ()))


@every(*_ALL)
def test_tensors_are_filled_in_place(store: Store, expected: Any, empty: dict[str, torch.Tensor]) -> None:
    """The memory is the caller's, each byte is read once, and what the store publishes of each file is verified."""
    addresses = {name: tensor.data_ptr() for name, tensor in empty.items()}

    report = mx.load_into(empty, store.uri, environ=environ())

    assert expected == digests(empty)
    assert addresses == {name: tensor.data_ptr() for name, tensor in empty.items()}
    assert store.plugin == report.storage["plugin"]
    assert {"versions": 3, "sizes": 3, "digests": 3 if store.digests else 0} == report.verified
    assert report.bytes_needed == report.bytes_fetched == sum(tensor.nbytes for tensor in empty.values())


@every(*_REMOTE)
def test_a_real_checkpoint_has_the_bytes_that_safetensors_reads(store: Store) -> None:
    """Every tensor of all-MiniLM-L6-v2, 91 MB in one file."""
    directory = real_checkpoint()

    state = mx.load_state_dict(store.upload(directory, "minilm"), environ=environ())

    assert digests(read_by_safetensors(directory)) == digests(state)


@every(*_ALL)
def test_one_shard_and_the_index_can_be_named(store: Store, expected: Any) -> None:
    """A URI may name one file, or the index."""
    one = digests(mx.load_state_dict(f"{store.uri}/model-00002-of-00003.safetensors", environ=environ()))
    whole = digests(mx.load_state_dict(f"{store.uri}/model.safetensors.index.json", environ=environ()))

    assert 0 < len(one) < len(expected)
    assert one.items() <= expected.items()
    assert expected == whole


@every(*_FOR_COMMANDS)
def test_the_command_loads_the_same_bytes(store: Store, mx: Callable[..., Any], expected: Any, tmp_path: Path) -> None:
    """``mx load`` writes the SHA-256 of every tensor, and reports what was verified."""
    done = mx("load", store.uri, "--json", "--digests", str(tmp_path / "digests.json"))

    assert (0, "") == (done.returncode, done.stderr)
    report = json.loads(done.stdout)
    assert store.plugin == report["storage"]["plugin"]
    assert {"versions": 3, "sizes": 3, "digests": 3 if store.digests else 0} == report["verified"]
    assert {name: found[2] for name, found in expected.items()} == json.loads((tmp_path / "digests.json").read_text())


@every(*_FOR_COMMANDS)
def test_the_command_copies_the_same_files(
    store: Store, mx: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    """``mx pull`` writes files with the same names and SHA-256."""
    done = mx("pull", store.uri, str(tmp_path / "copy"))

    assert 0 == done.returncode, done.stderr
    files, copies = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}
        for directory in (checkpoint, tmp_path / "copy")
    )
    assert files == {name: found for name, found in copies.items() if not name.startswith(".")}


# -- a bad network -----------------------------------------------------------------------------------------------------


@every(*_REMOTE)
@pytest.mark.parametrize("kind", ["reset", "truncate", "unavailable"])
def test_broken_connections_do_not_break_a_load(
    store: Store, kind: Literal["reset", "truncate", "unavailable"], expected: Any, empty: dict[str, torch.Tensor]
) -> None:
    """Every third answer is cut somewhere, or is a refusal; the load is exact and counts what was sent again."""
    chance = random.Random(7)

    def policy(number: int, _head: bytes) -> Fault | None:
        return Fault(kind, chance.randrange(300, 2_000_000)) if number % 3 == 2 else None

    with TcpProxy("127.0.0.1", store.port, policy) as proxy:
        report = mx.load_into(empty, store.uri, environ=environ(store.through(proxy.port)))

    assert expected == digests(empty)
    assert report.retries > 0


class _Damaging:
    """A policy that changes one byte of each of the first ``times`` answers with many bytes."""

    def __init__(self, times: float) -> None:
        self._times = times
        self.damaged = 0

    def __call__(self, _number: int, head: bytes) -> Fault | None:
        found = re.search(rb"range: bytes=(\d+)-(\d+)", head, re.IGNORECASE)
        is_long = found is not None and int(found[2]) - int(found[1]) > _LONG_RANGE_BYTES
        if not is_long or self.damaged >= self._times:
            return None
        self.damaged += 1
        return Fault("flip", _LONG_RANGE_BYTES // 2, of_body=True)


@every(*_REMOTE)
def test_damaged_bytes_are_found_and_read_again(store: Store, expected: Any, empty: dict[str, torch.Tensor]) -> None:
    """One byte of a large answer changed on the way; the digest that the store publishes finds it."""
    policy = _Damaging(times=1)

    with TcpProxy("127.0.0.1", store.port, policy) as proxy:
        report = mx.load_into(empty, store.uri, environ=environ(store.through(proxy.port)))

    assert 1 == policy.damaged
    assert expected == digests(empty)
    assert report.bytes_reread > 0


@every(*_REMOTE)
def test_bytes_that_are_damaged_each_time_fail_the_load(store: Store, empty: dict[str, torch.Tensor]) -> None:
    """The load names the file, and says that its digest is another one."""
    policy = _Damaging(times=math.inf)

    with (
        TcpProxy("127.0.0.1", store.port, policy) as proxy,
        pytest.raises(mx.IntegrityError, match="model-0000"),
    ):
        mx.load_into(empty, store.uri, environ=environ(store.through(proxy.port)))


# -- another version ---------------------------------------------------------------------------------------------------


class _Replacing:
    """Calls a function when the load starts, and keeps its events."""

    def __init__(self, replace: Callable[[], object]) -> None:
        self.events: list[object] = []
        self._replace = replace

    @mx.hookimpl
    def mx_load_started(self, event: LoadStarted) -> None:
        self.events.append(event)
        self._replace()

    @mx.hookimpl
    def mx_load_finished(self, event: LoadFinished) -> None:
        self.events.append(event)

    @mx.hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self.events.append(event)


@every(*_REPLACING)
def test_a_shard_that_is_replaced_during_the_load_fails_it(store: Store, checkpoint: Path) -> None:
    """The load began with one version; another one of the same size is never mixed in."""
    uri, name = store.upload(checkpoint, "replaced"), "model-00002-of-00003.safetensors"
    content = bytearray((checkpoint / name).read_bytes())
    content[-1] ^= 0xFF
    observer = _Replacing(lambda: store.put(f"replaced/{name}", bytes(content)))
    plugins = mx.PluginManager.discover(environ())
    plugins.register(observer, name="replacing")

    with pytest.raises(mx.SourceChangedError, match=f"{uri}/{name}"):
        mx.load_state_dict(uri, environ=environ(), plugins=plugins)

    _, failed = observer.events
    assert isinstance(failed, LoadFailed)
    assert isinstance(failed.error, mx.SourceChangedError)
