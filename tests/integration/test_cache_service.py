"""The services of the model cache, as a server offers them, called with the messages of the protocol."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from awscrt import checksums

from devtools.fake_hub import FakeHub, HubAnswer, HubRequest
from devtools.models import generate_sharded
from modelexpress_core.bulk.reading import BulkOffer, BulkRead, BulkReader
from modelexpress_core.bulk.requests import Run, target_of
from modelexpress_core.checkpoint.manifest import TABLES, Manifest
from modelexpress_core.errors import BackendError
from modelexpress_core.storage.http.requests import Origin
from modelexpress_core.wire.frames import opened
from modelexpress_core.wire.proto.modelexpress import cache_pb2
from modelexpress_core.wire.rpc import CACHE, MESSAGE_OPTIONS, stub
from tests.support.http2 import Http2, run_all
from tests.support.serving import Serving
from tests.support.waiting import eventually

_SECONDS = 60.0
_Code = grpc.StatusCode


class Caller:
    """Calls the cache of a server."""

    def __init__(self, serving: Serving, token: str = "") -> None:
        self.serving = serving
        self.channel = grpc.insecure_channel(serving.url, options=MESSAGE_OPTIONS)
        self._calls = stub(CACHE, self.channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def __call__(self, method: str, request: Any) -> Any:
        return self._calls[method](request, metadata=self._metadata, timeout=_SECONDS)

    def complete(self, place: str, **options: Any) -> cache_pb2.OpenModelResponse:
        """The first answer, with what the last one adds."""
        answers = [*self("OpenModel", cache_pb2.OpenModelRequest(place=place, **options))]
        assert [False] * (len(answers) - 1) + [True] == [answer.complete for answer in answers]
        first: cache_pb2.OpenModelResponse = answers[0]
        first.MergeFrom(answers[-1] if len(answers) > 1 else cache_pb2.OpenModelResponse())
        return first

    def read(self, model: cache_pb2.ModelVersion, path: str, *runs: Run, with_checksums: bool = True) -> list[bytes]:
        ranges = [cache_pb2.FileRange(offset=r.offset, length=r.length, stride=r.stride, count=r.count) for r in runs]
        request = cache_pb2.ReadFileRequest(model=model, path=path, ranges=ranges, checksums=with_checksums)
        found = [b""] * len(runs)
        for frame in self("ReadFile", request):
            position, content = opened(frame, checksum=with_checksums)
            found[position] += bytes(content)
        return found

    @contextlib.contextmanager
    def bulk(self, model: cache_pb2.ModelVersion) -> Iterator[BulkReader]:
        offer = self("OpenBulk", cache_pb2.OpenBulkRequest(model=model))
        assert offer.valid_for_seconds > 60
        origin = Origin("127.0.0.1", offer.port, tls=False)
        reader = BulkReader(
            BulkOffer(origin, offer.ticket, offer.content), connect_timeout_seconds=10, patience_seconds=30
        )
        with contextlib.closing(reader):
            yield reader


def version_of(answer: cache_pb2.OpenModelResponse) -> cache_pb2.ModelVersion:
    return cache_pb2.ModelVersion(place=answer.place, version=answer.version)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint."""
    directory = generate_sharded(tmp_path_factory.mktemp("source") / "model", shards=2, layers=2, hidden=512)
    (directory / "config.json").write_text('{"hidden": 512}')
    (directory / "empty.txt").write_text("")
    return directory


@pytest.fixture
def serve(start: Callable[..., Serving], tmp_path: Path) -> Iterator[Callable[..., Caller]]:
    """Starts a server with a cache, and calls it."""
    with contextlib.ExitStack() as closing:

        def serve(*, token: str = "", **environ: str) -> Caller:
            environ = {"MX_CACHE_SOURCES": "hf,file", "MX_CACHE_MIN_FREE_BYTES": "1", **environ}
            caller = Caller(start("--cache-dir", str(tmp_path / "cache"), **environ), token)
            closing.callback(caller.channel.close)
            return caller

        yield serve


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def value_of(metric: str, metrics: str) -> float:
    return next(float(line.split(" ")[-1]) for line in metrics.splitlines() if line.startswith(metric))


