"""Loads from the cache of a real server: ``mx://``, over both channels, and from a common disk."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import trustme

import modelexpress_core as mx_api
from devtools.fake_hub import FakeHub, HubAnswer, HubRequest
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.contracts.candidates import Tier
from modelexpress_core.errors import AccessDeniedError, IntegrityError, NotFoundError
from modelexpress_core.loader import Loader
from modelexpress_core.plugins import STORAGE, PluginManager
from modelexpress_core.sources.cache_client import CacheClient
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.uri import ModelURI
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from tests.support.commands import Commands
from tests.support.serving import Serving
from tests.support.waiting import eventually

_SECONDS = 120.0

Equal = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], None]


def cache_of(directory: Path) -> tuple[str, ...]:
    return ("--cache-dir", str(directory))


ALLOWED = {"MX_CACHE_SOURCES": "hf,file", "MX_CACHE_MIN_FREE_BYTES": "1", "MX_SERVER_BULK_PORT": "18002"}


@pytest.fixture(scope="module")
def server(server_commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server that caches models of its own disk."""
    serving = Serving(server_commands, *cache_of(tmp_path_factory.mktemp("cache")), **ALLOWED)
    yield serving
    serving.end()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def bulk_port_of(serving: Serving, path: Path) -> int:
    """The port of the bulk channel."""
    with CacheClient.from_env(serving.url, {}) as client:
        offer, _ = client.open_bulk(client.follow(client.open(f"file{path}")))
    return offer.origin.port


def mx_uri(serving: Serving, path: Path | str) -> str:
    return f"mx://{serving.url.removeprefix('http://')}/{path if isinstance(path, str) else f'file{path}'}"


def state_of(uri: str, **environ: str) -> tuple[dict[str, torch.Tensor], mx_api.LoadReport]:
    """The tensors at ``uri``, and the report."""
    plugins = PluginManager.discover(environ)
    reports: list[mx_api.LoadReport] = []

    class Observer:
        @mx_api.hookimpl
        def mx_load_finished(self, event: object) -> None:
            reports.append(event.report)  # type: ignore[attr-defined]

    plugins.register(Observer(), name="observer")
    state = mx_api.load_state_dict(uri, environ=environ, plugins=plugins)
    return state, reports[0]


# -- the functions of the API ------------------------------------------------------------------------------------------


def test_a_load_reads_and_compares_every_byte(
    server: Serving, sharded: Path, expected: Callable[[Path], dict[str, torch.Tensor]], assert_equal: Equal
) -> None:
    """Over the bulk channel; the report tells what was compared here, and what by the server."""
    state, report = state_of(mx_uri(server, sharded))

    assert_equal(expected(sharded), state)
    assert report.channel.startswith("bulk channel on port ")
    assert report.bytes_compared + report.bytes_compared_by_server >= report.bytes_needed
    assert report.bytes_compared > 0.9 * report.bytes_needed
    assert "compared here" in str(report)
    assert report.content_version


def test_a_load_goes_over_grpc_where_the_port_is_closed(
    server: Serving, sharded: Path, expected: Callable[[Path], dict[str, torch.Tensor]], assert_equal: Equal
) -> None:
    """The same bytes, compared in the same way; the report says why."""
    state, report = state_of(mx_uri(server, sharded), MX_BULK_PORT="0")

    assert_equal(expected(sharded), state)
    assert "gRPC, since MX_BULK_PORT is 0" == report.channel
    assert report.bytes_compared > 0.9 * report.bytes_needed


