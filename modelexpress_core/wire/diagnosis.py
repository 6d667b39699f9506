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
    try:
        _look(endpoint, tls)
    except BackendError as exc:
        return exc
    return None


def _look(endpoint: Endpoint, tls: TlsSettings) -> None:
    """Raise what is wrong."""
    try:
        sock = socket.create_connection((endpoint.host, endpoint.port), _TIMEOUT_SECONDS)
    except (socket.gaierror, UnicodeError) as exc:
        if isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_AGAIN:
            raise UnavailableError("no name server answers", hint="check the network of this machine") from exc
        raise UnavailableError(
            "no such name",
            cause="it is misspelt, or known only in another network",
            hint="check the host in MODEL_EXPRESS_URL",
        ) from exc
    except TimeoutError as exc:
        raise UnavailableError(
            f"no connection within {_TIMEOUT_SECONDS:g} s",
            cause="a firewall drops the packets, or the host is down",
            hint="check host and port in MODEL_EXPRESS_URL",
        ) from exc
    except ConnectionRefusedError as exc:
        raise UnavailableError(
            "no server is there",
            cause="it does not run, or listens on another port",
            hint="check MODEL_EXPRESS_URL, and that the server runs: `mx health`",
        ) from exc
    except OSError:
        return
    with sock:
        try:
            if endpoint.tls:
                _look_at_tls(sock, endpoint.host, tls)
            else:
                _look_at_plain(sock, endpoint)
        except TimeoutError as exc:
            raise UnavailableError(
                f"it takes connections, and says nothing within {_TIMEOUT_SECONDS:g} s",
                cause="the server hangs or is overloaded, or something else listens there",
                hint="look into the log of the server",
            ) from exc
        except OSError:
            return


def _look_at_plain(sock: socket.socket, endpoint: Endpoint) -> None:
    """A port that hangs up at the first words of HTTP/2, and is glad of TLS, speaks TLS."""
    try:
        sock.sendall(_PREFACE)
        answer = sock.recv(_FRAME_HEAD_BYTES)
    except ConnectionError:
        answer = b""
    if (not answer or answer[0] == _ALERT) and _speaks_tls(endpoint):
        raise UnavailableError(
            "the server speaks TLS, and was spoken to without",
            retryable=False,
            cause="the address has no https:// before it",
            hint=f"set MODEL_EXPRESS_URL=https://{endpoint.target}",
        )
    if len(answer) >= _FRAME_HEAD_BYTES and answer[3] != _SETTINGS:
        raise UnavailableError(
            "what listens there is no gRPC server",
            retryable=False,
            cause="it is another program, or the server's port of metrics",
            hint="check the port in MODEL_EXPRESS_URL",
        )


def _speaks_tls(endpoint: Endpoint) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is said to it
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((endpoint.host, endpoint.port), _TIMEOUT_SECONDS) as sock:
            context.wrap_socket(sock).close()
    except ssl.SSLError as exc:
        return "ALERT" in (exc.reason or "")  # it wants a certificate, say
    except OSError:
        return False
    return True


def _look_at_tls(sock: socket.socket, host: str, tls: TlsSettings) -> None:
    context = client_context(tls)
    context.set_alpn_protocols(["h2"])
    try:
        secure = context.wrap_socket(sock, server_hostname=host)
    except ssl.SSLCertVerificationError as exc:
        raise _distrusted(exc) from exc
    except (ssl.SSLEOFError, ConnectionError) as exc:
        raise UnavailableError(
            "the connection is closed before TLS has begun",
            cause="the server ends or starts, or a proxy in between has none to pass on to",
            hint="try again; check what MODEL_EXPRESS_URL leads to",
        ) from exc
    except ssl.SSLError as exc:
        reason = (exc.reason or str(exc)).lower().replace("_", " ")
        if "alert" in reason:
            raise _hung_up(tls) from exc
        raise UnavailableError(
            f"the server does not speak TLS: {reason}",
            retryable=False,
            cause="the port serves connections that are not encrypted",
            hint="write http:// in place of https:// in MODEL_EXPRESS_URL, or have the server speak TLS",
        ) from exc
    with secure:
        if secure.selected_alpn_protocol() != "h2":
            raise UnavailableError(
                "what listens there speaks TLS, and is no gRPC server",
                retryable=False,
                cause="it is another program, or a proxy that does not pass HTTP/2 on",
                hint="check the port in MODEL_EXPRESS_URL",
            )
        try:
            secure.sendall(_PREFACE)
            # With TLS 1.3 a server that wants another certificate hangs up only now; gRPC's does so without a word.
            said = secure.recv(1)
        except (ssl.SSLError, ConnectionError):
            said = b""
        if not said:
            raise _hung_up(tls)


def _distrusted(exc: ssl.SSLCertVerificationError) -> BackendError:
    what, cause, hint = objection(exc)
    if what.endswith("trusted"):
        cause, hint = "an authority of your own signed it", "name the file with its certificate in MX_TLS_CA_PATH"
    return AccessDeniedError(f"the server's certificate {what}: {exc.verify_message}", cause=cause, hint=hint)


def _hung_up(tls: TlsSettings) -> BackendError:
    """TLS was agreed, and the server hung up: most often for our certificate, of which it says nothing."""
    message = "the server hangs up as soon as TLS is agreed"
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
    """How our certificate is out of date; None where it is not. We shake hands with ourselves to see it."""
    assert tls.certificate is not None  # noqa: S101 - for the type checker
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(tls.certificate, tls.key)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.load_verify_locations(tls.certificate)  # it vouches for itself: only its dates are looked at
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
        return objection(exc)[0] if exc.verify_code in _OUTDATED else None
    except ssl.SSLError:
        return None
    return None
