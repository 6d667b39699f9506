"""Connections on real sockets: reuse, proxies, TLS, IPv6, closing."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from devtools.http_proxy import HttpProxy
from devtools.network import full_port
from modelexpress_core.storage.http import ConnectionPool, Origin, Proxies, Request
from modelexpress_core.storage.http.failures import (
    AuthoritiesError,
    BadAnswerError,
    ConnectTimeoutError,
    ProxyError,
    SettingNames,
    connection_error,
)
from tests.support.http_servers import answering, server_context

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@pytest.fixture
def pool() -> Iterator[Callable[..., ConnectionPool]]:
    """Makes pools, which end with the test; variables name proxies."""
    with contextlib.ExitStack() as stack:

        def pool(ca_bundle: str | None = None, seconds: float = 5.0, **variables: str) -> ConnectionPool:
            proxies = Proxies.from_environ(variables)
            made = ConnectionPool(connect_timeout_seconds=seconds, proxies=proxies, ca_bundle=ca_bundle)
            return stack.enter_context(contextlib.closing(made))

        yield pool


def fetched(pool: ConnectionPool, url: str, seconds: float = 5.0) -> bytes:
    with pool.send(Request.to_url("GET", url), lambda: seconds) as answer:
        return answer.read(1000)


def explained(exc: Exception) -> Any:
    about = {"uri": "web://host/a", "operation": "read", "provider": "mx-web", "endpoint": "http://host"}
    return connection_error(exc, names=SettingNames(), silence_seconds=0.3, **about)


# -- reuse -------------------------------------------------------------------------------------------------------------


def test_a_connection_is_used_again(pool: Callable[..., ConnectionPool]) -> None:
    """As often as it can be."""
    connections = pool()
    with answering(OK) as server:
        for _ in range(10):
            assert b"hello" == fetched(connections, f"http://127.0.0.1:{server.port}/")

        assert 1 == server.connections
        assert 1 == connections.open_connections


def test_each_server_has_its_own_connections(pool: Callable[..., ConnectionPool]) -> None:
    """A request never goes to the server of an earlier one."""
    connections = pool()
    other = OK.replace(b"hello", b"other")
    with answering(OK) as one, answering(other) as two:
        for _ in range(2):
            assert b"hello" == fetched(connections, f"http://127.0.0.1:{one.port}/")
            assert b"other" == fetched(connections, f"http://127.0.0.1:{two.port}/")

        assert (1, 1) == (one.connections, two.connections)


def test_a_connection_that_the_server_closed_is_not_used(pool: Callable[..., ConnectionPool]) -> None:
    """It is noticed before the request is sent, which then needs no second try."""
    connections = pool()

    def close_after(sock: socket.socket, content: bytes) -> None:
        sock.sendall(content)
        sock.shutdown(socket.SHUT_RDWR)

    with answering(OK, piece=close_after) as server:
        for _ in range(3):
            assert b"hello" == fetched(connections, f"http://127.0.0.1:{server.port}/")
            time.sleep(0.05)

        assert 3 == server.connections


def test_an_answer_that_nothing_asked_for_is_not_taken(pool: Callable[..., ConnectionPool]) -> None:
    """Bytes that come while a connection is idle would be read as the answer to the next request."""
    connections = pool()
    late = threading.Event()

    def twice(sock: socket.socket, content: bytes) -> None:
        sock.sendall(content)
        late.wait(5)
        sock.sendall(content.replace(b"hello", b"wrong"))

    with answering(OK, piece=twice) as server:
        url = f"http://127.0.0.1:{server.port}/"
        assert b"hello" == fetched(connections, url)
        late.set()
        time.sleep(0.1)

        assert b"hello" == fetched(connections, url)


def test_bytes_after_an_answer_are_not_taken_for_the_next(pool: Callable[..., ConnectionPool], tmp_path: Path) -> None:
    """Over TLS they may wait where the system does not see them, in the record that ended the answer."""
    context, authority = server_context(tmp_path, "127.0.0.1")
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n" + b"a" * 10_000
    connections = pool(authority)
    with answering(answer + OK.replace(b"hello", b"wrong"), context=context) as server:
        url = f"https://127.0.0.1:{server.port}/"
        for _ in range(2):
            memory = bytearray(10_000)
            with connections.send(Request.to_url("GET", url), lambda: 5) as got:
                assert 10_000 == got.read_into(memoryview(memory))
            assert b"a" * 10_000 == memory

        assert 2 == server.connections


def test_a_connection_that_was_idle_for_long_is_not_used(
    pool: Callable[..., ConnectionPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gateways forget such ones without a word, and a request on it would wait in vain."""
    monkeypatch.setattr("modelexpress_core.storage.http.connections._MAX_IDLE_SECONDS", 0.05)
    connections = pool()
    with answering(OK) as server:
        for _ in range(2):
            fetched(connections, f"http://127.0.0.1:{server.port}/")
            time.sleep(0.1)

        assert 2 == server.connections