def status_of(raised: pytest.ExceptionInfo[grpc.RpcError]) -> tuple[grpc.StatusCode, str]:
    error: Any = raised.value
    return error.code(), error.details()


# -- reading -----------------------------------------------------------------------------------------------------------


def test_files_come_over_both_channels(serve: Callable[..., Caller], model: Path) -> None:
    """Whole, in ranges and in pieces that the server gathers; the metrics count them."""
    caller = serve()
    answer = caller.complete(f"file{model}")
    version = version_of(answer)
    files = files_of(model)

    assert {path: len(content) for path, content in files.items()} == {each.path: each.size for each in answer.files}
    assert sum(map(len, files.values())) == answer.size_bytes == answer.present_bytes
    assert answer.manifest_digest
    assert answer.directory
    (name, content) = max(files.items(), key=lambda each: len(each[1]))
    runs = [Run(name, 0, len(content)), Run(name, 5, 1), Run(name, 3, 100, 1000, 900), Run(name, 0, 50_000, 60_000, 9)]
    expected = [
        b"".join(content[at : at + run.length] for at in range(run.offset, run.end, run.stride or len(content)))
        for run in runs
    ]
    for with_checksums in (True, False):
        assert expected == caller.read(version, name, *runs, with_checksums=with_checksums)
    with caller.bulk(version) as bulk:
        for path, whole in files.items():
            if whole:
                destination = memoryview(bytearray(len(whole)))
                assert [0] == list(bulk.read([BulkRead(Run(path, 0, len(whole)), destination)]))
                assert whole == destination
        destinations = [memoryview(bytearray(run.nbytes)) for run in runs]
        reads = [BulkRead(run, destination) for run, destination in zip(runs, destinations, strict=True)]
        assert len(runs) == len(list(bulk.read(reads, checksums=True)))
        assert expected == [bytes(each) for each in destinations]

    sent = sum(map(len, expected))
    metrics = caller.serving.metrics()
    sent_bytes = 'mx_cache_sent_bytes_total{channel="%s"}'
    assert 2 * sent == value_of(sent_bytes % "grpc", metrics)
    assert eventually(lambda: answer.size_bytes + sent == value_of(sent_bytes % "bulk", caller.serving.metrics()))
    for line in ("mx_cache_misses_total 1.0", "mx_cache_models 1.0", "mx_cache_downloads 0.0"):
        assert line in metrics.splitlines()
    stats = caller("GetCacheStats", cache_pb2.GetCacheStatsRequest())
    assert (1, 1, answer.size_bytes) == (stats.models, stats.misses, stats.origin_bytes)


