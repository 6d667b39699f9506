"""A real S3 server for all tests, a proxy before it that misbehaves, and a server that follows a script."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import Policy, TcpProxy
from modelexpress_core.uri import ModelURI
from mx_s3._storage import S3Storage, open_s3

BUCKET = "models"


@pytest.fixture(scope="session")
def server(s3_server: SeaweedFS) -> SeaweedFS:
    return s3_server


@pytest.fixture(scope="session")
def client(server: SeaweedFS) -> Iterator[Any]:
    with contextlib.closing(server.client()) as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None) -> None:
    pass


@pytest.fixture
def put(client: Any) -> Callable[..., str]:
    """Stores an object; its ETag comes back."""

    def put(key: str, body: bytes, bucket: str = BUCKET, **options: Any) -> str:
        return str(client.put_object(Bucket=bucket, Key=key, Body=body, **options)["ETag"])

    return put


@pytest.fixture
def opened(server: SeaweedFS) -> Iterator[Callable[..., S3Storage]]:
    """Opens storages on the server; variables replace those of the user, None takes one away."""
    with contextlib.ExitStack() as stack:

        def opened(uri: str = f"s3://{BUCKET}", user: str = "admin", **variables: str | None) -> S3Storage:
            environ = {**server.environ(user), **variables}
            settings = {name: value for name, value in environ.items() if value is not None}
            return stack.enter_context(contextlib.closing(open_s3(ModelURI.parse(uri), settings)))

        yield opened


@pytest.fixture
def proxied(server: SeaweedFS, opened: Callable[..., S3Storage]) -> Iterator[Callable[..., Any]]:
    """Opens storages that reach the server through a proxy with the given policy."""
    with contextlib.ExitStack() as stack:

        def proxied(policy: Policy | None = None, **options: Any) -> tuple[S3Storage, TcpProxy]:
            port = urlsplit(server.endpoint).port
            assert port is not None
            proxy = stack.enter_context(TcpProxy("127.0.0.1", port, policy))
            options.setdefault("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            return opened(**options), proxy

        yield proxied


Answer = tuple[int, Mapping[str, str], bytes]


@pytest.fixture
def scripted(opened: Callable[..., S3Storage]) -> Iterator[Callable[..., S3Storage]]:
    """Opens storages on a server that gives each request one answer: for what the real server never does."""
    with contextlib.ExitStack() as stack:

        def scripted(answer: Answer, **options: Any) -> S3Storage:
            class Handler(BaseHTTPRequestHandler):
                protocol_version = "HTTP/1.1"

                def do_GET(self) -> None:
                    status, headers, body = answer
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(body)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    if self.command == "GET":
                        self.wfile.write(body)
                    self.close_connection = "Content-Length" in headers

                do_HEAD = do_GET  # noqa: N815 - the name that http.server wants

                def log_message(self, *_: object) -> None:
                    pass

            class Server(ThreadingHTTPServer):
                def handle_error(self, *_: object) -> None:
                    pass  # clients that go away are what some tests are about

            http = stack.enter_context(Server(("127.0.0.1", 0), Handler))
            http.daemon_threads = True
            thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(http.shutdown)
            storage = opened(AWS_ENDPOINT_URL=f"http://127.0.0.1:{http.server_port}", **options)
            stack.callback(storage.close)
            return storage

        yield scripted


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Waits for a condition, ten seconds at most."""

    def until(condition: Callable[[], object]) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)

    return until