def test_tls_tickets_do_not_end_a_connection(pool: Callable[..., ConnectionPool], tmp_path: Path) -> None:
    """They arrive after the handshake, when nothing has been asked for yet."""
    context, authority = server_context(tmp_path, "127.0.0.1")
    connections = pool(authority)
    with answering(OK, context=context) as server:
        connection = connections._opened(Origin("127.0.0.1", server.port, tls=True))
        connection.begin_idling()
        time.sleep(0.1)

        assert connection.is_usable()
        assert connection.is_usable()
        connection.close()


def test_idle_tls_connections_are_used_again(pool: Callable[..., ConnectionPool], tmp_path: Path) -> None:
    """Messages of TLS itself (session tickets) are no reason to give a connection up."""
    context, authority = server_context(tmp_path, "127.0.0.1")
    context.num_tickets = 4
    connections = pool(authority)
    with answering(OK, context=context) as server:
        for _ in range(5):
            assert b"hello" == fetched(connections, f"https://127.0.0.1:{server.port}/")
            time.sleep(0.02)

        assert 1 == server.connections


# -- IPv6 --------------------------------------------------------------------------------------------------------------


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no ::1")


@needs_ipv6
def test_an_ipv6_literal(pool: Callable[..., ConnectionPool]) -> None:
    """The Host header has the brackets, the socket has not."""
    with answering(OK, host="::1") as server:
        assert b"hello" == fetched(pool(), f"http://[::1]:{server.port}/a")

        assert [f"[::1]:{server.port}"] == server.header("Host")


@needs_ipv6
def test_an_ipv6_literal_over_tls_and_through_a_tunnel(pool: Callable[..., ConnectionPool], tmp_path: Path) -> None:
    """The certificate is for the address, and CONNECT writes it with brackets."""
    context, authority = server_context(tmp_path, "::1")
    with answering(OK, host="::1", context=context) as server, HttpProxy() as proxy:
        url = f"https://[::1]:{server.port}/"

        assert b"hello" == fetched(pool(authority), url)
        assert b"hello" == fetched(pool(authority, HTTPS_PROXY=proxy.url), url)
        assert [f"[::1]:{server.port}"] == proxy.tunnels
        assert b"hello" == fetched(pool(authority, HTTPS_PROXY=proxy.url, NO_PROXY="::1"), url)
        assert 1 == len(proxy.tunnels)


# -- proxies -----------------------------------------------------------------------------------------------------------


def test_http_through_a_proxy(pool: Callable[..., ConnectionPool]) -> None:
    """In absolute form, over one connection, to a host that only the proxy can find."""
    with answering(OK) as server, HttpProxy(route=lambda _host, _port: ("127.0.0.1", server.port)) as proxy:
        connections = pool(HTTP_PROXY=proxy.url)
        for _ in range(3):
            assert b"hello" == fetched(connections, "http://weights.invalid/a%20b?c=d")

    assert 3 * ["GET http://weights.invalid/a%20b?c=d HTTP/1.1"] == proxy.requests
    assert 3 * ["GET /a%20b?c=d HTTP/1.1"] == server.first_lines()
    assert 1 == server.connections


