"""S3 over TLS, against the real server with a certificate of an authority made for the test."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.errors import BackendError, UnavailableError
from modelexpress_core.uri import ModelURI
from mx_s3._storage import open_s3

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("s3 over tls")]

URI = ModelURI.parse("s3://models")
CONTENT = bytes(range(256)) * 8192


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    files = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(files / "ca.pem"))
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(str(files / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(files / "cert.pem"))
    with SeaweedFS("models", certificate=(files / "cert.pem", files / "key.pem"), ca_bundle=files / "ca.pem") as server:
        with contextlib.closing(server.client()) as client:
            client.put_object(Bucket="models", Key="object", Body=CONTENT)
        yield server


def test_reads_with_the_authority_of_aws_ca_bundle(tls_server: SeaweedFS) -> None:
    """AWS_CA_BUNDLE makes a private authority trusted."""
    memory = bytearray(len(CONTENT))

    with contextlib.closing(open_s3(URI, tls_server.environ())) as storage:
        count = storage.read_into("object", 0, memoryview(memory), version=storage.stat("object").version)

    assert len(CONTENT) == count
    assert CONTENT == memory


def test_an_unknown_authority_is_refused(tls_server: SeaweedFS) -> None:
    """Without it the certificate is not trusted, and the message says what to set."""
    environ = tls_server.environ()
    del environ["AWS_CA_BUNDLE"]

    with (
        contextlib.closing(open_s3(URI, environ)) as storage,
        pytest.raises(UnavailableError, match="is not trusted") as caught,
    ):
        storage.stat("object")

    assert not caught.value.retryable
    assert "AWS_CA_BUNDLE" in str(caught.value)


def test_a_bundle_that_is_missing_is_refused(tls_server: SeaweedFS, tmp_path: Path) -> None:
    """AWS_CA_BUNDLE with a wrong path is no passing fault."""
    environ = {**tls_server.environ(), "AWS_CA_BUNDLE": str(tmp_path / "missing.pem")}

    with (
        contextlib.closing(open_s3(URI, environ)) as storage,
        pytest.raises(UnavailableError, match="AWS_CA_BUNDLE") as caught,
    ):
        storage.stat("object")

    assert not caught.value.retryable


def test_close_ends_a_read_amid_the_body(tls_server: SeaweedFS) -> None:
    """What arrived before is right, and the rest is not waited for."""
    port = urlsplit(tls_server.endpoint).port
    assert port is not None
    memory = bytearray(len(CONTENT))
    errors: list[BackendError] = []

    def stall(_number: int, _head: bytes) -> Fault | None:
        # The answers within the handshake are small; that to the request is the one that is cut.
        return Fault("stall", after_bytes=1_000_000)

    with TcpProxy("127.0.0.1", port, stall) as proxy:
        environ = {**tls_server.environ(), "AWS_ENDPOINT_URL": f"https://127.0.0.1:{proxy.port}"}
        storage = open_s3(URI, environ)

        def read() -> None:
            try:
                storage.read_into("object", 0, memoryview(memory), version=None)
            except BackendError as exc:
                errors.append(exc)

        thread = threading.Thread(target=read)
        thread.start()
        end = time.monotonic() + 10
        while not memory[500_001] and time.monotonic() < end:
            time.sleep(0.005)
        storage.close()
        thread.join(10)

    assert 1 == len(errors)
    assert not errors[0].retryable
    arrived = memory.rstrip(b"\0")
    assert CONTENT[: len(arrived)] == arrived


def test_patience_ends_a_silent_read_amid_the_body(tls_server: SeaweedFS) -> None:
    """What arrived before the silence counts, over TLS too."""
    port = urlsplit(tls_server.endpoint).port
    assert port is not None
    memory = bytearray(len(CONTENT))

    with TcpProxy("127.0.0.1", port, lambda *_: Fault("stall", after_bytes=1_000_000)) as proxy:
        environ = {**tls_server.environ(), "AWS_ENDPOINT_URL": f"https://127.0.0.1:{proxy.port}"}
        with contextlib.closing(open_s3(URI, environ)) as storage:
            storage.patience_seconds = 0.3
            started = time.monotonic()
            done = storage.read_into("object", 0, memoryview(memory), version=None)

    assert 500_000 < done < 1_000_000
    assert CONTENT[:done] == memory[:done]
    assert time.monotonic() - started < 5


def test_shutting_down_leaves_the_tls_layer_on(tls_server: SeaweedFS) -> None:
    """Otherwise a thread that reads at that moment would get the encrypted bytes that wait in the socket."""
    with contextlib.closing(open_s3(URI, tls_server.environ())) as storage:
        storage.stat("object")
        (sock,) = storage._pool._sockets._sockets

        storage._pool._sockets.shut_down()

        assert sock.version() is not None
