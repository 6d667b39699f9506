"""The cache as existing clients use it: what the protocol says, over gRPC and over plain HTTP/2."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from devtools.fake_hub import FakeHub, HubAnswer, HubRequest
from devtools.models import generate_sharded
from modelexpress_core.wire.proto.modelexpress import model_pb2
from modelexpress_core.wire.rpc import MODEL, stub
from tests.support.http2 import Http2, run_all
from tests.support.serving import Serving
from tests.support.waiting import eventually

_SECONDS = 60.0
_Code = grpc.StatusCode
_Provider = model_pb2.ModelProvider


class Caller:
    """Calls the service with the limits that gRPC sets by itself."""

    def __init__(self, serving: Serving, token: str = "") -> None:
        self.serving = serving
        self.channel = grpc.insecure_channel(serving.url)
        self._calls = stub(MODEL, self.channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def __call__(self, method: str, request: Any) -> Any:
        return self._calls[method](request, metadata=self._metadata, timeout=_SECONDS)

    def ensure(self, name: str, **options: Any) -> list[model_pb2.ModelStatusUpdate]:
        request = model_pb2.ModelDownloadRequest(model_name=name, **options)
        return list(self("EnsureModelDownloaded", request))

    def stream(self, name: str, **options: Any) -> list[model_pb2.FileChunk]:
        return list(self("StreamModelFiles", model_pb2.ModelFilesRequest(model_name=name, **options)))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """Has a checkpoint, whose branch ``old`` is its first commit, and a gated one."""
    directory = generate_sharded(tmp_path_factory.mktemp("source") / "model", shards=2, layers=2, hidden=512)
    (directory / "empty.txt").write_text("")
    (directory / "config.json").write_text('{"hidden": 512}')
    with FakeHub() as hub:
        hub.put("org/model", "config.json", b'{"first": true}')
        repository = hub.repositories["org/model"]
        repository.branches["old"] = repository.branches["main"]
        hub.upload(directory, "org/model")
        hub.put("org/gated", "config.json", b"{}")
        hub.repositories["org/gated"].gated = True
        yield hub


@pytest.fixture(scope="module")
def caller(server_commands: Any, hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """A server that may download from the Hub."""
    directory = str(tmp_path_factory.mktemp("cache"))
    serving = Serving(server_commands, "--cache-dir", directory, MX_CACHE_MIN_FREE_BYTES="1", **hub.environ())
    caller = Caller(serving)
    yield caller
    caller.channel.close()
    serving.end()


def files_of(hub: FakeHub, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories["org/model"]
    return {path: file.content for path, file in repository.commits[repository.branches[branch]].items()}


def assert_framed(chunks: list[model_pb2.FileChunk], files: dict[str, bytes], commit: str) -> None:
    """As the protocol says: file after file, offsets without gaps, and marks where they belong."""
    assert commit == chunks[0].commit_hash
    assert not any(chunk.HasField("commit_hash") for chunk in chunks[1:])
    found: dict[str, bytes] = {}
    for number, chunk in enumerate(chunks):
        before = found.get(chunk.relative_path, b"")
        assert (len(before), len(files[chunk.relative_path])) == (chunk.offset, chunk.total_size)
        assert chunk.data or not chunk.total_size
        found[chunk.relative_path] = before + chunk.data
        ended = len(found[chunk.relative_path]) == chunk.total_size
        assert ended == chunk.is_last_chunk
        assert (number == len(chunks) - 1) == chunk.is_last_file
        assert ended or chunks[number + 1].relative_path == chunk.relative_path
    assert files == found


# -- the protocol ------------------------------------------------------------------------------------------------------


def test_a_model_is_ensured_listed_and_streamed(caller: Caller, hub: FakeHub) -> None:
    """Byte for byte, whatever chunk size the client asks for."""
    commit = hub.repositories["org/model"].branches["main"]
    files = files_of(hub)

    *_, last = caller.ensure("org/model")
    assert (model_pb2.MODEL_STATUS_DOWNLOADED, commit, "org/model") == (
        last.status,
        last.resolved_revision,
        last.model_name,
    )
    listed = caller("ListModelFiles", model_pb2.ModelFilesRequest(model_name="org/model"))
    assert {path: len(content) for path, content in files.items()} == {
        each.relative_path: each.size for each in listed.files
    }
    assert sum(map(len, files.values())) == listed.total_size
    for chunk_bytes in (0, 1000_000, 4 << 20, 2**32 - 1):
        chunks = caller.stream("org/model", chunk_size=chunk_bytes)
        assert_framed(chunks, files, commit)
        assert max(len(chunk.data) for chunk in chunks) <= min(chunk_bytes or 2 << 20, 2 << 20)


def test_a_selection_is_streamed(caller: Caller, hub: FakeHub) -> None:
    """By path, and without weights; an empty file is one empty chunk."""
    caller.ensure("org/model")
    commit = hub.repositories["org/model"].branches["main"]
    files = files_of(hub)
    chosen = {path: files[path] for path in ("empty.txt", "config.json")}
    selector = model_pb2.FileSelector(paths=["empty.txt", "config.json", "empty.txt"])

    assert_framed(caller.stream("org/model", file_selector=selector), chosen, commit)
    small = {path: content for path, content in files.items() if not path.endswith(".safetensors")}
    assert_framed(caller.stream("org/model", ignore_weights=True), small, commit)
    listed = caller("ListModelFiles", model_pb2.ModelFilesRequest(model_name="org/model", ignore_weights=True))
    assert sorted(small) == [each.relative_path for each in listed.files]


def test_a_revision_is_resolved(caller: Caller, hub: FakeHub) -> None:
    """A branch, and a commit; one that is none is NOT_FOUND."""
    commit = hub.repositories["org/model"].branches["old"]
    for revision in ("old", commit):
        *_, last = caller.ensure("org/model", revision=revision)
        assert (model_pb2.MODEL_STATUS_DOWNLOADED, commit) == (last.status, last.resolved_revision)
        assert_framed(caller.stream("org/model", revision=revision), files_of(hub, "old"), commit)
    with pytest.raises(grpc.RpcError) as raised:
        caller.ensure("org/model", revision="none")
    assert _Code.NOT_FOUND == code_of(raised)


def test_files_without_weights_are_a_download_of_their_own(
    start: Callable[..., Serving], hub: FakeHub, tmp_path: Path
) -> None:
    """What was left out is downloaded when it is asked for."""
    caller = Caller(start("--cache-dir", str(tmp_path / "cache"), MX_CACHE_MIN_FREE_BYTES="1", **hub.environ()))
    assert model_pb2.MODEL_STATUS_DOWNLOADED == caller.ensure("org/model", ignore_weights=True)[-1].status
    with pytest.raises(grpc.RpcError) as raised:
        caller.stream("org/model")
    assert _Code.NOT_FOUND == code_of(raised)
    assert caller.stream("org/model", ignore_weights=True)[-1].is_last_file

    assert model_pb2.MODEL_STATUS_DOWNLOADED == caller.ensure("org/model")[-1].status
    assert_framed(caller.stream("org/model"), files_of(hub), hub.repositories["org/model"].branches["main"])
    caller.channel.close()


def test_a_download_is_reported_and_streamed_while_it_lasts(
    start: Callable[..., Serving], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statuses say how much has arrived; a client that left starts no second download."""
    content = os.urandom(24 << 20)
    release = threading.Event()
    asked: list[str] = []

    def hold(request: HubRequest) -> HubAnswer | None:
        ranges = re.search(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if ranges:
            asked.append(ranges[0])
            if int(ranges[2]) > len(content) // 2:
                release.wait(_SECONDS)
        return None

    with FakeHub() as hub:
        hub.put("org/model", "model.bin", content)
        hub.before = hold
        caller = Caller(start("--cache-dir", str(tmp_path / "cache"), MX_CACHE_MIN_FREE_BYTES="1", **hub.environ()))
        request = model_pb2.ModelDownloadRequest(model_name="org/model")
        leaving = caller("EnsureModelDownloaded", request)
        first = next(leaving)
        assert model_pb2.MODEL_STATUS_DOWNLOADING == first.status
        leaving.cancel()
        staying = caller("EnsureModelDownloaded", request)
        assert "of 25165824 bytes" in next(staying).message
        chunks = caller("StreamModelFiles", model_pb2.ModelFilesRequest(model_name="org/model"))
        begun = [next(chunks)]
        release.set()
        assert_framed([*begun, *chunks], {"model.bin": content}, hub.repositories["org/model"].branches["main"])
        assert model_pb2.MODEL_STATUS_DOWNLOADED == [*staying][-1].status
    assert len(asked) == len(set(asked)), "a range was downloaded twice"
    caller.channel.close()


# -- refusals ----------------------------------------------------------------------------------------------------------


def code_of(raised: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    error: Any = raised.value
    return error.code()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_name": "org/none"}, "org/none"),
        ({"model_name": "org/gated"}, "gated"),
        ({"model_name": "org/model", "provider": _Provider.MODEL_PROVIDER_NGC}, "ngc"),
        ({"model_name": "bucket/model", "provider": _Provider.MODEL_PROVIDER_S3}, "MX_CACHE_SOURCES"),
        ({"model_name": "s3://bucket/model", "provider": _Provider.MODEL_PROVIDER_S3}, "MX_CACHE_SOURCES"),
        ({"model_name": "bucket/model", "provider": _Provider.MODEL_PROVIDER_GCS}, "MX_CACHE_SOURCES"),
    ],
)
def test_a_download_that_fails_is_a_status(caller: Caller, options: dict[str, Any], words: str) -> None:
    """With gRPC's OK, and the reason."""
    name = options.pop("model_name")
    *_, last = caller.ensure(name, **options)

    assert (model_pb2.MODEL_STATUS_ERROR, name) == (last.status, last.model_name)
    assert words in last.message


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../../etc",
        "org/../model",
        "org/na\nme",
        "org/" + "x" * 4096,
        "org//model",
        "model",
        "a\\b/c",
    ],
)
@pytest.mark.parametrize("method", ["EnsureModelDownloaded", "StreamModelFiles", "ListModelFiles", "DeleteModel"])
def test_a_name_that_is_none(caller: Caller, method: str, name: str) -> None:
    """INVALID_ARGUMENT, in each method."""
    with pytest.raises(grpc.RpcError) as raised:
        request: Any = MODEL.methods[method].request
        answer = caller(method, request(model_name=name))
        if MODEL.methods[method].response_streaming:
            list(answer)
    assert _Code.INVALID_ARGUMENT == code_of(raised)