def test_a_long_list_of_files_has_pages(serve: Callable[..., Caller], tmp_path: Path) -> None:
    """The first is in the answer to OpenModel."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3000):
        (source / f"{number:05}-{'x' * 200}.txt").write_text(str(number))
    caller = serve()
    answer = caller.complete(f"file{source}")
    files, token = list(answer.files), answer.next_page_token
    pages = 1
    while token:
        page = caller("ListFiles", cache_pb2.ListFilesRequest(model=version_of(answer), page_token=token))
        files += page.files
        token = page.next_page_token
        pages += 1

    assert pages > 1
    assert sorted(path.name for path in source.iterdir()) == [file.path for file in files]
    with pytest.raises(grpc.RpcError) as raised:
        caller("ListFiles", cache_pb2.ListFilesRequest(model=version_of(answer), page_token="x"))
    assert _Code.INVALID_ARGUMENT == status_of(raised)[0]


def test_bytes_are_read_while_they_arrive(serve: Callable[..., Caller]) -> None:
    """Over both channels: what is there comes at once, and the rest when it is there."""
    content = os.urandom(24 << 20)
    release = threading.Event()

    def hold(request: HubRequest) -> HubAnswer | None:
        ends = re.search(r"bytes=\d+-(\d+)", request.headers.get("range", ""))
        if ends and int(ends[1]) > len(content) // 2:
            release.wait(_SECONDS)
        return None

    with FakeHub() as hub:
        hub.put("org/model", "model.safetensors", content)
        hub.before = hold
        caller = serve(**hub.environ())
        answers = caller("OpenModel", cache_pb2.OpenModelRequest(place="org/model"))
        first = next(answers)
        assert not first.complete
        assert "org/model" == first.place
        assert 40 == len(first.version)
        version = version_of(first)
        assert [content[: 4 << 20]] == caller.read(version, "model.safetensors", Run("", 0, 4 << 20))

        whole = Run("model.safetensors", 0, len(content))
        destination = memoryview(bytearray(len(content)))
        landed: list[int] = []
        found: list[Any] = []
        with caller.bulk(version) as bulk:
            reading = threading.Thread(
                target=lambda: found.extend(bulk.read([BulkRead(whole, destination, landed.append)]))
            )
            framing = threading.Thread(target=lambda: found.extend(caller.read(version, "model.safetensors", whole)))
            reading.start()
            framing.start()
            assert eventually(lambda: landed and landed[-1] >= 4 << 20)
            assert not found
            release.set()
            reading.join(_SECONDS)
            framing.join(_SECONDS)

        assert sorted([0, content], key=str) == sorted(found, key=str)
        assert content == destination
        *_, last = answers
        assert last.complete
        assert len(content) == last.present_bytes


def test_what_does_not_come_says_how_much_is_there(serve: Callable[..., Caller]) -> None:
    """The table of digests of a version that is still arriving: at once; its bytes: after a while."""
    release = threading.Event()

    def hold(request: HubRequest) -> HubAnswer | None:
        if request.server == "cdn":
            release.wait(_SECONDS)
        return None

    with FakeHub() as hub:
        hub.put("org/model", "model.safetensors", os.urandom(1 << 20))
        hub.before = hold
        caller = serve(**hub.environ())
        first = next(caller("OpenModel", cache_pb2.OpenModelRequest(place="org/model")))
        with pytest.raises(grpc.RpcError) as raised:
            caller("ReadManifest", cache_pb2.ReadManifestRequest(model=version_of(first), table="index", length=100))
        release.set()
    error: Any = raised.value
    assert _Code.UNAVAILABLE == error.code()
    assert "not there yet: 0 of 1048576 bytes of org/model" in error.details()
    assert ("mx-present-bytes", "0") in error.trailing_metadata()


def test_a_reader_goes_on_at_a_restarted_server(serve: Callable[..., Caller], model: Path) -> None:
    """With the version that it has; a version that is gone is named in the error."""
    caller = serve()
    version = version_of(caller.complete(f"file{model}"))
    caller.serving.end()
    again = serve()
    content = (model / "config.json").read_bytes()

    assert [content] == again.read(version, "config.json", Run("", 0, len(content)))
    other = cache_pb2.ModelVersion(place=version.place, version="0" * 64)
    with pytest.raises(grpc.RpcError) as raised:
        again.read(other, "config.json", Run("", 0, 1))
    code, details = status_of(raised)
    assert _Code.FAILED_PRECONDITION == code
    assert "000000000000 of file/" in details


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_parts_are_compared_with_the_manifest(serve: Callable[..., Caller], model: Path, tmp_path: Path) -> None:
    """What a reader got, and the chunks around it in the cache's own file."""
    caller = serve()
    answer = caller.complete(f"file{model}")
    version = version_of(answer)
    text = caller("ReadManifest", cache_pb2.ReadManifestRequest(model=version, table="index", length=4 << 20)).data
    manifest = Manifest.parse(text)
    assert answer.manifest_digest == manifest.digest
    for table, width in TABLES.items():
        request = cache_pb2.ReadManifestRequest(model=version, table=table, offset=width, length=4 << 20)
        assert (manifest.rows - 1) * width == len(caller("ReadManifest", request).data)
    name, content = max(files_of(model).items(), key=lambda each: len(each[1]))

    def part(run: Run, flipped: int = 0) -> cache_pb2.FilePart:
        starts = range(run.offset, run.end, run.stride or len(content))
        found = b"".join(content[at : at + run.length] for at in starts)
        crc = checksums.crc64nvme(found, 0) ^ flipped
        return cache_pb2.FilePart(
            path=name, offset=run.offset, length=run.length, stride=run.stride, count=run.count, crc64nvme=crc
        )

    def compared(*parts: cache_pb2.FilePart) -> tuple[list[int], list[int]]:
        found = caller("CompareParts", cache_pb2.ComparePartsRequest(model=version, parts=parts))
        return list(found.different), list(found.damaged)

    plain, pieces = Run(name, len(content) - 99, 99), Run(name, 4096, 64, 1024, 500)
    assert ([], []) == compared(part(plain), part(pieces))
    assert ([1, 2], []) == compared(part(plain), part(plain, 1), part(pieces, 1 << 63))

    blobs = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.read_bytes() == content]
    [blob] = {path.stat().st_ino: path for path in blobs}.values()
    before = blob.stat()
    with blob.open("r+b") as file:
        file.seek(len(content) - 50)
        file.write(bytes([content[-50] ^ 1]))
    os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk does it, which changes no time
    assert ([0], [0]) == compared(part(plain))
    assert "mx_cache_damaged_chunks_total 1.0" in caller.serving.metrics().splitlines()
    *_, validated = caller("ValidateModel", cache_pb2.ValidateModelRequest(model=version))
    assert ([name], True) == ([each.path for each in validated.damaged], validated.done)
    assert caller.complete(f"file{model}").complete


