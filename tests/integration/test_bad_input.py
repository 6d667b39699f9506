"""What a user gets to read when something is wrong with the input: every message scored by the same rules."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
import trustme
from attrs import field, frozen

from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import Fault, Policy, TcpProxy
from tests.support.signals import with_default_signals
from tests.support.waiting import eventually

INDEX = "model.safetensors.index.json"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@frozen
class Place:
    """Where the scenarios happen.

    Attributes:
        directory: Of this scenario alone.
        checkpoint: A copy of a checkpoint in three files with an index, in it.
        server: An S3 server that has the checkpoint, too.
        uri: Where.
        running: Servers that end with the scenario.
    """

    directory: Path
    checkpoint: Path
    server: SeaweedFS
    uri: str
    running: ExitStack

    def shard(self, number: int) -> Path:
        return self.checkpoint / f"model-{number:05}-of-00003.safetensors"


@frozen
class Failure:
    """A command that has to fail, and what its message has to name.

    Attributes:
        arguments: After ``mx``.
        names: Texts that the message holds: the object, what is wrong with it.
        environ: Variables.
        program: Python code that is run instead of ``mx``.
    """

    arguments: Sequence[str]
    names: Sequence[str]
    environ: Mapping[str, str] = field(factory=dict)
    program: str = ""


SCENARIOS: dict[str, Callable[[Place], Failure]] = {}


def scenario(make: Callable[[Place], Failure]) -> Callable[[Place], Failure]:
    SCENARIOS[make.__name__] = make
    return make


#: Root reads whatever it likes; not without these capabilities (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH).
_WITHOUT_ROOTS_RIGHTS = """
import ctypes, os, sys
for capability in (1, 2):
    ctypes.CDLL(None).prctl(24, capability)