@pytest.mark.parametrize(
    ("method", "options", "code"),
    [
        ("EnsureModelDownloaded", {"provider": 7}, _Code.INVALID_ARGUMENT),
        ("EnsureModelDownloaded", {"provider": 3, "revision": "main"}, _Code.INVALID_ARGUMENT),
        ("StreamModelFiles", {"provider": -1}, _Code.INVALID_ARGUMENT),
        ("StreamModelFiles", {"provider": 2, "revision": "main"}, _Code.INVALID_ARGUMENT),
        ("StreamModelFiles", {"model_name": "org/absent"}, _Code.NOT_FOUND),
        ("StreamModelFiles", {"provider": 1}, _Code.NOT_FOUND),
        ("StreamModelFiles", {"revision": "none"}, _Code.NOT_FOUND),
        ("StreamModelFiles", {"file_selector": {"paths": ["none"]}}, _Code.NOT_FOUND),
        ("StreamModelFiles", {"file_selector": {"paths": ["../config.json"]}}, _Code.NOT_FOUND),
        ("StreamModelFiles", {"file_selector": {"paths": ["/etc/passwd"]}}, _Code.NOT_FOUND),
        ("StreamModelFiles", {"file_selector": {"paths": ["x"] * 10_001}}, _Code.INVALID_ARGUMENT),
        ("ListModelFiles", {"model_name": "org/absent"}, _Code.NOT_FOUND),
    ],
)
def test_what_makes_no_sense_is_refused(
    caller: Caller, method: str, options: dict[str, Any], code: grpc.StatusCode
) -> None:
    """With its status."""
    caller.ensure("org/model")
    with pytest.raises(grpc.RpcError) as raised:
        request: Any = MODEL.methods[method].request
        answer = caller(method, request(**{"model_name": "org/model", **options}))
        if MODEL.methods[method].response_streaming:
            list(answer)
    assert code == code_of(raised)


