"""S3 through HTTP proxies, past them, and over IPv6: a real proxy and a real server."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import trustme
from safetensors.torch import save

import modelexpress_core as mx
from devtools.http_proxy import HttpProxy
from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import TcpProxy
from modelexpress_core.errors import AccessDeniedError, UnavailableError
from modelexpress_core.uri import ModelURI
from mx_s3._storage import S3Storage, open_s3

CONTENT = bytes(range(256)) * 8192


@pytest.fixture
def proxy() -> Iterator[HttpProxy]:
    with HttpProxy() as proxy:
        yield proxy


@pytest.fixture
def etag(put: Callable[..., str]) -> str:
    return put("proxies/object", CONTENT)


def _everything(storage: S3Storage, version: str) -> bytes:
    memory = bytearray(len(CONTENT))
    assert ["proxies/object"] == [info.path for info in storage.list("proxies")]
    assert len(CONTENT) == storage.stat("proxies/object").size
    done = storage.read_into("proxies/object", 0, memoryview(memory), version=version)
    return bytes(memory[:done])


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_every_request_goes_through_the_proxy(
    opened: Callable[..., S3Storage], etag: str, proxy: HttpProxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In absolute form, and with a signature that the server behind it accepts; the doctor knows it too."""
    monkeypatch.setenv(name, proxy.url)
    storage = opened()

    assert CONTENT == _everything(storage, etag)
    assert ["GET", "HEAD", "GET"] == [request.split(" ")[0] for request in proxy.requests]
    assert all(request.split(" ")[1].startswith("http://127.0.0.1:") for request in proxy.requests)
    assert proxy.url == storage.endpoint().proxy


def test_variables_of_a_load_go_before_the_process(
    opened: Callable[..., S3Storage], etag: str, proxy: HttpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy, and the exceptions from it."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    assert CONTENT == _everything(opened(HTTP_PROXY=proxy.url), etag)
    assert 3 == len(proxy.requests)
    assert CONTENT == _everything(opened(NO_PROXY="127.0.0.1"), etag)
    assert 3 == len(proxy.requests)


@pytest.mark.parametrize("no_proxy", ["127.0.0.1", "127.0.0.0/8", "*", "other.example, 127.0.0.1"])
def test_no_proxy_goes_past_it(opened: Callable[..., S3Storage], etag: str, proxy: HttpProxy, no_proxy: str) -> None:
    """The server is connected to directly."""
    storage = opened(HTTP_PROXY=proxy.url, NO_PROXY=no_proxy)

    assert CONTENT == _everything(storage, etag)
    assert [] == proxy.requests
    assert storage.endpoint().proxy is None


def test_a_proxy_with_a_password(opened: Callable[..., S3Storage], etag: str) -> None:
    """It is sent to the proxy, and shown nowhere; without it the error names the proxy."""
    with HttpProxy(authorization="Basic dXNlcjpzM2NyZXQ=") as proxy:
        storage = opened(HTTP_PROXY=proxy.url.replace("://", "://user:s3cret@"))

        assert CONTENT == _everything(storage, etag)
        assert proxy.url == storage.endpoint().proxy
        with pytest.raises(AccessDeniedError, match="HTTP 407") as caught:
            _everything(opened(HTTP_PROXY=proxy.url), etag)
        assert "proxy" in str(caught.value)


def test_a_proxy_that_is_down(opened: Callable[..., S3Storage], etag: str) -> None:
    """Nothing goes around it, and its password is not in the message."""
    storage = opened(HTTP_PROXY="http://user:s3cret@127.0.0.1:1")

    with pytest.raises(UnavailableError, match=r"through the proxy: http://127\.0\.0\.1:1 cannot be reached") as caught:
        storage.read_into("proxies/object", 0, memoryview(bytearray(9)), version=etag)
    with pytest.raises(UnavailableError, match="through the proxy"):
        storage.stat("proxies/object")

    assert caught.value.retryable
    assert "HTTPS_PROXY" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_load_over_tls_through_a_tunnel(proxy: HttpProxy, tmp_path: Path) -> None:
    """A whole load: TLS is with the server behind the proxy, which sees tunnels alone."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    weights = {f"weight.{number}": torch.full((100_000,), float(number)) for number in range(8)}
    files = (tmp_path / "cert.pem", tmp_path / "key.pem")
    with SeaweedFS("models", certificate=files, ca_bundle=tmp_path / "ca.pem") as server:
        with contextlib.closing(server.client()) as client:
            client.put_object(Bucket="models", Key="tunnel/model.safetensors", Body=save(weights))

        loaded = mx.load_state_dict(
            "s3://models/tunnel", environ={**server.environ(), "HTTPS_PROXY": proxy.url, "MX_CHUNK_BYTES": "100000"}
        )
        port = urlsplit(server.endpoint).port

    assert all(torch.equal(tensor, loaded[name]) for name, tensor in weights.items())
    assert {f"127.0.0.1:{port}"} == set(proxy.tunnels)
    assert [] == proxy.requests


def test_an_endpoint_with_an_ipv6_address(server: SeaweedFS, etag: str) -> None:
    """Signatures, connections and the doctor's endpoint, each with its own form of the address."""
    port = urlsplit(server.endpoint).port
    assert port is not None
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    with TcpProxy("127.0.0.1", port, listen="::1") as relay:
        environ = {**server.environ(), "AWS_ENDPOINT_URL": f"http://[::1]:{relay.port}"}
        with contextlib.closing(open_s3(ModelURI.parse("s3://models"), environ)) as storage:
            assert CONTENT == _everything(storage, etag)
            assert ("::1", relay.port) == (storage.endpoint().host, storage.endpoint().port)
        assert 1 == relay.connections