# -- managing ----------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_removed(serve: Callable[..., Caller], model: Path) -> None:
    """Removed only where the operator allows that."""
    caller = serve(MX_CACHE_DELETE="1")
    answer = caller.complete(f"file{model}")
    [listed] = caller("ListModels", cache_pb2.ListModelsRequest()).models
    assert (f"file{model}", answer.version, True, answer.size_bytes) == (
        listed.place,
        listed.version,
        listed.complete,
        listed.present_bytes,
    )
    assert listed.in_use

    removed = caller("RemoveModel", cache_pb2.RemoveModelRequest(model=cache_pb2.ModelVersion(place=answer.place)))
    assert (1, answer.size_bytes) == (removed.removed, removed.freed_bytes)
    assert not caller("ListModels", cache_pb2.ListModelsRequest()).models
    with pytest.raises(grpc.RpcError) as raised:
        caller("RemoveModel", cache_pb2.RemoveModelRequest(model=version_of(answer)))
    assert _Code.NOT_FOUND == status_of(raised)[0]


# -- refusals ----------------------------------------------------------------------------------------------------------


_READ = cache_pb2.ReadFileRequest


@pytest.mark.parametrize(
    ("method", "request_", "code", "words"),
    [
        ("OpenModel", {"place": "../etc"}, _Code.INVALID_ARGUMENT, "names no model"),
        ("OpenModel", {"place": "/org/na\nme"}, _Code.INVALID_ARGUMENT, "names no model"),
        ("OpenModel", {"place": "org/" + "x" * 4096}, _Code.INVALID_ARGUMENT, "names no model"),
        ("OpenModel", {"place": ""}, _Code.INVALID_ARGUMENT, "names no model"),
        ("OpenModel", {"place": "s3/bucket/model"}, _Code.PERMISSION_DENIED, "MX_CACHE_SOURCES"),
        ("OpenModel", {"place": "file/no/such/directory"}, _Code.NOT_FOUND, "/no/such/directory"),
        ("ListFiles", {"model": {"place": "MODEL"}}, _Code.INVALID_ARGUMENT, "names no version"),
        ("ReadFile", {"path": "none"}, _Code.NOT_FOUND, "has no file 'none'"),
        ("ReadFile", {"path": "../config.json"}, _Code.NOT_FOUND, "has no file"),
        ("ReadFile", {"path": "config.json", "ranges": [{"offset": 10, "length": 9}]}, _Code.OUT_OF_RANGE, "bytes 10"),
        ("ReadFile", {"path": "config.json", "ranges": [{"length": 0}]}, _Code.OUT_OF_RANGE, "there are no bytes"),
        (
            "ReadFile",
            {"path": "config.json", "ranges": [{"length": 1, "stride": 0, "count": 9}]},
            _Code.OUT_OF_RANGE,
            "there are no bytes",
        ),
        (
            "ReadFile",
            {"path": "config.json", "ranges": [{"length": 2**64 - 1, "stride": 2**64 - 1, "count": 2**64 - 1}]},
            _Code.OUT_OF_RANGE,
            "there are no bytes",
        ),
        ("ReadFile", {"path": "config.json", "ranges": [{"length": 1}] * 1025}, _Code.INVALID_ARGUMENT, "1025 ranges"),
        ("ReadManifest", {"table": "../lock"}, _Code.INVALID_ARGUMENT, "tables"),
        ("ReadManifest", {"table": "index", "length": 1 << 40}, _Code.INVALID_ARGUMENT, "at once"),
        ("CompareParts", {"parts": [{"path": "config.json"}] * 4097}, _Code.INVALID_ARGUMENT, "4097 parts"),
        ("CompareParts", {"parts": [{"path": "config.json", "length": 99}]}, _Code.OUT_OF_RANGE, "there are no"),
        ("RemoveModel", {}, _Code.PERMISSION_DENIED, "MX_CACHE_DELETE"),
    ],
)
def test_what_makes_no_sense_is_refused(
    answering: tuple[Caller, cache_pb2.ModelVersion],
    method: str,
    request_: Mapping[str, Any],
    code: grpc.StatusCode,
    words: str,
) -> None:
    """With the status and the reason."""
    caller, version = answering
    fields = dict(request_)
    kind: Any = CACHE.methods[method].request
    if "model" in fields:
        fields["model"] = {"place": version.place}
    elif method != "OpenModel":
        fields["model"] = version
    with pytest.raises(grpc.RpcError) as raised:
        answer = caller(method, kind(**fields))
        if CACHE.methods[method].response_streaming:
            list(answer)
    found, details = status_of(raised)
    assert (code, True) == (found, words in details), details