def test_models_are_deleted_where_the_operator_allows_it(
    caller: Caller, start: Callable[..., Serving], hub: FakeHub, tmp_path: Path
) -> None:
    """By default they are not; the answer says why."""
    caller.ensure("org/model")
    request = model_pb2.DeleteModelRequest(model_name="org/model")
    refused = caller("DeleteModel", request)
    assert (False, True) == (refused.success, "MX_CACHE_DELETE=1" in refused.message)
    assert caller.stream("org/model", ignore_weights=True)

    other = Caller(
        start(
            "--cache-dir",
            str(tmp_path / "cache"),
            MX_CACHE_MIN_FREE_BYTES="1",
            MX_CACHE_DELETE="1",
            **hub.environ(),
        )
    )
    assert not other("DeleteModel", request).success
    other.ensure("org/model")
    other.ensure("org/model", revision="old")
    assert other("DeleteModel", request).success
    with pytest.raises(grpc.RpcError) as raised:
        other.stream("org/model")
    assert _Code.NOT_FOUND == code_of(raised)
    assert not [path for path in (tmp_path / "cache").rglob("*.safetensors") if path.exists()]
    other.channel.close()


def test_a_server_without_a_cache(start: Callable[..., Serving]) -> None:
    """Each method says how to start one."""
    caller = Caller(start())
    for method, kind in MODEL.methods.items():
        with pytest.raises(grpc.RpcError) as raised:
            answer = caller(method, kind.request())
            if kind.response_streaming:
                list(answer)
        assert _Code.FAILED_PRECONDITION == code_of(raised), method
    caller.channel.close()