def test_a_firewall_before_the_bulk_channel_costs_a_warning(
    server: Serving,
    sharded: Path,
    expected: Callable[[Path], dict[str, torch.Tensor]],
    assert_equal: Equal,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One, and the bytes come in frames: here only the gRPC port is reachable at the address that is used."""
    with TcpProxy("127.0.0.1", port_of(server.url), listen="127.0.0.2") as proxy:
        state, report = state_of(f"mx://127.0.0.2:{proxy.port}/file{sharded}")

    assert_equal(expected(sharded), state)
    assert report.channel.startswith("gRPC, since the bulk channel on 127.0.0.2:")
    warnings = [record for record in caplog.records if "is read over gRPC, which is slower" in record.getMessage()]
    assert 1 == len(warnings)


def test_columns_of_a_rank_travel_alone(server: Serving, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The server gathers the runs, compares the chunks around them, and sends no more than what is needed."""
    from safetensors.torch import save_file

    directory = tmp_path_factory.mktemp("columns")
    weight = torch.randn(4096, 512)
    save_file({"weight": weight}, directory / "model.safetensors")
    target = torch.empty(4096, 64)
    with mx_api.deferred_weights(mx_uri(server, directory), environ={}) as weights:
        for _, tensor in weights:
            target.copy_(tensor[:, 64:128])

    report = weights.report
    assert report is not None
    assert torch.equal(weight[:, 64:128], target)
    assert report.bytes_fetched == target.nbytes
    assert report.bytes_compared_by_server >= target.nbytes


def test_headers_can_be_read_alone(server: Serving, sharded: Path) -> None:
    """As `mx inspect` does."""
    checkpoint = mx_api.open_checkpoint(mx_uri(server, sharded), environ={})

    assert len(checkpoint.files) == 3
    assert 1 == len({file.version for file in checkpoint.files})


def test_one_file_can_be_named(server: Serving, sharded: Path) -> None:
    """The model is the directory above it."""
    name = min(path.name for path in sharded.glob("*.safetensors"))
    state, _ = state_of(mx_uri(server, f"file{sharded}/{name}"))

    assert state


# -- commands ----------------------------------------------------------------------------------------------------------


def test_commands_take_the_uri(
    server: Serving, sharded: Path, mx: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """`mx load`, `mx pull`, `mx inspect` and `mx doctor`."""
    uri = mx_uri(server, sharded)
    loaded, inspected = mx("load", uri, "--json"), mx("inspect", uri, "--json")
    pulled, doctor = mx("pull", uri, str(tmp_path / "copy"), "--json"), mx("doctor", uri, "--json")

    for command in (loaded, inspected, pulled, doctor):
        assert not command.returncode, command.stderr
    report = json.loads(loaded.stdout)
    assert report["bytes_compared"] > 0
    assert report["channel"].startswith("bulk channel")
    copied = json.loads(pulled.stdout)
    assert copied["bytes_compared"] == copied["bytes"]
    assert {path.name for path in sharded.iterdir()} == {
        path.name for path in (tmp_path / "copy").iterdir() if not path.name.startswith(".")
    }
    assert "over the bulk channel on port" in doctor.stdout
    shown = mx("load", uri)
    assert re.search(r"chunks +\S+ MB compared here", shown.stdout)


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_a_missing_model_is_not_found(server: Serving) -> None:
    """The message is the server's."""
    with pytest.raises(NotFoundError, match="could not list the files of mx://") as raised:
        mx_api.open_checkpoint(mx_uri(server, "file/no/such/model"), environ={})

    assert raised.value.hint


def test_a_source_that_is_not_allowed_is_denied(server: Serving) -> None:
    """And the message names the variable."""
    with pytest.raises(AccessDeniedError, match="s3://bucket/model") as raised:
        mx_api.open_checkpoint(mx_uri(server, "s3/bucket/model"), environ={})

    assert "MX_CACHE_SOURCES" in str(raised.value)


def test_a_token_goes_to_no_server_that_is_not_named(
    start: Callable[..., Serving], sharded: Path, tmp_path: Path
) -> None:
    """A URI may come from a stranger, who must not get the token of the reader."""
    tokens, token = tmp_path / "tokens", tmp_path / "token"
    tokens.write_text("reader:the-secret-of-the-reader\n")
    token.write_text("the-secret-of-the-reader")
    tokens.chmod(0o600)
    serving = start(*cache_of(tmp_path / "cache"), MX_AUTH_MODE="token", MX_AUTH_TOKENS_PATH=str(tokens), **ALLOWED)
    environ = {"MX_AUTH_TOKEN_PATH": str(token)}

    with pytest.raises(AccessDeniedError) as raised:
        mx_api.open_checkpoint(mx_uri(serving, sharded), environ=environ)
    checkpoint = mx_api.open_checkpoint(mx_uri(serving, sharded), environ={**environ, "MODEL_EXPRESS_URL": serving.url})

    assert "MODEL_EXPRESS_URL" in str(raised.value)
    assert checkpoint.tensors


def test_mxs_is_tls_on_both_channels(
    start: Callable[..., Serving],
    sharded: Path,
    tmp_path: Path,
    expected: Callable[[Path], dict[str, torch.Tensor]],
    assert_equal: Equal,
) -> None:
    """With the name of the server verified; without its authority nothing is read."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    ca, certificate, key = tmp_path / "ca.pem", tmp_path / "server.pem", tmp_path / "key.pem"
    authority.cert_pem.write_to_path(str(ca))
    certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    serving = start(
        *cache_of(tmp_path / "cache"), MX_TLS_CERT_PATH=str(certificate), MX_TLS_KEY_PATH=str(key), **ALLOWED
    )
    uri = f"mxs://127.0.0.1:{port_of(serving.url)}/file{sharded}"

    state, report = state_of(uri, MX_TLS_CA_PATH=str(ca))
    with pytest.raises(mx_api.BackendError):
        mx_api.open_checkpoint(uri, environ={"MX_RETRY_ATTEMPTS": "1"})

    assert_equal(expected(sharded), state)
    assert report.channel.startswith("bulk channel")


def test_a_copy_that_was_damaged_on_the_server_is_found(start: Callable[..., Serving], tmp_path: Path) -> None:
    """Its inode, size and times are those that were verified: only the bytes differ."""
    from safetensors.torch import save_file

    source = tmp_path / "source"
    source.mkdir()
    save_file({"weight": torch.randn(1024, 1024)}, source / "model.safetensors")
    serving = start(*cache_of(tmp_path / "cache"), **ALLOWED)
    uri = mx_uri(serving, source)
    assert mx_api.load_state_dict(uri, environ={})
    blob = max(
        (path for path in (tmp_path / "cache").rglob("*") if path.is_file()), key=lambda each: each.stat().st_size
    )
    before = blob.stat()
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)
        file.seek(before.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    blob.chmod(before.st_mode & 0o7777)

    with pytest.raises(IntegrityError, match="differs from the chunk manifest") as raised:
        mx_api.load_state_dict(uri, environ={})

    assert "mx models validate" in str(raised.value)


def test_damage_on_the_bulk_channel_is_repaired(
    server: Serving, sharded: Path, expected: Callable[[Path], dict[str, torch.Tensor]], assert_equal: Equal
) -> None:
    """Each answer has a flipped byte, and each chunk is read a second time into place."""
    draw = random.Random(5)
    flips = 0

    def flip(_number: int, head: bytes) -> Fault | None:
        nonlocal flips
        runs = re.search(rb'"runs":\[\["[^"]+",\d+,(\d+)\]\]', head)
        # Reads of whole chunks, and each second one: what replaces damaged bytes arrives intact.
        if runs is None or int(runs[1]) < 1_000_000 or flips % 2:
            flips += flips % 2
            return None
        flips += 1
        return Fault("flip", draw.randrange(int(runs[1])), of_body=True, bits=1 << draw.randrange(8))

    port = bulk_port_of(server, sharded)
    with (
        TcpProxy("127.0.0.1", port_of(server.url), listen="127.0.0.2") as grpc,
        TcpProxy("127.0.0.1", port, flip, listen="127.0.0.2", listen_port=port),
    ):
        state, report = state_of(f"mx://127.0.0.2:{grpc.port}/file{sharded}", MX_CONCURRENCY="1")

    assert flips > 1
    assert report.channel == f"bulk channel on port {port}"
    assert_equal(expected(sharded), state)


def test_damage_in_frames_is_repaired_or_found(
    server: Serving, sharded: Path, expected: Callable[[Path], dict[str, torch.Tensor]], assert_equal: Equal
) -> None:
    """No load ends well with other bytes than the server has."""
    good = 0
    for after_bytes in range(200_000, 2_000_000, 300_000):
        answers = iter([after_bytes])
        fault = lambda _number, _head, answers=answers: next((Fault("flip", each) for each in answers), None)  # noqa: E731
        with TcpProxy("127.0.0.1", port_of(server.url), fault) as proxy:
            try:
                uri = f"mx://127.0.0.1:{proxy.port}/file{sharded}"
                assert_equal(expected(sharded), mx_api.load_state_dict(uri, environ={"MX_BULK_PORT": "0"}))
                good += 1
            except mx_api.ModelExpressError:
                pass

    assert good


def test_the_bulk_channel_is_that_of_the_replica_that_answered(
    start: Callable[..., Serving], sharded: Path, tmp_path: Path
) -> None:
    """A name may lead to several replicas, and a ticket is of one. Only one that variables name leads elsewhere."""
    serving = start(*cache_of(tmp_path / "cache"), **ALLOWED, MX_CACHE_ENDPOINT="127.0.0.1:8001")
    with TcpProxy("127.0.0.1", port_of(serving.url), listen="127.0.0.2") as service:
        uri = f"mx://127.0.0.2:{service.port}/file{sharded}"
        _, named = state_of(uri, MODEL_EXPRESS_URL=f"http://127.0.0.2:{service.port}")
        _, unnamed = state_of(uri)

    assert named.channel.startswith("bulk channel on port")
    assert unnamed.channel.startswith("gRPC, since")


# -- arriving, restarted -----------------------------------------------------------------------------------------------


def test_a_load_waits_for_bytes_that_still_arrive(start: Callable[..., Serving], sharded: Path, tmp_path: Path) -> None:
    """And compares them once the manifest is there."""
    release, held, passed = threading.Event(), threading.Event(), threading.Semaphore(1)

    def hold(request: HubRequest) -> HubAnswer | None:
        if request.server == "cdn" and request.method == "GET" and not passed.acquire(blocking=False):
            held.set()
            release.wait(_SECONDS)
        return None

    with FakeHub() as hub:
        for path in sharded.iterdir():
            hub.put("org/model", path.name, path.read_bytes())
        hub.before = hold
        serving = start(*cache_of(tmp_path / "cache"), **ALLOWED, **hub.environ())
        found: list[tuple[dict[str, torch.Tensor], mx_api.LoadReport]] = []
        load = threading.Thread(target=lambda: found.append(state_of(mx_uri(serving, "org/model"))))
        load.start()
        assert held.wait(_SECONDS)
        assert not found
        release.set()
        load.join(_SECONDS)

    ((state, report),) = found
    assert {name: tensor.nbytes for name, tensor in mx_api.load_state_dict(sharded, environ={}).items()} == {
        name: tensor.nbytes for name, tensor in state.items()
    }
    assert report.bytes_compared + report.bytes_compared_by_server >= report.bytes_needed


def test_damage_on_the_way_of_a_model_that_still_arrives_is_repaired(
    start: Callable[..., Serving],
    sharded: Path,
    tmp_path: Path,
    expected: Callable[[Path], dict[str, torch.Tensor]],
    assert_equal: Equal,
) -> None:
    """There is no manifest to compare with yet: each piece of an answer has a checksum."""
    release, passed = threading.Event(), threading.Semaphore(2)
    flipped: list[bytes] = []

    def hold(request: HubRequest) -> HubAnswer | None:
        if request.server == "cdn" and request.method == "GET" and not passed.acquire(blocking=False):
            release.wait(_SECONDS)
        return None

    def flip(_number: int, head: bytes) -> Fault | None:
        runs = re.search(rb'"runs":\[\["[^"]+",\d+,(\d+)\]\]', head)
        if runs is None or flipped:
            return None
        flipped.append(head)
        release.set()  # everything that was asked for before is read, with its damage
        return Fault("flip", int(runs[1]) // 2, of_body=True, bits=4)

    with FakeHub() as hub:
        for path in sharded.iterdir():
            hub.put("org/model", path.name, path.read_bytes())
        hub.before = hold
        serving = start(*cache_of(tmp_path / "cache"), **ALLOWED, **hub.environ())
        port = bulk_port_of(serving, sharded)
        with (
            TcpProxy("127.0.0.1", port_of(serving.url), listen="127.0.0.2") as grpc,
            TcpProxy("127.0.0.1", port, flip, listen="127.0.0.2", listen_port=port),
        ):
            threading.Timer(10, release.set).start()
            state, _ = state_of(f"mx://127.0.0.2:{grpc.port}/org/model")

    assert flipped
    assert b'"checksums":true' in flipped[0]
    assert_equal(expected(sharded), state)


def test_a_load_goes_on_after_the_server_was_restarted(
    start: Callable[..., Serving], sharded: Path, tmp_path: Path
) -> None:
    """At the first missing byte, of the same version, with a new ticket."""
    serving = start(*cache_of(tmp_path / "cache"), **ALLOWED)
    port = serving.url.rpartition(":")[2]
    uri = ModelURI.parse(mx_uri(serving, sharded))
    _, storage = PluginManager.discover({}).open(STORAGE, uri, {})
    with contextlib.closing(storage):
        info = max(storage.list(uri.path), key=lambda each: each.size)
        whole = (sharded / Path(info.path).name).read_bytes()
        first, rest = bytearray(1_000_000), bytearray(len(whole) - 1_000_000)
        assert len(first) == storage.read_into(info.path, 0, memoryview(first), version=info.version)
        serving.end()

        def fail(_number: int) -> None:
            with pytest.raises(mx_api.UnavailableError):
                storage.read_into(info.path, len(first), memoryview(bytearray(1_000_000)), version=info.version)

        with ThreadPoolExecutor(8) as pool:  # as many as a load has
            list(pool.map(fail, range(16)))
        start(*cache_of(tmp_path / "cache"), "--port", port, **ALLOWED)

        def read() -> bool:
            with contextlib.suppress(mx_api.UnavailableError):
                return len(rest) == storage.read_into(info.path, len(first), memoryview(rest), version=info.version)
            return False

        assert eventually(read)
        storage.check_unchanged(info.path, version=info.version)  # type: ignore[attr-defined]

        assert whole == bytes(first + rest)
        assert storage.compared().channel.startswith("bulk channel")  # type: ignore[attr-defined]
        assert len(whole) == storage.compared().here_bytes  # type: ignore[attr-defined]


def test_files_with_equal_bytes_have_one_blob(start: Callable[..., Serving], sharded: Path, tmp_path: Path) -> None:
    """The version stays as it was verified: every file can be read, again and again."""
    content = min(sharded.glob("*.safetensors")).read_bytes()
    paths = ("config.json", "a/model.safetensors", "b/config.json", "b/model.safetensors")
    with FakeHub() as hub:
        for path in paths:
            hub.put("org/twice", path, content if "safetensors" in path else b"{}")
        serving = start(*cache_of(tmp_path / "cache"), **ALLOWED, **hub.environ())
        uri = mx_uri(serving, "hf/org/twice")
        for number in range(2):
            with CacheClient.from_env(serving.url, {}) as client:
                client.follow(client.open("hf/org/twice"))
            copied = mx_api.pull(uri, tmp_path / str(number))

            assert len(paths) == copied.files
            assert content == (tmp_path / str(number) / "b" / "model.safetensors").read_bytes()
    assert 2 == len(list((tmp_path / "cache" / "models--org--twice" / "blobs").iterdir()))


# -- ranking -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(sharded: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        for path in sharded.iterdir():
            hub.put("org/model", path.name, path.read_bytes())
        yield hub


def candidates(uri: str, environ: Mapping[str, str]) -> list[tuple[str, Tier]]:
    loader = Loader(environ, None)
    return [(str(each.uri), each.tier) for each in loader.candidates(loader.request(uri))]


def test_the_cache_of_the_server_is_tried_before_the_source(
    start: Callable[..., Serving], hub: FakeHub, tmp_path: Path
) -> None:
    """With both variables; the explanation has it too."""
    serving = start(*cache_of(tmp_path / "cache"), **ALLOWED, **hub.environ())
    environ = {"MODEL_EXPRESS_URL": serving.url, "MODEL_EXPRESS_NO_SHARED_STORAGE": "1", **hub.environ()}
    cached = mx_uri(serving, "hf/org/model")

    explanation = mx_api.explain("hf://org/model", environ=environ)
    _, report = state_of("hf://org/model", **environ)

    assert [(cached, Tier.CACHE), ("hf://org/model", Tier.ORIGIN)] == candidates("hf://org/model", environ)
    assert [(cached, "chosen"), ("hf://org/model", "next")] == [
        (each.place, each.status) for each in explanation.places[:2]
    ]
    assert "MODEL_EXPRESS_URL names it" in explanation.places[0].reason
    assert cached == report.uri
    assert "hf://org/model" == str(Loader({}, None).candidates(Loader({}, None).request("hf://org/model"))[0].uri)


def test_workers_are_found_without_a_way_to_the_source(
    start: Callable[..., Serving], hub: FakeHub, tmp_path: Path
) -> None:
    """The cache tells the content version of the checkpoint, which is the one that the source tells."""
    serving = start(*cache_of(tmp_path / "cache"), **ALLOWED, **hub.environ())
    environ = {"MODEL_EXPRESS_URL": serving.url, "MODEL_EXPRESS_NO_SHARED_STORAGE": "1"}
    identity = mx_api.own_identity("org/model", {})
    version = mx_api.open_checkpoint("hf://org/model", environ=hub.environ()).content_version
    assert version
    with contextlib.closing(ServerClient.from_env(environ)) as client:
        here = "127.0.0.1:9"
        record = p2p_pb2.WorkerMetadata(status=p2p_pb2.SOURCE_STATUS_READY, worker_grpc_endpoint=here)
        record.topology.update({"mx_transports": "grpc", "mx_endpoint": here})
        client.publish(identity.with_content_version(version), record, "worker")
    loader = Loader({**environ, "HF_ENDPOINT": "http://127.0.0.1:9"}, None)

    found = loader.candidates(loader.request("hf://org/model", identity=identity))

    assert ["grpc", "mx", "hf"] == [each.uri.scheme for each in found]


@pytest.mark.parametrize("options", [(), ("--cache-dir",)])
def test_a_server_that_cannot_help_is_one_line(
    start: Callable[..., Serving],
    hub: FakeHub,
    tmp_path: Path,
    options: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It has no cache, or does not allow the source: the next candidate is read."""
    arguments = (*options, str(tmp_path / "cache")) if options else ()
    serving = start(*arguments, MX_CACHE_SOURCES="s3", MX_CACHE_MIN_FREE_BYTES="1")
    environ = {"MODEL_EXPRESS_URL": serving.url, "MODEL_EXPRESS_NO_SHARED_STORAGE": "1", **hub.environ()}

    _, report = state_of("hf://org/model", **environ)

    assert "hf://org/model" == report.uri
    lines = [record.getMessage() for record in caplog.records if "trying the next candidate" in record.getMessage()]
    assert 1 == len(lines)
    assert "\n" not in lines[0]
    assert ("--cache-dir" in lines[0]) != bool(options)


def test_a_common_disk_is_read_as_files(
    start: Callable[..., Serving], hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once the server has all of them; where they are not there, a warning says so, and they are streamed."""
    serving = start(*cache_of(tmp_path / "cache"), **ALLOWED, **hub.environ())
    environ = {"MODEL_EXPRESS_URL": serving.url, **hub.environ()}
    (tmp_path / "empty").mkdir()

    _, shared = state_of("hf://org/model", MODEL_EXPRESS_CACHE_DIRECTORY=str(tmp_path / "cache"), **environ)
    caplog.clear()
    _, streamed = state_of("hf://org/model", MODEL_EXPRESS_CACHE_DIRECTORY=str(tmp_path / "empty"), **environ)

    assert shared.uri.startswith(f"file://{tmp_path}/cache/models--org--model/snapshots/")
    assert streamed.uri.startswith("mx://")
    assert any("is streamed, since it is not in" in record.getMessage() for record in caplog.records)


def test_a_server_alone_changes_nothing(hub: FakeHub) -> None:
    """One that keeps metadata: it is not asked for models, even if it does not answer."""
    environ = {"MODEL_EXPRESS_URL": "127.0.0.1:1", **hub.environ()}

    assert [("hf://org/model", Tier.ORIGIN)] == candidates("hf://org/model", environ)
    explanation = mx_api.explain("hf://org/model", environ=environ)
    assert any("MODEL_EXPRESS_NO_SHARED_STORAGE" in place.hint for place in explanation.places)


def test_files_of_this_machine_are_not_asked_for(sharded: Path) -> None:
    """Another machine has other files at the same path; and parameters may be credentials."""
    environ = {"MODEL_EXPRESS_URL": "127.0.0.1:1", "MODEL_EXPRESS_NO_SHARED_STORAGE": "1"}

    assert [Tier.ORIGIN] == [tier for _, tier in candidates(str(sharded), environ)]
    assert [Tier.ORIGIN] == [tier for _, tier in candidates("s3://bucket/model?endpoint=http://127.0.0.1:1", environ)]


def test_the_content_version_is_that_of_the_source(start: Callable[..., Serving], hub: FakeHub, tmp_path: Path) -> None:
    """So workers that load from the cache and from the Hub read from each other. Only a named server is believed."""
    serving = start(*cache_of(tmp_path / "cache"), **ALLOWED, **hub.environ())
    cached = mx_uri(serving, "org/model")

    original = mx_api.open_checkpoint("hf://org/model", environ=hub.environ()).content_version
    named = mx_api.open_checkpoint(cached, environ={"MODEL_EXPRESS_URL": serving.url}).content_version
    foreign = mx_api.open_checkpoint(cached, environ={}).content_version

    assert original == named
    assert foreign not in {original, None}