os.execv(sys.executable, [sys.executable, "-m", "modelexpress_core", "load", {path!r}])
"""


# -- the storage ------------------------------------------------------------------------------------------------------


@scenario
def missing_bucket(place: Place) -> Failure:
    uri = "s3://no-such-bucket/model"
    return Failure(["load", uri], [uri, "404", "NoSuchBucket"], place.server.environ())


@scenario
def missing_key(place: Place) -> Failure:
    uri = "s3://models/no/such/model"
    return Failure(["load", uri], [uri, "nothing is there", "misspelt"], place.server.environ())


@scenario
def missing_file_in_a_bucket(place: Place) -> Failure:
    uri = "s3://models/no-such.safetensors"
    return Failure(["load", uri], [uri, "404"], place.server.environ())


@scenario
def missing_directory(place: Place) -> Failure:
    uri = f"{place.directory}/no-such-model"
    return Failure(["load", uri], [uri, "nothing is there"])


@scenario
def no_credentials(place: Place) -> Failure:
    environ = {"AWS_ENDPOINT_URL": place.server.endpoint, "AWS_REGION": "us-east-1"}
    return Failure(["load", place.uri], [place.uri, "no credentials were found", "AWS_ACCESS_KEY_ID"], environ)


@scenario
def wrong_secret(place: Place) -> Failure:
    environ = {**place.server.environ(), "AWS_SECRET_ACCESS_KEY": "swordfish-swordfish"}
    return Failure(["load", place.uri], [place.uri, "403", "SignatureDoesNotMatch", "AWS_ACCESS_KEY_ID"], environ)


@scenario
def no_permission(place: Place) -> Failure:
    names = [place.uri, "403", "AccessDenied", "s3:GetObject"]
    return Failure(["load", place.uri], names, place.server.environ("stranger"))


@scenario
def no_permission_to_read_a_file(place: Place) -> Failure:
    path = place.shard(2)
    path.chmod(0)
    return Failure(
        [], [str(path), "Permission denied", "ls -l"], program=_WITHOUT_ROOTS_RIGHTS.format(path=str(place.checkpoint))
    )


@scenario
def wrong_region(place: Place) -> Failure:
    endpoint = place.running.enter_context(server_in_another_region())
    environ = {**place.server.environ(), "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
    return Failure(["load", place.uri], [place.uri, "eu-central-1", "another region", "AWS_REGION"], environ)


@scenario
def wrong_endpoint(place: Place) -> Failure:
    environ = {**place.server.environ(), "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "MX_RETRY_ATTEMPTS": "2"}
    return Failure(["load", place.uri], [place.uri, "127.0.0.1:9", "refused", "AWS_ENDPOINT_URL"], environ)


@scenario
def endpoint_without_a_host(place: Place) -> Failure:
    environ = {**place.server.environ(), "AWS_ENDPOINT_URL": "http://s3.invalid"}
    return Failure(["load", place.uri], [place.uri, "s3.invalid", "does not resolve", "AWS_ENDPOINT_URL"], environ)


@scenario
def tls_to_a_server_without_it(place: Place) -> Failure:
    environ = {**place.server.environ(), "AWS_ENDPOINT_URL": place.server.endpoint.replace("http:", "https:")}
    return Failure(["load", place.uri], [place.uri, "no TLS connection", "AWS_ENDPOINT_URL"], environ)


@scenario
def tls_with_an_unknown_authority(place: Place) -> Failure:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    endpoint = place.running.enter_context(server_in_another_region(context))
    environ = {**place.server.environ(), "AWS_ENDPOINT_URL": endpoint}
    return Failure(["load", place.uri], [place.uri, "is not trusted", "AWS_CA_BUNDLE"], environ)


@scenario
def unknown_scheme(place: Place) -> Failure:
    return Failure(["load", "ftp://host/model"], ["ftp", "s3", "file"])


# -- the files --------------------------------------------------------------------------------------------------------


@scenario
def truncated_shard(place: Place) -> Failure:
    path = place.shard(2)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    return Failure(["load", str(place.checkpoint)], [str(place.checkpoint), path.name, "cut short"])


@scenario
def missing_shard(place: Place) -> Failure:
    place.shard(3).unlink()
    return Failure(["load", str(place.checkpoint)], [str(place.checkpoint), place.shard(3).name, "1 of 3"])


@scenario
def index_that_names_a_tensor_the_shard_lacks(place: Place) -> Failure:
    index = json.loads((place.checkpoint / INDEX).read_text())
    index["weight_map"]["model.of.nowhere"] = place.shard(1).name
    (place.checkpoint / INDEX).write_text(json.dumps(index))
    return Failure(["load", str(place.checkpoint)], [str(place.checkpoint), "model.of.nowhere", place.shard(1).name])


@scenario
def duplicate_tensors(place: Place) -> Failure:
    (place.checkpoint / INDEX).unlink()
    shutil.copy(place.shard(1), place.checkpoint / "copy.safetensors")
    names = [str(place.checkpoint), "copy.safetensors", place.shard(1).name, "model.embed_tokens.weight"]
    return Failure(["load", str(place.checkpoint)], names)


@scenario
def hostile_header(place: Place) -> Failure:
    with place.shard(1).open("r+b") as file:
        file.write((2**63 - 1).to_bytes(8, "little"))
    return Failure(
        ["load", str(place.checkpoint)], [str(place.checkpoint), place.shard(1).name, "no valid safetensors"]
    )


@scenario
def header_that_claims_bytes_behind_the_end(place: Place) -> Failure:
    content = place.shard(1).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    last = max((value for key, value in header.items() if key != "__metadata__"), key=lambda v: v["data_offsets"][1])
    last["shape"][0] *= 2
    start, end = last["data_offsets"]
    last["data_offsets"] = [start, end + end - start]
    text = json.dumps(header).encode()
    place.shard(1).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return Failure(["load", str(place.checkpoint)], [str(place.checkpoint), place.shard(1).name])


@scenario
def directory_without_weights(place: Place) -> Failure:
    for path in place.checkpoint.iterdir():
        path.unlink()
    (place.checkpoint / "pytorch_model.bin").write_bytes(b"x")
    return Failure(["load", str(place.checkpoint)], [str(place.checkpoint), "pytorch_model.bin", "safetensors"])


@scenario
def object_that_changes_during_the_load(place: Place) -> Failure:
    """Replaced after the headers were read; the client's proxy holds the reads up until then."""
    uri = place.server.upload(place.checkpoint, "models", place.directory.name)
    key = f"{place.directory.name}/{place.shard(2).name}"
    changed = False

    def policy(number: int, request: bytes) -> Fault | None:
        nonlocal changed
        header_read = b"bytes=0-" in request
        if not changed and b"range: bytes=" in request.lower() and not header_read and key.encode() in request:
            changed = True
            place.server.client().put_object(Bucket="models", Key=key, Body=place.shard(2).read_bytes() + b" ")
        return None

    environ = {**place.server.environ(), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxied(place, policy).port}"}
    return Failure(["load", uri], [uri, place.shard(2).name, "replaced the object since the load began"], environ)


# -- the destination --------------------------------------------------------------------------------------------------

_INTO = """
import sys, torch, modelexpress_core as mx
try:
    mx.load_into({target}, {uri!r}, strict=False)
except mx.ModelExpressError as exc:
    print(exc, file=sys.stderr)
    sys.exit(1)
"""


@scenario
def destination_of_another_shape(place: Place) -> Failure:
    target = "{'model.embed_tokens.weight': torch.empty(3, 4, dtype=torch.bfloat16)}"
    names = ["model.embed_tokens.weight", "[3, 4]", "[4096, 512]"]
    return Failure([], names, program=_INTO.format(target=target, uri=str(place.shard(1))))


@scenario
def destination_of_another_dtype(place: Place) -> Failure:
    target = "{'model.embed_tokens.weight': torch.empty(4096, 512, dtype=torch.float16)}"
    names = ["model.embed_tokens.weight", "torch.float16", "BF16", "cast=True"]
    return Failure([], names, program=_INTO.format(target=target, uri=str(place.shard(1))))