@pytest.fixture(scope="module")
def answering(
    server_commands: Any, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Caller, cache_pb2.ModelVersion]]:
    """A server with the model."""
    directory = str(tmp_path_factory.mktemp("cache"))
    serving = Serving(
        server_commands, "--cache-dir", directory, MX_CACHE_SOURCES="hf,file", MX_CACHE_MIN_FREE_BYTES="1"
    )
    caller = Caller(serving)
    yield caller, version_of(caller.complete(f"file{model}"))
    caller.channel.close()
    serving.end()


def test_a_server_without_a_cache(start: Callable[..., Serving]) -> None:
    """Each method says how to start one."""
    caller = Caller(start())
    for method, kind in CACHE.methods.items():
        with pytest.raises(grpc.RpcError) as raised:
            answer = caller(method, kind.request())
            if kind.response_streaming:
                list(answer)
        expected = _Code.FAILED_PRECONDITION, "this server has no cache: start it with --cache-dir"
        assert expected == status_of(raised), method
    caller.channel.close()


def test_rights(serve: Callable[..., Caller], model: Path, tmp_path: Path) -> None:
    """To read, to download and to remove: each by name and model."""
    tokens = {name: f"{name}-token-0123456789" for name in ("reader", "filler", "stranger")}
    (tmp_path / "tokens").write_text("".join(f"{name}:{token}\n" for name, token in tokens.items()))
    rules = [
        {"names": ["reader", "filler"], "models": ["file/*"], "allow": ["read"]},
        {"names": ["filler"], "models": ["file/*/model"], "allow": ["ensure", "delete"]},
    ]
    filler = serve(
        token=tokens["filler"],
        MX_AUTH_MODE="token",
        MX_AUTH_TOKENS_PATH=str(tmp_path / "tokens"),
        MX_AUTH_RIGHTS=json.dumps(rules),
        MX_CACHE_DELETE="1",
    )
    reader, stranger = (Caller(filler.serving, tokens[name]) for name in ("reader", "stranger"))
    place = f"file{model}"

    for caller, right in ((reader, "ensure"), (stranger, "read")):
        with pytest.raises(grpc.RpcError) as raised:
            caller.complete(place)
        assert (_Code.PERMISSION_DENIED, True) == (status_of(raised)[0], f"may not {right}" in status_of(raised)[1])
    version = version_of(filler.complete(place))
    assert version == version_of(reader.complete(place))
    assert reader.read(version, "config.json", Run("", 0, 2))
    with reader.bulk(version) as bulk:
        bulk.check()
    assert len(reader("ListModels", cache_pb2.ListModelsRequest()).models) == 1
    assert not stranger("ListModels", cache_pb2.ListModelsRequest()).models
    for method, kind in CACHE.methods.items():
        if method in {"ListModels", "GetCacheStats", "OpenModel"}:
            continue
        with pytest.raises(grpc.RpcError) as raised:
            request: Any = kind.request
            answer = stranger(method, request(model=version))
            if kind.response_streaming:
                list(answer)
        assert _Code.PERMISSION_DENIED == status_of(raised)[0], method
    with pytest.raises(grpc.RpcError) as raised:
        reader("RemoveModel", cache_pb2.RemoveModelRequest(model=version))
    assert "may not delete" in status_of(raised)[1]
    assert 1 == filler("RemoveModel", cache_pb2.RemoveModelRequest(model=version)).removed
    for caller in (reader, stranger):
        caller.channel.close()