def test_https_through_a_proxy(pool: Callable[..., ConnectionPool], tmp_path: Path) -> None:
    """In a tunnel: TLS is with the server, whose name is verified and which only the proxy can find."""
    context, authority = server_context(tmp_path, "weights.invalid")
    with (
        answering(OK, context=context) as server,
        HttpProxy(route=lambda _host, _port: ("127.0.0.1", server.port)) as proxy,
    ):
        connections = pool(authority, HTTPS_PROXY=proxy.url)
        for _ in range(3):
            assert b"hello" == fetched(connections, "https://weights.invalid/a")
        with pytest.raises(ssl.SSLCertVerificationError):
            fetched(connections, "https://other.invalid/a")

    assert ["weights.invalid:443", "other.invalid:443"] == proxy.tunnels
    assert [] == proxy.requests
    assert 3 == len(server.requests)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_over_tls(pool: Callable[..., ConnectionPool], tmp_path: Path, scheme: str) -> None:
    """The proxy's certificate is verified, and in its tunnel the server's: one TLS connection inside the other."""
    authority = trustme.CA()
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    contexts = [ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(2)]
    for context, name in zip(contexts, ("127.0.0.1", "weights.invalid"), strict=True):
        authority.issue_cert(name).configure_cert(context)
    content = os.urandom(3_000_000)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)
    with (
        answering(answer, context=contexts[1] if scheme == "https" else None) as server,
        HttpProxy(context=contexts[0], route=lambda _host, _port: ("127.0.0.1", server.port)) as proxy,
    ):
        connections = pool(str(file), ALL_PROXY=proxy.url)
        for _ in range(3):
            memory = bytearray(len(content))
            with connections.send(Request.to_url("GET", f"{scheme}://weights.invalid/"), lambda: 5) as got:
                assert len(content) == got.read_into(memoryview(memory))
            assert content == memory
        assert 1 == server.connections

        if scheme == "https":
            with pytest.raises(ssl.SSLCertVerificationError):
                fetched(connections, "https://other.invalid/")
        with pytest.raises(ProxyError, match="cannot be reached") as caught:
            fetched(pool(ALL_PROXY=proxy.url), f"{scheme}://weights.invalid/")
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_proxys_password(pool: Callable[..., ConnectionPool], tmp_path: Path, scheme: str) -> None:
    """The proxy gets it, the server does not."""
    context, authority = server_context(tmp_path, "127.0.0.1")
    with (
        answering(OK, context=context if scheme == "https" else None) as server,
        HttpProxy(authorization="Basic dXNlcjpzM2NyZXQ=") as proxy,
    ):
        with_password = proxy.url.replace("http://", "http://user:s3cret@")
        url = f"{scheme}://127.0.0.1:{server.port}/"

        assert b"hello" == fetched(pool(authority, ALL_PROXY=with_password), url)
        assert [] == server.header("Proxy-Authorization")

        if scheme == "https":
            with pytest.raises(ProxyError, match="HTTP 407") as caught:
                fetched(pool(authority, ALL_PROXY=proxy.url), url)
            assert 407 == caught.value.status
            assert not explained(caught.value).retryable
        else:
            with pool(ALL_PROXY=proxy.url).send(Request.to_url("GET", url), lambda: 5) as answer:
                assert 407 == answer.status


def test_no_proxy_goes_past_it(pool: Callable[..., ConnectionPool]) -> None:
    """The server is connected to, and the proxy sees nothing."""
    with answering(OK) as server, HttpProxy() as proxy:
        connections = pool(http_proxy=proxy.url, no_proxy="127.0.0.0/8")

        assert b"hello" == fetched(connections, f"http://127.0.0.1:{server.port}/")
        assert [] == proxy.requests