@scenario
def no_space_left(place: Place) -> Failure:
    """On a file system that is smaller than the checkpoint."""
    full = place.directory / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", full], check=False).returncode:
        pytest.skip("only root can mount a small file system")
    return Failure(["pull", str(place.checkpoint), str(full / "model")], [str(full), "space"])


@scenario
def destination_that_cannot_be_written(place: Place) -> Failure:
    path = place.directory / "file"
    path.write_text("in the way")
    return Failure(["pull", str(place.checkpoint), str(path)], [str(path)])


# -- how they are scored ----------------------------------------------------------------------------------------------


class _InAnotherRegion(BaseHTTPRequestHandler):
    """What S3 says where a bucket is in another region than it is asked in."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        body = (
            b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region 'us-east-1' is wrong; "
            b"expecting 'eu-central-1'</Message><Region>eu-central-1</Region></Error>"
        )
        self.send_response(400)
        self.send_header("x-amz-bucket-region", "eu-central-1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """Clients that do not like the certificate hang up."""


@contextmanager
def server_in_another_region(tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Its endpoint."""
    with _Server(("127.0.0.1", 0), _InAnotherRegion) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def proxied(place: Place, policy: Policy) -> TcpProxy:
    """A proxy before the server; which ends with the scenario."""
    address = urlsplit(place.server.endpoint)
    return place.running.enter_context(TcpProxy(str(address.hostname), int(address.port or 0), policy))


@pytest.fixture
def place(tmp_path: Path, sharded: Path, s3_server: SeaweedFS, uploaded: str) -> Iterator[Place]:
    directory = tmp_path / f"place-{os.urandom(4).hex()}"
    directory.mkdir()
    shutil.copytree(sharded, directory / "model")
    with ExitStack() as running:
        yield Place(directory, directory / "model", s3_server, uploaded, running)
    subprocess.run(["umount", directory / "full"], check=False, capture_output=True)


def files_in(directory: Path) -> dict[Path, int]:
    """Files and their sizes, but for what a pull keeps to go on from."""
    return {
        path: path.stat().st_size for path in directory.rglob("*") if path.is_file() and ".mx-pull" not in path.parts
    }


def score(message: str, names: Sequence[str]) -> dict[str, bool]:
    """What a message does for its reader, rule by rule."""
    lines = message.strip().splitlines()
    return {
        "one error, and nothing else": len(re.findall(r"^Error:|Traceback", message, re.MULTILINE)) <= 1
        and "Traceback" not in message,
        "names what is concerned": all(name in message for name in names),
        "says what to do": any(line.startswith("Next step: ") and len(line) > 20 for line in lines),
        "is short": len(lines) <= 6 and all(len(line) < 700 for line in lines),
        "shows no secret": not re.search(r"swordfish|secret-[0-9a-f]{16}", message),
        "uses no jargon of the program": not re.search(r"<class|0x[0-9a-f]{6,}|Error\(|None\b", message),
    }


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_message_says_what_is_wrong_and_what_to_do(name: str, place: Place, mx: Run) -> None:
    """Exit code 1, one error that passes every rule, nothing on stdout, and nothing left half-written."""
    failure = SCENARIOS[name](place)
    before = files_in(place.directory)

    if failure.program:
        command = [sys.executable, "-c", failure.program]
        environ = {**os.environ, **failure.environ}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    else:
        done = mx(*failure.arguments, environ=failure.environ)

    assert (1, "") == (done.returncode, done.stdout), done.stderr
    assert [] == [rule for rule, kept in score(done.stderr, failure.names).items() if not kept], done.stderr
    assert before == files_in(place.directory)


@pytest.mark.parametrize("command", ["load", "pull"])
def test_ctrl_c_ends_a_command_with_a_word_and_leaves_nothing_half_written(
    command: str, place: Place, tmp_path: Path
) -> None:
    """Soon, with exit code 130, no traceback, and no file under its name that is not whole."""
    asked = []

    def policy(number: int, request: bytes) -> Fault | None:
        asked.append(number)
        return Fault("stall", after_bytes=100_000) if b"range: bytes=" in request.lower() else None

    endpoint = f"http://127.0.0.1:{proxied(place, policy).port}"
    environ = {**os.environ, **place.server.environ(), "AWS_ENDPOINT_URL": endpoint, "HOME": str(tmp_path)}
    target = tmp_path / "copy"
    arguments = [command, place.uri, *([str(target)] if command == "pull" else [])]
    process = subprocess.Popen(
        with_default_signals([sys.executable, "-m", "modelexpress_core", *arguments]),
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert eventually(lambda: len(asked) >= 6, seconds=180)  # before that, Python may still be importing
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)

    assert 130 == process.returncode, said
    assert time.monotonic() - begun < 20
    assert "Interrupted" in said
    assert "Traceback" not in said
    whole = {path.name: path.stat().st_size for path in place.checkpoint.iterdir()}
    found = {path.name: path.stat().st_size for path in target.glob("[!.]*")} if target.exists() else {}
    assert found.items() <= whole.items()
