"""Whole loads with the engine: bytes, versions, digests, and what is said when they fail."""

from __future__ import annotations

import contextlib
import json
import os
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import modelexpress_core as mx
from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.cli.app import build_app
from modelexpress_core.contracts.storage import Endpoint, ReadRequest
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    InvalidURIError,
    NotFoundError,
    SettingsError,
    SourceChangedError,
    UnavailableError,
)
from mx_streamer.settings import StreamerSettings, check_azure, check_gcs, engine_endpoint
from tests.support.http_servers import answering, server_context
from tests.support.network import CLOSED_PORT

_SERVER = "CLOUD_STORAGE_EMULATOR_ENDPOINT"

STATE = {
    "embed": torch.arange(1_500_000, dtype=torch.float32).view(1500, 1000),
    "norm": torch.arange(1000, dtype=torch.bfloat16),
    "scale": torch.tensor(3.5, dtype=torch.float64),
    "head": torch.arange(700_001, dtype=torch.int16),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two shards."""
    directory = tmp_path_factory.mktemp("checkpoint")
    names = list(STATE)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, held in shards.items():
        save_file({name: STATE[name] for name in held}, directory / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(scope="module")
def uploaded(files: Path, s3_server: SeaweedFS) -> str:
    return s3_server.upload(files, "models", "streamed", checksum="CRC64NVME")


@pytest.fixture
def use_s3(s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the environment of the process for the server."""

    def use_s3(user: str = "admin", **variables: str) -> None:
        for name, value in {**s3_server.environ(user), "MX_PREFER": "s3=mx-streamer", **variables}.items():
            monkeypatch.setenv(name, value)

    return use_s3


def loaded(uri: str, **environ: str) -> mx.LoadReport:
    """The report of a load of everything, whose tensors are right."""
    target = {name: torch.empty_like(tensor) for name, tensor in STATE.items()}
    report = mx.load_into(target, uri, environ={**os.environ, **environ})
    assert all(torch.equal(tensor, target[name]) for name, tensor in STATE.items())
    assert "mx-streamer" == report.storage["plugin"]
    assert report.bytes_needed == report.bytes_fetched == sum(tensor.nbytes for tensor in STATE.values())
    return report


# -- what arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staging", ["0", "1"])
def test_files_arrive(files: Path, staging: str) -> None:
    """Straight into place and through staging buffers, with versions compared."""
    report = loaded(str(files), MX_PREFER="file=mx-streamer", MX_FORCE_STAGING=staging, MX_CHUNK_BYTES="1048576")

    assert 2 == report.verified["versions"]


@pytest.mark.parametrize("staging", ["0", "1"])
def test_objects_arrive_and_are_verified(uploaded: str, use_s3: Callable[..., None], staging: str) -> None:
    """As above, from S3, and the digests that it publishes are compared."""
    use_s3()

    report = loaded(uploaded, MX_FORCE_STAGING=staging, MX_CHUNK_BYTES="1048576")

    assert {"versions": 2, "sizes": 2, "digests": 2} == report.verified
    assert 0 == report.bytes_reread


def test_the_state_dict_is_that_of_the_regular_plugin(
    uploaded: str, use_s3: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte by byte, with the same names, shapes and dtypes."""
    use_s3()
    streamed = mx.load_state_dict(uploaded, environ={**os.environ})
    monkeypatch.delenv("MX_PREFER")
    regular = mx.load_state_dict(uploaded, environ={**os.environ})

    assert list(regular) == list(streamed)
    for name, tensor in regular.items():
        assert (tensor.dtype, tensor.shape) == (streamed[name].dtype, streamed[name].shape)
        assert torch.equal(tensor.flatten().view(torch.uint8), streamed[name].flatten().view(torch.uint8))


def test_the_command_loads(uploaded: str, use_s3: Callable[..., None]) -> None:
    """``mx load`` reports the plugin and every byte."""
    use_s3()

    done = CliRunner().invoke(build_app(), ["load", uploaded, "--json"])

    assert 0 == done.exit_code, done.output
    report = json.loads(done.stdout)
    assert ("mx-streamer", 2) == (report["storage"]["plugin"], report["verified"]["digests"])
    assert report["bytes_needed"] == report["bytes_fetched"]


def test_copies_of_files_are_complete(uploaded: str, files: Path, use_s3: Callable[..., None], tmp_path: Path) -> None:
    """``pull`` reads through the engine, too, and compares the digests."""
    use_s3()

    mx.pull(uploaded, tmp_path / "copy", environ={**os.environ})

    names = sorted(path.name for path in files.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "copy").iterdir() if not path.name.startswith("."))
    assert all((files / name).read_bytes() == (tmp_path / "copy" / name).read_bytes() for name in names)


def test_it_is_not_used_unless_it_is_preferred(files: Path) -> None:
    """Installed beside the regular plugins, it changes nothing."""
    target = {name: torch.empty_like(tensor) for name, tensor in STATE.items()}

    report = mx.load_into(target, str(files), environ={})

    assert "modelexpress-core" == report.storage["plugin"]


@pytest.fixture
def proxied(s3_server: SeaweedFS, use_s3: Callable[..., None]) -> Iterator[Callable[..., TcpProxy]]:
    """Puts a proxy before the server, which applies a fault to the first long read of the engine."""
    with contextlib.ExitStack() as stack:

        def proxied(fault: Fault) -> None:
            port = urlsplit(s3_server.endpoint).port
            assert port is not None
            faults = [fault]

            def policy(_number: int, head: bytes) -> Fault | None:
                found = re.search(rb"Range: bytes=(\d+)-(\d+)\r\n.*CRTS3NativeClient", head, re.DOTALL)
                of_engine = found is not None and int(found[2]) - int(found[1]) > 100_000
                return faults.pop() if of_engine and faults else None

            proxy = stack.enter_context(TcpProxy("127.0.0.1", port, policy))
            stack.callback(lambda: faults and pytest.fail("the engine sent nothing through the proxy"))
            use_s3(AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.port}")

        yield proxied


def test_damaged_bytes_are_found_and_read_again(uploaded: str, proxied: Callable[..., None]) -> None:
    """The engine notices no flipped byte; the digest does, and the regular plugin reads that part again."""
    proxied(Fault("flip", after_bytes=1000, of_body=True))

    report = loaded(uploaded, MX_CHUNK_BYTES="1048576")

    assert report.bytes_reread
    assert 2 == report.verified["digests"]


@pytest.mark.parametrize("kind", ["reset", "truncate", "unavailable"])
def test_a_connection_that_breaks_costs_no_load(uploaded: str, proxied: Callable[..., None], kind: Any) -> None:
    """The engine tries again, or core does."""
    proxied(Fault(kind, after_bytes=5000))

    loaded(uploaded, MX_CHUNK_BYTES="1048576")


# -- what is said ------------------------------------------------------------------------------------------------------


def failure(storage: Any, path: str, version: str | None = None, length: int = 10) -> BackendError:
    """The error of a batch of one request."""
    (completion,) = storage.read_batch([ReadRequest(path, 0, memoryview(bytearray(length)), version)])
    assert completion.error is not None
    assert f"read bytes 0-{length - 1}" == completion.error.operation
    return completion.error  # type: ignore[no-any-return]


def test_the_regular_plugin_explains_failures(
    on_s3: Callable[..., Any], put: Callable[..., str], s3_server: SeaweedFS
) -> None:
    """Its class, its cause and its next step, with the operation and the object of the engine's request."""
    etag = put("explained/object", bytes(100))
    put("explained/object", bytes(101))
    storage = on_s3()

    missing = failure(storage, "explained/none")
    changed = failure(storage, "explained/object", etag)
    short = failure(storage, "explained/object", None, 200)

    assert [NotFoundError, SourceChangedError, SourceChangedError] == [type(e) for e in (missing, changed, short)]
    assert "s3://models/explained/none" == missing.uri
    assert "it has 101 bytes" in str(short)
    assert all(error.hint for error in (missing, changed, short))


def test_a_file_that_was_replaced_is_not_read_under_its_old_version(opened: Callable[..., Any], tmp_path: Path) -> None:
    """Although the regular plugin has the old file open, and goes on reading it."""
    path = tmp_path / "object"
    path.write_bytes(bytes(100))
    storage = opened("file:///")
    version = storage.stat(str(path)).version
    storage.read_into(str(path), 0, memoryview(bytearray(8)), version=version)
    (tmp_path / "new").write_bytes(b"x" * 100)
    (tmp_path / "new").replace(path)

    assert isinstance(failure(storage, str(path), version), SourceChangedError)


def test_missing_rights_are_explained(on_s3: Callable[..., Any], put: Callable[..., str]) -> None:
    """Refused keys, which the engine calls a file access error."""
    put("explained/object", bytes(100))

    error = failure(on_s3(AWS_SECRET_ACCESS_KEY="not-the-secret"), "explained/object")

    assert isinstance(error, AccessDeniedError)
    assert not error.retryable
    assert "not-the-secret" not in str(error)


@pytest.mark.slow
def test_a_server_that_is_gone_is_explained(on_s3: Callable[..., Any]) -> None:
    """It may come back, so that core tries again."""
    error = failure(on_s3(AWS_ENDPOINT_URL=f"http://127.0.0.1:{CLOSED_PORT}"), "explained/object")

    assert isinstance(error, UnavailableError)
    assert error.retryable


def test_a_fault_of_the_engine_alone_says_how_to_see_its_log(
    on_s3: Callable[..., Any], put: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here its credentials became invalid after the regular plugin had read them."""
    put("explained/object", bytes(100))
    storage = on_s3()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")

    error = failure(storage, "explained/object")

    for part in ("'File access error'", "finds no fault", "RUNAI_STREAMER_LOG_TO_STDERR=1", "MX_PREFER"):
        assert part in str(error)
    assert error.retryable


def test_paths_that_the_engine_could_mistake_are_refused(on_s3: Callable[..., Any], opened: Callable[..., Any]) -> None:
    """An empty part, dots, a NUL character, bytes that are not UTF-8: another object could be read."""
    objects, files = on_s3(), opened("file:///")

    errors = [failure(objects, path) for path in ("a//b", "a/../b", "./a", "a/", "/a")]
    errors += [failure(files, path) for path in ("/tmp/a\0b", "/tmp/\udcff")]

    assert ["UnsupportedError"] * 7 == [type(error).__name__ for error in errors]


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "another-secret"}, ["AWS_SECRET_ACCESS_KEY"]),
        ({"AWS_ENDPOINT_URL": None, "AWS_ROLE_ARN": "x"}, ["AWS_ENDPOINT_URL", "AWS_ROLE_ARN"]),
        ({"RUNAI_STREAMER_S3_TIMEOUT": "5"}, ["RUNAI_STREAMER_S3_TIMEOUT"]),
    ],
)
def test_settings_that_the_engine_does_not_see_are_refused(
    uploaded: str, use_s3: Callable[..., None], changed: Mapping[str, str | None], named: list[str]
) -> None:
    """The message names the variables, and none of their values."""
    use_s3()
    environ = {name: value for name, value in {**os.environ, **changed}.items() if value is not None}

    with pytest.raises(SettingsError) as caught:
        mx.load_state_dict(uploaded, environ=environ)

    assert f"reads {', '.join(named)} from the environment" in str(caught.value)
    assert "secret" not in str(caught.value).lower().replace("aws_secret", "")


def test_the_engine_asks_the_server_of_the_regular_plugin(
    s3_server: SeaweedFS, uploaded: str, use_s3: Callable[..., None]
) -> None:
    """Also where the variable that it knows names another one."""
    use_s3(AWS_ENDPOINT_URL=f"http://127.0.0.1:{CLOSED_PORT}", AWS_ENDPOINT_URL_S3=s3_server.endpoint)

    loaded(uploaded)


def test_the_place_of_the_bucket_must_be_the_same(
    use_s3: Callable[..., None], uploaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the engine would ask another server; the message has the value to set."""
    use_s3()
    monkeypatch.delenv("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING")
    with pytest.raises(SettingsError, match="RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING=0"):
        mx.load_state_dict(uploaded, environ={**os.environ})

    use_s3(RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING="0", MX_S3_ADDRESSING_STYLE="virtual")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage.example")
    with pytest.raises(SettingsError, match="RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING=1"):
        mx.load_state_dict(uploaded, environ={**os.environ})


@pytest.mark.parametrize(
    ("endpoint", "virtual", "expected"),
    [
        (Endpoint("127.0.0.1", 8333), False, "http://127.0.0.1:8333"),
        (Endpoint("::1", 8333), False, "http://[::1]:8333"),
        (Endpoint("s3.example", 443, tls=True), False, "https://s3.example:443"),
        (Endpoint("models.s3.eu-west-1.amazonaws.com", 443, tls=True), True, "https://s3.eu-west-1.amazonaws.com:443"),
    ],
)
def test_the_engine_gets_the_endpoint_as_a_url(endpoint: Endpoint, virtual: bool, expected: str) -> None:
    """Without the bucket, which the engine adds."""
    assert expected == engine_endpoint(endpoint, "models", StreamerSettings(virtual_addressing=virtual))


_GOOGLE = Endpoint("storage.googleapis.com", 443, tls=True)
_EMULATOR = "http://127.0.0.1:4443"
_AZURE = Endpoint("myaccount.blob.core.windows.net", 443, tls=True)
_ACCOUNT = {"AZURE_STORAGE_ACCOUNT_NAME": "myaccount"}


@pytest.mark.parametrize(
    ("endpoint", "environ"),
    [
        (_GOOGLE, {}),
        (_GOOGLE, {"GOOGLE_APPLICATION_CREDENTIALS": "/key.json"}),
        (_GOOGLE, {"MX_GCS_ANONYMOUS": "1", "CLOUD_STORAGE_EMULATOR_ENDPOINT": "https://storage.googleapis.com"}),
        (Endpoint("127.0.0.1", 4443), {"STORAGE_EMULATOR_HOST": f"{_EMULATOR}/", _SERVER: f"{_EMULATOR}/"}),
        (Endpoint("::1", 4443), {_SERVER: "http://[::1]:4443"}),
    ],
)
def test_the_engine_may_ask_gcs(endpoint: Endpoint, environ: Mapping[str, str]) -> None:
    """The same server, and the same credentials or none."""
    check_gcs(endpoint, environ, environ=environ)


@pytest.mark.parametrize(
    ("endpoint", "environ", "says"),
    [
        (Endpoint("127.0.0.1", 4443), {}, f"{_SERVER}={_EMULATOR}"),
        (Endpoint("127.0.0.1", 4444), {_SERVER: _EMULATOR}, f"{_SERVER}=http://127.0.0.1:4444"),
        (_GOOGLE, {_SERVER: "http://storage.googleapis.com"}, f"{_SERVER}=https://storage.googleapis.com:443"),
        (_GOOGLE, {_SERVER: "http://user:hidden@127.0.0.1:4443"}, "would ask http://127.0.0.1:4443 for"),
        (_GOOGLE, {_SERVER: "127.0.0.1:4443"}, f"{_SERVER} makes no URL"),
        (_GOOGLE, {_SERVER: "https://storage.googleapis.com/path"}, f"{_SERVER} has a path"),
        (_GOOGLE, {"MX_GCS_ENDPOINT": "https://storage.googleapis.com/path"}, "MX_GCS_ENDPOINT has a path"),
        (_GOOGLE, {"MX_GCS_IMPERSONATE_SERVICE_ACCOUNT": "a@b.c"}, "MX_GCS_IMPERSONATE_SERVICE_ACCOUNT"),
        (_GOOGLE, {"MX_GCS_ANONYMOUS": "1", "MX_GCS_USER_PROJECT": "p"}, "MX_GCS_ANONYMOUS and MX_GCS_USER_PROJECT"),
    ],
)
def test_the_engine_must_not_ask_gcs(endpoint: Endpoint, environ: Mapping[str, str], says: str) -> None:
    """Another server, or with other credentials: the message says what to set, and no password."""
    with pytest.raises(SettingsError) as caught:
        check_gcs(endpoint, environ, environ=environ)

    assert says in str(caught.value)
    assert "MX_PREFER" in str(caught.value) or "makes no URL" in says
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "environ"),
    [
        (_AZURE, _ACCOUNT),
        (_AZURE, {**_ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": "a2V5"}),
        (
            Endpoint("myaccount.blob.core.chinacloudapi.cn", 443, tls=True),
            {**_ACCOUNT, "AZURE_STORAGE_ENDPOINT_SUFFIX": "blob.core.chinacloudapi.cn"},
        ),
    ],
)
def test_the_engine_may_ask_azure(endpoint: Endpoint, environ: Mapping[str, str]) -> None:
    """The same account, in the same cloud, with the same credentials."""
    check_azure(endpoint, environ, environ=environ)


@pytest.mark.parametrize(
    ("endpoint", "environ", "says"),
    [
        (_AZURE, {"AZURE_ACCOUNT_NAME": "myaccount"}, "set AZURE_STORAGE_ACCOUNT_NAME"),
        (_AZURE, {"AZURE_STORAGE_ACCOUNT_NAME": "another"}, "another.blob.core.windows.net"),
        (Endpoint("127.0.0.1", 10000), _ACCOUNT, "http://127.0.0.1:10000"),
        (_AZURE, {**_ACCOUNT, "AZURE_STORAGE_ENDPOINT_SUFFIX": "blob.example"}, "AZURE_STORAGE_ENDPOINT_SUFFIX"),
        (
            _AZURE,
            {**_ACCOUNT, "AZURE_STORAGE_ENDPOINT": "https://myaccount.blob.core.windows.net/path"},
            "AZURE_STORAGE_ENDPOINT has a path",
        ),
        (_AZURE, {**_ACCOUNT, "AZURE_ACCOUNT_KEY": "hidden"}, "AZURE_ACCOUNT_KEY"),
        (_AZURE, {**_ACCOUNT, "AZURE_STORAGE_CONNECTION_STRING": "hidden"}, "AZURE_STORAGE_CONNECTION_STRING"),
        (_AZURE, {**_ACCOUNT, "MX_AZURE_ANONYMOUS": "1"}, "MX_AZURE_ANONYMOUS"),
        (
            _AZURE,
            {**_ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": "hidden", "AZURE_STORAGE_SAS_TOKEN": "sig=hidden"},
            "unset one of them",
        ),
    ],
)
def test_the_engine_must_not_ask_azure(endpoint: Endpoint, environ: Mapping[str, str], says: str) -> None:
    """Another account or cloud, or with other credentials."""
    with pytest.raises(SettingsError) as caught:
        check_azure(endpoint, environ, environ=environ)

    assert says in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_public_buckets_need_no_keys(on_s3: Callable[..., Any], client: Any) -> None:
    """``MX_S3_ANONYMOUS`` without keys: the engine finds none, and does not sign either."""
    client.put_object(Bucket="public", Key="open/object", Body=b"content")
    nothing = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
    storage = on_s3("s3://public", MX_S3_ANONYMOUS="1", **nothing)
    memory = bytearray(7)

    (completion,) = storage.read_batch([ReadRequest("open/object", 0, memoryview(memory))])

    assert (None, b"content") == (completion.error, bytes(memory))


#: Reads one object with the engine, in a process of its own: the engine tries again for minutes, and cannot be stopped.
_READ = """
import sys, threading
from mx_streamer._engine import Engine, Extent

engine = Engine("runai_model_streamer_s3", sys.argv[1])
print(engine.read([Extent("s3://models/object", 0, memoryview(bytearray(10)))], threading.Event()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("trusted", [True, False])
def test_the_engine_verifies_certificates(tmp_path: Path, trusted: bool) -> None:
    """It sends its request, with the signature, to a server with a certificate of AWS_CA_BUNDLE, and to no other."""
    (tmp_path / "other").mkdir()
    context, authority = server_context(tmp_path, "localhost")
    _, other = server_context(tmp_path / "other", "localhost")
    refused = threading.Event()

    class Watched:
        def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
            try:
                return context.wrap_socket(*arguments, **options)
            except ssl.SSLError:
                refused.set()
                raise

    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "made up"}
    environ = {**os.environ, **keys, "AWS_CA_BUNDLE": authority if trusted else other}
    refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"

    with answering(refusal, context=cast("ssl.SSLContext", Watched())) as server:
        command = [sys.executable, "-c", _READ, f"https://localhost:{server.port}"]
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        try:
            if trusted:
                assert "['File access error']\n" == process.communicate(timeout=120)[0]
            else:
                assert refused.wait(60)
        finally:
            process.kill()
            process.communicate()

    assert trusted == bool(server.requests)


#: Reads from GCS as code does that uses the native library without this plugin, and then starts the engine for S3.
_BESIDE = """
import os, threading
from pathlib import Path
from modelexpress_core.errors import BackendError
from mx_streamer._engine import Engine, Extent

engine, closing = Engine(), threading.Event()
threading.Timer(60, closing.set).start()  # it is to find the first part long before
while "libstreamergcs.so" not in Path("/proc/self/maps").read_text() and not closing.is_set():
    again = threading.Event()
    threading.Timer(0.05, again.set).start()
    try:
        engine.read([Extent("gs://models/object", 0, memoryview(bytearray(10)))], again)
    except BackendError:
        pass
try:
    Engine("runai_model_streamer_s3")
except BackendError as exc:
    print(f"{type(exc).__name__}: {exc}", flush=True)
os._exit(0)  # the read goes on
"""


@pytest.mark.slow
def test_another_kind_of_store_that_other_code_has_read_is_found() -> None:
    """The library would look in GCS for the objects of S3."""
    environ = {**os.environ, _SERVER: f"http://127.0.0.1:{CLOSED_PORT}"}

    done = subprocess.run(
        [sys.executable, "-c", _BESIDE], env=environ, capture_output=True, text=True, check=False, timeout=120
    )

    assert done.stdout.startswith("UnsupportedError"), done.stdout + done.stderr
    assert "has used runai_model_streamer_gcs" in done.stdout


def test_parameters_of_uris_are_refused(uploaded: str, use_s3: Callable[..., None]) -> None:
    """The engine would not see them."""
    use_s3()

    with pytest.raises(InvalidURIError, match="AWS_REGION"):
        mx.load_state_dict(f"{uploaded}?region=eu-central-1", environ={**os.environ})