@pytest.mark.parametrize(
    ("answer", "words", "retryable"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "HTTP 403 Forbidden", False),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "HTTP 502 Bad Gateway", True),
        (b"HTTP/1.1 302 Found\r\nLocation: https://elsewhere/\r\n\r\n", "HTTP 302", False),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "BadAnswerError", True),
        (b"HTTP/1.1 200 OK\r\na: " + b"b" * 100_000, "BadAnswerError", True),
    ],
)
def test_a_proxy_that_opens_no_tunnel(
    pool: Callable[..., ConnectionPool], answer: bytes, words: str, retryable: bool
) -> None:
    """Its answer is the reason, and is never taken for the server's."""
    with HttpProxy(answer=answer) as proxy, pytest.raises(ProxyError, match=words) as caught:
        fetched(pool(HTTPS_PROXY=proxy.url.replace("://", "://user:s3cret@")), "https://weights.invalid/")

    error = explained(caught.value)
    assert retryable is error.retryable
    assert "PROXY" in str(error)
    assert "s3cret" not in f"{error} {caught.value!r}"


def test_a_proxy_that_speaks_for_the_server(pool: Callable[..., ConnectionPool]) -> None:
    """What follows its answer at once cannot be the server's, which waits for the client."""
    with (
        HttpProxy(answer=b"HTTP/1.1 200 OK\r\n\r\n\x16\x03\x03") as proxy,
        pytest.raises(BadAnswerError, match="more than its answer"),
    ):
        fetched(pool(HTTPS_PROXY=proxy.url), "https://weights.invalid/")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1", "cannot be reached"),
        ("http://user:s3cret@proxy.invalid:3128", "proxy.invalid:3128 cannot be reached"),
        ("socks5://user:s3cret@127.0.0.1:1080", "neither an http"),
        ("http://user:s3cret@:3128", "no host"),
    ],
)
def test_a_proxy_that_cannot_be_used(pool: Callable[..., ConnectionPool], url: str, words: str) -> None:
    """The proxy is named, not the server, and without its password; nothing goes around it."""
    with answering(OK) as server, pytest.raises(ProxyError, match=words) as caught:
        fetched(pool(HTTP_PROXY=url), f"http://127.0.0.1:{server.port}/")

    assert "PROXY" in str(explained(caught.value))
    assert "s3cret" not in f"{explained(caught.value)} {caught.value!r}"
    assert [] == server.requests


# -- TLS ---------------------------------------------------------------------------------------------------------------


def test_certificates_are_verified(pool: Callable[..., ConnectionPool], tmp_path: Path) -> None:
    """The authority, and the name; after a refusal nothing was sent."""
    context, authority = server_context(tmp_path, "localhost")
    with answering(OK, context=context) as server:
        assert b"hello" == fetched(pool(authority), f"https://localhost:{server.port}/")
        for connections, url in (
            (pool(), f"https://localhost:{server.port}/"),
            (pool(authority), f"https://127.0.0.1:{server.port}/"),
        ):
            with pytest.raises(ssl.SSLCertVerificationError) as caught:
                fetched(connections, url)
            assert not explained(caught.value).retryable

        assert 1 == len(server.requests)


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_bundle_that_cannot_be_used(pool: Callable[..., ConnectionPool], tmp_path: Path, content: str | None) -> None:
    """A missing file, and one that holds something else."""
    file = tmp_path / "bundle.pem"
    if content is not None:
        file.write_text(content)
    with answering(OK) as server, pytest.raises(AuthoritiesError, match=r"bundle\.pem") as caught:
        fetched(pool(str(file)), f"https://127.0.0.1:{server.port}/")

    assert not explained(caught.value).retryable