# -- HTTP/2 ------------------------------------------------------------------------------------------------------------


def messages_of(data: bytes) -> list[bytes]:
    """The messages in what a stream of HTTP/2 carried."""
    found = []
    while data:
        compressed, size = struct.unpack_from(">BI", data)
        assert not compressed
        found.append(data[5 : 5 + size])
        assert size == len(found[-1])
        data = data[5 + size :]
    return found


def test_a_client_that_speaks_http2_alone(caller: Caller, hub: FakeHub) -> None:
    """Without any library of gRPC."""
    with Http2(caller.serving.url, reads=True) as client:

        def call(method: str, request: Any) -> list[bytes]:
            stream = client.call(MODEL.path(method), request.SerializeToString())
            assert eventually(lambda: client.runs(0.05) and stream in client.ended)
            return messages_of(bytes(client.data[stream]))

        updates = call("EnsureModelDownloaded", model_pb2.ModelDownloadRequest(model_name="org/model"))
        assert model_pb2.MODEL_STATUS_DOWNLOADED == model_pb2.ModelStatusUpdate.FromString(updates[-1]).status
        chunks = call("StreamModelFiles", model_pb2.ModelFilesRequest(model_name="org/model"))
    commit = hub.repositories["org/model"].branches["main"]
    assert_framed([model_pb2.FileChunk.FromString(chunk) for chunk in chunks], files_of(hub), commit)


def peak_bytes(serving: Serving) -> int:
    """The most memory that a server has had."""
    process = Path(f"/proc/{serving.process.pid}/status")
    [line] = [line for line in process.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def test_clients_that_stop_reading_hold_little(start: Callable[..., Serving], hub: FakeHub, tmp_path: Path) -> None:
    """Sixty-four of them, of both services, who ask for chunks of 4 GiB; others are answered meanwhile."""
    serving = start("--cache-dir", str(tmp_path / "cache"), MX_CACHE_MIN_FREE_BYTES="1", **hub.environ())
    caller = Caller(serving)
    caller.ensure("org/model")
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(Http2(serving.url)) for _ in range(64)]
        request = model_pb2.ModelFilesRequest(model_name="org/model", chunk_size=2**32 - 1)
        for client in clients:
            client.call(MODEL.path("StreamModelFiles"), request.SerializeToString())
        run_all(clients, 2.0)
        assert all(client.received_bytes for client in clients)

        assert caller.stream("org/model")[-1].is_last_file
        assert peak_bytes(serving) < 300 << 20
    caller.channel.close()
