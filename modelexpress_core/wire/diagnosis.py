"""Why a server cannot be called: what a look at its port tells, which gRPC itself words in many ways or not at all."""

from __future__ import annotations

import contextlib
import socket
import ssl

from modelexpress_core.errors import AccessDeniedError, BackendError, UnavailableError
from modelexpress_core.tls_errors import objection
from modelexpress_core.wire.channel import Endpoint
from modelexpress_core.wire.settings import TlsSettings
from modelexpress_core.wire.tls import client_context

__all__ = ["diagnose"]

_TIMEOUT_SECONDS = 2.0

#: What every client of HTTP/2 says first; a server of HTTP/2 answers with frames of its own.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"

#: A frame of HTTP/2 begins with its length and its kind; the first that a server sends is of settings.
_FRAME_HEAD_BYTES = 9
_SETTINGS = 4

#: First byte of a record of TLS that says what went wrong.
_ALERT = 0x15


def diagnose(endpoint: Endpoint, tls: TlsSettings) -> BackendError | None:
    """Why ``endpoint`` cannot be called; None where a look at it shows nothing wrong. Takes a few seconds at most."""
    host, _, port = endpoint.target.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT_SECONDS) as sock:
            sock.settimeout(_TIMEOUT_SECONDS)
            return _diagnose_tls(sock, host.strip("[]"), tls) if endpoint.tls else _diagnose_plain(sock, endpoint)
    except socket.gaierror:
        return UnavailableError(
            "no such name",
            cause="it is misspelt, or known only in another network",
            hint="check the host in MODEL_EXPRESS_URL",
        )
    except TimeoutError:
        return UnavailableError(
            f"nobody answers within {_TIMEOUT_SECONDS:g} s",
            cause="a firewall drops the packets, or the host is down",
            hint="check host and port in MODEL_EXPRESS_URL",
        )
    except ConnectionRefusedError:
        return UnavailableError(
            "no server is there",
            cause="it does not run, or listens on another port",
            hint="check MODEL_EXPRESS_URL, and that the server runs: `mx health`",
        )
    except OSError:
        return None


def _diagnose_plain(sock: socket.socket, endpoint: Endpoint) -> BackendError | None:
    """A port that hangs up at the first words of HTTP/2, and is glad of TLS, speaks TLS."""
    try:
        sock.sendall(_PREFACE)
        answer = sock.recv(_FRAME_HEAD_BYTES)
    except ConnectionError:
        answer = b""
    if (not answer or answer[0] == _ALERT) and _speaks_tls(endpoint):
        return UnavailableError(
            "the server speaks TLS, and was spoken to without",
            retryable=False,
            cause="the address has no https:// before it",
            hint=f"set MODEL_EXPRESS_URL=https://{endpoint.target}",
        )
    if len(answer) >= _FRAME_HEAD_BYTES and answer[3] != _SETTINGS:
        return UnavailableError(
            "what listens there is no gRPC server",
            retryable=False,
            cause="it is another program, or the server's port of metrics",
            hint="check the port in MODEL_EXPRESS_URL",
        )
    return None


def _speaks_tls(endpoint: Endpoint) -> bool:
    host, _, port = endpoint.target.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is said to it
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT_SECONDS) as sock:
            context.wrap_socket(sock).close()
    except ssl.SSLError as exc:
        return "ALERT" in (exc.reason or "")  # it wants a certificate, say
    except OSError:
        return False
    return True


def _diagnose_tls(sock: socket.socket, host: str, tls: TlsSettings) -> BackendError | None:
    context = client_context(tls)
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(sock, server_hostname=host) as secure:
            secure.sendall(_PREFACE)
            # With TLS 1.3 a server that wants another certificate hangs up only now; gRPC's does so without a word.
            return None if secure.recv(1) else _hung_up(tls)
    except ssl.SSLCertVerificationError as exc:
        return _distrusted(exc)
    except (ssl.SSLEOFError, ConnectionError):
        return _hung_up(tls)
    except ssl.SSLError as exc:
        reason = exc.reason or str(exc)
        if "ALERT" in reason:
            return _hung_up(tls)
        return UnavailableError(
            f"the server does not speak TLS: {reason.lower().replace('_', ' ')}",
            retryable=False,
            cause="the port serves connections that are not encrypted",
            hint="write http:// in place of https:// in MODEL_EXPRESS_URL, or have the server speak TLS",
        )


def _distrusted(exc: ssl.SSLCertVerificationError) -> BackendError:
    what, cause, hint = objection(exc)
    if what.endswith("trusted"):
        cause, hint = "an authority of your own signed it", "name the file with its certificate in MX_TLS_CA_PATH"
    return AccessDeniedError(f"the server's certificate {what}: {exc.verify_message}", cause=cause, hint=hint)


def _hung_up(tls: TlsSettings) -> BackendError:
    """The server is trusted, and does not trust us: why, as far as that can be seen from this side."""
    message = "the server hangs up once it has looked for our certificate"
    if tls.certificate is None:
        return AccessDeniedError(
            message,
            cause="the server wants a certificate, and none was shown",
            hint="set MX_TLS_CERT_PATH and MX_TLS_KEY_PATH",
        )
    found = _own_certificate(tls)
    if found is not None:
        what, _, _ = objection(found)
        return AccessDeniedError(
            message,
            cause=f"our certificate {what}: {found.verify_message}",
            hint=f"renew it, or use another that the server's authorities signed: {tls.certificate}",
        )
    return AccessDeniedError(
        message,
        cause="the server does not know the authority that signed our certificate",
        hint="use a certificate (MX_TLS_CERT_PATH) of an authority that the server's MX_TLS_CA_PATH holds",
    )


def _own_certificate(tls: TlsSettings) -> ssl.SSLCertVerificationError | None:
    """What a server with our own authorities would hold against our certificate: we shake hands with ourselves."""
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.authorities)
    server_side.verify_mode = ssl.CERT_REQUIRED
    client_side = client_context(tls)
    client_side.check_hostname = False
    client_side.verify_mode = ssl.CERT_NONE  # it is ourselves
    assert tls.certificate is not None  # noqa: S101 - for the type checker
    server_side.load_cert_chain(tls.certificate, tls.key)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(back, there)
    server = server_side.wrap_bio(there, back, server_side=True)
    try:
        for _ in range(4):
            for side in (client, server):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
    except ssl.SSLCertVerificationError as exc:
        return exc
    except ssl.SSLError:
        return None
    return None