@pytest.mark.parametrize("kind", ["gated", "private", "open"])
def test_a_model_that_the_server_alone_may_read(serve: Callable[..., Caller], tmp_path: Path, kind: str) -> None:
    """Where callers have names, a rule has to say who gets it; without names, whoever reaches the server."""
    (tmp_path / "tokens").write_text("reader:reader-token-0123456789\nother:other-token-01234567890\n")
    auth = {"MX_AUTH_MODE": "token", "MX_AUTH_TOKENS_PATH": str(tmp_path / "tokens")}
    rule = [{"names": ["reader"], "models": ["org/*"], "allow": ["read", "ensure"]}]
    with FakeHub() as hub:
        hub.put("org/model", "config.json", b"{}")
        repository = hub.repositories["org/model"]
        repository.gated, repository.private = kind == "gated", kind == "private"
        repository.readers.add("hf_servers")
        hub.tokens.add("hf_servers")
        environ = {**hub.environ(), "HF_TOKEN": "hf_servers"}

        caller = serve(token="reader-token-0123456789", **auth, **environ)
        if kind == "open":
            assert caller.complete("org/model").complete
            return
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as raised:
                caller.complete("org/model")
            assert (_Code.PERMISSION_DENIED, True) == (status_of(raised)[0], "MX_AUTH_RIGHTS" in status_of(raised)[1])
        assert not caller("ListModels", cache_pb2.ListModelsRequest()).models
        caller.serving.end()

        caller = serve(token="reader-token-0123456789", **auth, **environ, MX_AUTH_RIGHTS=json.dumps(rule))
        version = version_of(caller.complete("org/model"))
        other = Caller(caller.serving, "other-token-01234567890")
        with pytest.raises(grpc.RpcError) as raised:
            other.read(version, "config.json", Run("", 0, 2))
        assert _Code.PERMISSION_DENIED == status_of(raised)[0]
        other.channel.close()
        caller.serving.end()

        assert [b"{}"] == serve(**environ).read(version, "config.json", Run("", 0, 2))