def test_tls_to_a_server_without_it(pool: Callable[..., ConnectionPool]) -> None:
    """The scheme is pointed at, and trying again would not help."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with listening.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ssl.SSLError) as caught:
            fetched(pool(), f"https://127.0.0.1:{listening.getsockname()[1]}/")
        thread.join()

    error = explained(caught.value)
    assert not error.retryable
    assert "scheme and port" in str(error)


# -- waiting and closing -----------------------------------------------------------------------------------------------


@pytest.fixture
def deaf_port() -> Iterator[int]:
    with full_port() as port:
        yield port


def test_a_connection_that_does_not_come_about(pool: Callable[..., ConnectionPool], deaf_port: int) -> None:
    """The limit for connecting ends it, in TCP and in a proxy's."""
    with pytest.raises(ConnectTimeoutError):
        fetched(pool(seconds=0.2), f"http://127.0.0.1:{deaf_port}/")
    with pytest.raises(ProxyError, match="cannot be reached"):
        fetched(pool(seconds=0.2, HTTP_PROXY=f"http://127.0.0.1:{deaf_port}"), "http://weights.invalid/")


def test_a_handshake_and_a_tunnel_without_an_answer(pool: Callable[..., ConnectionPool]) -> None:
    """A peer that accepts and is silent costs no more than one that does not accept."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        begun = time.monotonic()

        with pytest.raises(ConnectTimeoutError):
            fetched(pool(seconds=0.2), f"https://127.0.0.1:{port}/")
        with pytest.raises(ProxyError, match="did not answer"):
            fetched(pool(seconds=0.2, HTTPS_PROXY=f"http://127.0.0.1:{port}"), "https://weights.invalid/")

        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("tls", [False, True])
def test_silence_ends_a_request(pool: Callable[..., ConnectionPool], tmp_path: Path, tls: bool) -> None:
    """After the wait that was asked for, however short."""
    context, authority = server_context(tmp_path, "127.0.0.1")
    with answering(OK, context=context if tls else None, piece=lambda _sock, _content: time.sleep(1)) as server:
        url = f"http{'s' * tls}://127.0.0.1:{server.port}/"
        for seconds in (0.2, 0.000_000_1):
            begun = time.monotonic()
            with pytest.raises(TimeoutError) as caught:
                fetched(pool(authority), url, seconds)
            assert time.monotonic() - begun < 0.9
        assert "sent nothing for 0.3 s" in str(explained(caught.value))


@pytest.mark.parametrize("tls", [False, True])
def test_closing_ends_requests_in_other_threads(pool: Callable[..., ConnectionPool], tmp_path: Path, tls: bool) -> None:
    """At once, and no connection is left open; later requests fail."""
    context, authority = server_context(tmp_path, "127.0.0.1")
    connections = pool(authority)
    errors: list[BaseException] = []
    with answering(OK, context=context if tls else None, piece=lambda _sock, _content: time.sleep(2)) as server:
        url = f"http{'s' * tls}://127.0.0.1:{server.port}/"

        def fetch() -> None:
            try:
                fetched(connections, url, 30)
            except OSError as exc:
                errors.append(exc)

        threads = [threading.Thread(target=fetch) for _ in range(4)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 5
        while len(server.requests) < 4:
            assert time.monotonic() < end
            time.sleep(0.01)
        begun = time.monotonic()
        connections.close()
        for thread in threads:
            thread.join(5)

        assert time.monotonic() - begun < 1
        assert 4 == len(errors)
        with pytest.raises(ConnectionAbortedError, match="closed"):
            fetched(connections, url)
        connections.close()


def test_refused_connections_leave_no_descriptor(pool: Callable[..., ConnectionPool], tmp_path: Path) -> None:
    """Nor do those whose answer is refused, or whose certificate is."""
    context, _ = server_context(tmp_path, "127.0.0.1")
    connections = pool()
    with socket.create_server(("127.0.0.1", 0)) as free:
        refusing = free.getsockname()[1]
    with answering(b"SSH-2.0\r\n\r\n") as speaking, answering(OK, context=context) as secure:
        urls = [
            f"http://127.0.0.1:{refusing}/",
            f"http://127.0.0.1:{speaking.port}/",
            f"https://127.0.0.1:{secure.port}/",
        ]

        for url in urls:
            with pytest.raises(OSError):  # noqa: PT011 - each has its own
                fetched(connections, url)

        assert [] == [sock for sock in connections._sockets._sockets if sock.fileno() >= 0]
