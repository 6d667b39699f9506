"""Why a server cannot be called: a probe of its port shows what gRPC words in many ways, or not at all."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Mapping

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import AccessDeniedError, BackendError, UnavailableError
from modelexpress_core.probing import Fault, ProbeError, begin_tls, connect, reason_of_tls
from modelexpress_core.tls_errors import explain_verification_error
from modelexpress_core.wire.settings import TlsSettings
from modelexpress_core.wire.tls import client_context

__all__ = ["diagnose"]

_TIMEOUT_SECONDS = 2.0

#: The first bytes of every HTTP/2 client, with empty settings; a server of HTTP/2 answers with frames of its own.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"

#: A frame of HTTP/2 begins with its length and its type; a server sends its settings first.
_FRAME_HEAD_BYTES = 9
_SETTINGS = 4

#: First byte of a TLS record that refuses a handshake.
_ALERT = 0x15

#: What is wrong, likely cause and next step where no connection comes about. Other faults are left to gRPC's words.
_NO_CONNECTION: Mapping[Fault, tuple[str, str | None, str]] = {
    Fault.NO_NAME_SERVER: ("no name server answers", None, "check the network of this machine"),
    Fault.UNKNOWN_NAME: (
        "no such name",
        "it is misspelt, or known only in another network",
        "check the host in MODEL_EXPRESS_URL",
    ),
    Fault.SILENT: (
        f"no connection within {_TIMEOUT_SECONDS:g} s",
        "a firewall drops the packets, or the host is down",
        "check host and port in MODEL_EXPRESS_URL",
    ),
    Fault.REFUSED: (
        "no server listens there",
        "it does not run, or listens on another port",
        "check MODEL_EXPRESS_URL, and that the server runs: `mx health`",
    ),
}


def diagnose(endpoint: Endpoint, tls: TlsSettings) -> BackendError | None:
    """Why ``endpoint`` cannot be called; None if a probe finds nothing wrong. Takes a few seconds at most."""
    try:
        _probe(endpoint, tls)
    except BackendError as exc:
        return exc
    return None


def _probe(endpoint: Endpoint, tls: TlsSettings) -> None:
    """Raise what is wrong."""
    try:
        sock = connect(endpoint.host, endpoint.port, _TIMEOUT_SECONDS)
    except ProbeError as exc:
        if exc.fault not in _NO_CONNECTION:
            return
        message, cause, hint = _NO_CONNECTION[exc.fault]
        raise UnavailableError(message, cause=cause, hint=hint) from exc.cause
    with sock:
        try:
            if endpoint.tls:
                _probe_tls(sock, endpoint.tls_name or endpoint.host, tls)
            else:
                _probe_plain(sock, endpoint)
        except TimeoutError as exc:
            raise UnavailableError(
                f"it accepts connections, and sends nothing within {_TIMEOUT_SECONDS:g} s",
                cause="the server hangs or is overloaded, or something else listens there",
                hint="look into the log of the server",
            ) from exc
        except OSError:
            return


def _probe_plain(sock: socket.socket, endpoint: Endpoint) -> None:
    """A port that ends the connection at the first bytes of HTTP/2, and accepts TLS, speaks TLS."""
    try:
        sock.sendall(_PREFACE)
        answer = sock.recv(_FRAME_HEAD_BYTES)
    except ConnectionError:
        answer = b""
    if (not answer or answer[0] == _ALERT) and _speaks_tls(endpoint):
        raise UnavailableError(
            "the server speaks TLS, and the client does not",
            retryable=False,
            cause="the address has no https:// before it",
            hint=f"set MODEL_EXPRESS_URL=https://{endpoint.target}",
        )
    if len(answer) >= _FRAME_HEAD_BYTES and answer[3] != _SETTINGS:
        raise UnavailableError(
            "the program that listens there is no gRPC server",
            retryable=False,
            cause="it is another program, or the server's port of metrics",
            hint="check the port in MODEL_EXPRESS_URL",
        )


def _speaks_tls(endpoint: Endpoint) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent to it
    context.set_alpn_protocols(["h2"])
    try:
        with connect(endpoint.host, endpoint.port, _TIMEOUT_SECONDS) as sock:
            begin_tls(sock, context, endpoint.host).close()
    except ProbeError as exc:
        return exc.fault is Fault.ALERT  # it wants a certificate, say
    return True


def _probe_tls(sock: socket.socket, host: str, tls: TlsSettings) -> None:
    context = client_context(tls)
    context.set_alpn_protocols(["h2"])
    try:
        secure = begin_tls(sock, context, host)
    except ProbeError as exc:
        raise _tls_error(exc, tls) or exc.cause from exc
    with secure:
        if secure.selected_alpn_protocol() != "h2":
            raise UnavailableError(
                "the program that listens there speaks TLS, and is no gRPC server",
                retryable=False,
                cause="it is another program, or a proxy that does not pass HTTP/2 on",
                hint="check the port in MODEL_EXPRESS_URL",
            )
        try:
            secure.sendall(_PREFACE)
            # With TLS 1.3 a server that wants another certificate ends the connection only now; gRPC's sends no alert.
            answer = secure.recv(1)
        except (ssl.SSLError, ConnectionError):
            answer = b""
        if not answer:
            raise _ended_after_handshake(tls)


def _tls_error(exc: ProbeError, tls: TlsSettings) -> BackendError | None:
    """What a failed handshake means; None if that is not known."""
    if isinstance(exc.cause, ssl.SSLCertVerificationError):
        return _untrusted(exc.cause)
    if exc.fault is Fault.RESET:
        return UnavailableError(
            "the connection is closed before TLS has begun",
            cause="the server ends or starts, or a proxy in between has none to pass on to",
            hint="try again; check what MODEL_EXPRESS_URL leads to",
        )
    if exc.fault is Fault.ALERT:
        return _ended_after_handshake(tls)
    if isinstance(exc.cause, ssl.SSLError):
        return UnavailableError(
            f"the server does not speak TLS: {reason_of_tls(exc.cause)}",
            retryable=False,
            cause="the port serves connections that are not encrypted",
            hint="write http:// in place of https:// in MODEL_EXPRESS_URL, or have the server speak TLS",
        )
    return None


def _untrusted(exc: ssl.SSLCertVerificationError) -> BackendError:
    what, cause, hint = explain_verification_error(exc)
    if what.endswith("trusted"):
        cause, hint = "an authority of your own signed it", "name the file with its certificate in MX_TLS_CA_PATH"
    return AccessDeniedError(f"the server's certificate {what}: {exc.verify_message}", cause=cause, hint=hint)


def _ended_after_handshake(tls: TlsSettings) -> BackendError:
    """The server ended the connection after the handshake: mostly because of our certificate, without saying so."""
    message = "the server ends the connection right after the TLS handshake"
    if tls.certificate is None:
        return AccessDeniedError(
            message,
            retryable=True,
            cause="it wants a certificate, and none was shown",
            hint="set MX_TLS_CERT_PATH and MX_TLS_KEY_PATH",
        )
    outdated = _outdated(tls)
    if outdated is not None:
        return AccessDeniedError(
            message, cause=f"our certificate {outdated}", hint=f"renew it, and check the clock: {tls.certificate}"
        )
    return AccessDeniedError(
        message,
        retryable=True,
        cause="it does not know the authority that signed our certificate",
        hint="use a certificate (MX_TLS_CERT_PATH) of an authority that the server's MX_TLS_CA_PATH holds",
    )


#: OpenSSL's codes of certificates that are not valid yet or no longer.
_OUTDATED = frozenset({9, 10})


def _outdated(tls: TlsSettings) -> str | None:
    """How our certificate is out of date; None if it is not. A handshake with ourselves shows it."""
    assert tls.certificate is not None  # noqa: S101 - for the type checker
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(tls.certificate, tls.key)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.load_verify_locations(tls.certificate)  # as its own authority: only its dates are checked
    client_side.verify_flags |= ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(back, there)
    server = server_side.wrap_bio(there, back, server_side=True)
    try:
        for _ in range(4):
            for side in (client, server):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
    except ssl.SSLCertVerificationError as exc:
        return explain_verification_error(exc)[0] if exc.verify_code in _OUTDATED else None
    except ssl.SSLError:
        return None
    return None