def test_what_a_caller_may_have_downloaded(serve: Callable[..., Caller], tmp_path: Path) -> None:
    """Is limited for each name; what others had downloaded is free, and what was removed does not count."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.bin").write_bytes(os.urandom(600_000))
    tokens = {name: f"{name}-token-0123456789" for name in ("first", "second")}
    (tmp_path / "tokens").write_text("".join(f"{name}:{token}\n" for name, token in tokens.items()))
    environ = {
        "MX_AUTH_MODE": "token",
        "MX_AUTH_TOKENS_PATH": str(tmp_path / "tokens"),
        "MX_CACHE_MAX_CALLER_BYTES": "1000000",
        "MX_CACHE_DELETE": "1",
    }
    places = [f"file{tmp_path}/{name}" for name in ("one", "two")]
    first = serve(token=tokens["first"], **environ)
    one = version_of(first.complete(places[0]))
    first.serving.end()  # the limit counts what is in the cache, whenever it was downloaded
    first = serve(token=tokens["first"], **environ)
    second = Caller(first.serving, tokens["second"])

    with pytest.raises(grpc.RpcError) as raised:
        first.complete(places[1])
    assert (_Code.PERMISSION_DENIED, True) == (status_of(raised)[0], "'first' would have" in status_of(raised)[1])
    second.complete(places[1])
    assert first.complete(places[1]).complete
    first("RemoveModel", cache_pb2.RemoveModelRequest(model=one))
    second("RemoveModel", cache_pb2.RemoveModelRequest(model=cache_pb2.ModelVersion(place=places[1])))
    assert first.complete(places[1]).complete
    second.channel.close()


def test_a_ticket_ends_with_its_version(serve: Callable[..., Caller], model: Path) -> None:
    """What was removed is not sent any more."""
    caller = serve(MX_CACHE_DELETE="1")
    version = version_of(caller.complete(f"file{model}"))
    with caller.bulk(version) as bulk:
        bulk.check()
        caller("RemoveModel", cache_pb2.RemoveModelRequest(model=version))
        reads = [BulkRead(Run("config.json", 0, 2), memoryview(bytearray(2)))]

        def is_refused() -> bool:
            try:
                return not list(bulk.read(reads))
            except BackendError as exc:
                return "HTTP 401" in str(exc)

        assert eventually(is_refused)


def test_without_the_bulk_channel(serve: Callable[..., Caller], model: Path) -> None:
    """The server says so, and frames carry everything."""
    caller = serve(MX_SERVER_BULK_PORT="0")
    version = version_of(caller.complete(f"file{model}"))

    with pytest.raises(grpc.RpcError) as raised:
        caller("OpenBulk", cache_pb2.OpenBulkRequest(model=version))
    assert (_Code.UNIMPLEMENTED, "the server offers no bulk channel") == status_of(raised)
    assert caller.read(version, "config.json", Run("", 0, 2))


# -- what callers can use up -------------------------------------------------------------------------------------------


def peak_bytes(serving: Serving) -> int:
    """The most memory that a server has had."""
    process = Path(f"/proc/{serving.process.pid}/status")
    [line] = [line for line in process.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


@pytest.mark.timeout(300)
def test_idle_clients_cost_little(serve: Callable[..., Caller], model: Path) -> None:
    """Two thousand over gRPC, and seven hundred with tickets of the bulk channel; another one is answered at once."""
    caller = serve()
    version = version_of(caller.complete(f"file{model}"))
    offer = caller("OpenBulk", cache_pb2.OpenBulkRequest(model=version))
    path = target_of(offer.content, "config.json")
    request = f"HEAD {path} HTTP/1.1\r\nAuthorization: Bearer {offer.ticket}\r\n\r\n".encode()
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(Http2(caller.serving.url)) for _ in range(2000)]
        run_all(clients, 1.0)
        for _ in range(700):
            sock = opened.enter_context(socket.create_connection(("127.0.0.1", offer.port), _SECONDS))
            sock.sendall(request)
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")

        with caller.bulk(version) as bulk:
            bulk.check()
        assert caller.read(version, "config.json", Run("", 0, 2))
        assert peak_bytes(caller.serving) < 300 << 20


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pieces", [False, True])
def test_readers_of_the_bulk_channel_that_stop_reading(serve: Callable[..., Caller], model: Path, pieces: bool) -> None:
    """Three hundred connections of one reader, with ranges and with pieces that are gathered in memory."""
    caller = serve()
    version = version_of(caller.complete(f"file{model}"))
    offer = caller("OpenBulk", cache_pb2.OpenBulkRequest(model=version))
    name, content = max(files_of(model).items(), key=lambda each: len(each[1]))
    run = [name, 0, 128, 256, len(content) // 256] if pieces else [name, 0, len(content)]
    body = json.dumps({"runs": [run] * 20, "checksums": True}).encode()
    head = f"POST {target_of(offer.content)} HTTP/1.1\r\nAuthorization: Bearer {offer.ticket}\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with contextlib.ExitStack() as opened:
        for _ in range(300):
            sock = opened.enter_context(socket.create_connection(("127.0.0.1", offer.port), _SECONDS))
            sock.sendall(request)
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")

        with caller.bulk(version) as bulk:
            destination = memoryview(bytearray(len(content)))
            assert [0] == list(bulk.read([BulkRead(Run(name, 0, len(content)), destination)]))
            assert content == destination
        assert peak_bytes(caller.serving) < 300 << 20
