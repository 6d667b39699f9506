"""The prober of TCP and TLS names each fault, against real sockets on loopback."""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
import trustme

from modelexpress_core import probing
from modelexpress_core.probing import Fault, ProbeError, begin_tls, connect, look_up


def answer_with(action: Callable[[socket.socket], object]) -> contextlib.AbstractContextManager[int]:
    """The port of a server that does ``action`` with its one connection."""

    @contextlib.contextmanager
    def serving() -> Iterator[int]:
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def serve() -> None:
                with contextlib.suppress(OSError):
                    sock, _ = listening.accept()
                    with sock:
                        action(sock)

            thread = threading.Thread(target=serve)
            thread.start()
            yield listening.getsockname()[1]
            thread.join(10)

    return serving()


def reset(sock: socket.socket) -> None:
    sock.recv(1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def tls_server(authority: trustme.CA, host: str, *, wants_certificate: bool = False) -> Callable[[socket.socket], None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # where a missing certificate ends the handshake itself
    authority.issue_cert(host).configure_cert(context)
    if wants_certificate:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            secure.recv(1)

    return serve


def handshake_fault(action: Callable[[socket.socket], object], authority: trustme.CA) -> Fault:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with (
        answer_with(action) as port,
        connect("127.0.0.1", port, 1.0) as sock,
        pytest.raises(ProbeError) as raised,
    ):
        begin_tls(sock, context, "127.0.0.1")
    return raised.value.fault


@pytest.mark.parametrize(
    ("fault", "action"),
    [
        (Fault.SILENT, lambda sock: sock.recv(4096) and sock.recv(1)),
        (Fault.PLAIN, lambda sock: sock.recv(4096) and sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
        (Fault.RESET, reset),
        (Fault.RESET, lambda sock: sock.recv(4096)),
    ],
    ids=["silent", "plain", "reset", "end"],
)
def test_faults_of_a_handshake(fault: Fault, action: Callable[[socket.socket], object]) -> None:
    """Silence, an answer that is no TLS, and ends of the connection."""
    assert fault is handshake_fault(action, trustme.CA())


def test_faults_of_certificates() -> None:
    """The server's is for another host or of another authority, and its cause says which; ours is missing."""
    authority = trustme.CA()

    assert Fault.UNTRUSTED is handshake_fault(tls_server(authority, "elsewhere.example"), authority)
    assert Fault.UNTRUSTED is handshake_fault(tls_server(trustme.CA(), "127.0.0.1"), authority)
    assert Fault.ALERT is handshake_fault(tls_server(authority, "127.0.0.1", wants_certificate=True), authority)


def test_a_port_without_a_listener() -> None:
    """Refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(ProbeError) as raised:
        connect("127.0.0.1", port, 1.0)

    assert Fault.REFUSED is raised.value.fault
    assert isinstance(raised.value.cause, ConnectionRefusedError)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (OSError(errno.ENETUNREACH, "x"), Fault.NO_NETWORK),
        (OSError(errno.EADDRNOTAVAIL, "x"), Fault.NO_NETWORK),
        (OSError(errno.EHOSTUNREACH, "x"), Fault.NO_HOST),
        (ConnectionResetError(errno.ECONNRESET, "x"), Fault.RESET),
        (TimeoutError("x"), Fault.SILENT),
        (OSError(errno.EMFILE, "x"), Fault.OTHER),
        (socket.gaierror(socket.EAI_NONAME, "x"), Fault.UNKNOWN_NAME),
        (socket.gaierror(socket.EAI_AGAIN, "x"), Fault.NO_NAME_SERVER),
        (UnicodeError("x"), Fault.UNKNOWN_NAME),
    ],
)
def test_errors_of_a_mocked_system(error: Exception, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network on loopback cannot do."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(probing.socket, "create_connection", fail)
    with pytest.raises(ProbeError) as raised:
        connect("host", 1, 1.0)

    assert fault is raised.value.fault
    assert error is raised.value.cause


def test_looking_names_up() -> None:
    """Each address once; a name without one is unknown."""
    assert ("127.0.0.1",) == look_up("127.0.0.1", 80)
    with pytest.raises(ProbeError) as raised:
        look_up("a" * 64 + ".example", 80)

    assert Fault.UNKNOWN_NAME is raised.value.fault
