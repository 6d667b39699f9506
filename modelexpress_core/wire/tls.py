"""TLS credentials of gRPC, for servers and clients, from files that may be replaced at any time."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from attrs import frozen

from modelexpress_core.errors import SettingsError
from modelexpress_core.wire.files import WatchedFiles, read_bytes
from modelexpress_core.wire.settings import TlsSettings

__all__ = ["ClientTls", "client_context", "client_contexts", "server_contexts", "server_credentials"]


@frozen(repr=False)
class _Material:
    """The checked content of the files, as PEM."""

    authorities: bytes | None
    certificate: bytes | None
    key: bytes | None


def _read(settings: TlsSettings) -> _Material:
    """The content of the files of ``settings``.

    Raises:
        SettingsError: A file cannot be read, is no PEM, or the key is not the certificate's.
    """
    named = (
        (settings.authorities, "MX_TLS_CA_PATH"),
        (settings.certificate, "MX_TLS_CERT_PATH"),
        (settings.key, "MX_TLS_KEY_PATH"),
    )
    material = _Material(*(None if path is None else read_bytes(path, variable) for path, variable in named))
    client_context(settings)  # gRPC itself does not say what is wrong
    return material


def client_context(settings: TlsSettings) -> ssl.SSLContext:
    """The client's context of Python's own TLS for ``settings``.

    Raises:
        SettingsError: A file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=settings.authorities)
    except (OSError, ssl.SSLError) as exc:
        message = f"the file that MX_TLS_CA_PATH names has no certificates in it: {settings.authorities}"
        raise SettingsError(message, hint="name a file of certificates in PEM") from exc
    if settings.certificate is not None:
        try:
            context.load_cert_chain(settings.certificate, settings.key, password=_no_password)
        except (OSError, ssl.SSLError, ValueError) as exc:
            mismatch = getattr(exc, "reason", "") == "KEY_VALUES_MISMATCH"
            what = "are not a pair" if mismatch else "cannot be used"
            message = (
                f"the certificate and the key that MX_TLS_CERT_PATH and MX_TLS_KEY_PATH name {what}: "
                f"{settings.certificate}, {settings.key}"
            )
            raise SettingsError(message, hint="name a certificate and its own key in PEM, not encrypted") from exc
    return context


def _no_password() -> str:
    """Raises, since OpenSSL would ask for the password on the terminal."""
    reason = "the key is encrypted"
    raise ValueError(reason)


class ClientTls:
    """A client's credentials.

    Args:
        settings: The files.

    Raises:
        SettingsError: The files cannot be used.
    """

    def __init__(self, settings: TlsSettings) -> None:
        self._files = WatchedFiles(settings.files, lambda: _client_credentials(_read(settings)))

    def credentials(self) -> tuple[grpc.ChannelCredentials, bool]:
        """The present credentials, and whether they have changed since the last call."""
        return self._files.changed()


def _client_credentials(material: _Material) -> grpc.ChannelCredentials:
    authorities = material.authorities or _system_authorities()
    return grpc.ssl_channel_credentials(authorities, material.key, material.certificate)


def _system_authorities() -> bytes | None:
    """The authorities of this system. gRPC does not look for them: it brings its own list."""
    path = ssl.get_default_verify_paths().cafile
    try:
        return Path(path).read_bytes() if path else None
    except OSError:
        return None


def _check_with_grpc(pair: tuple[bytes, bytes], settings: TlsSettings) -> None:
    """Listen with the pair: gRPC does not accept every key that OpenSSL accepts, and reports that only here."""
    server = grpc.server(ThreadPoolExecutor(1))
    try:
        server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    except RuntimeError as exc:
        message = f"gRPC cannot use the certificate and the key: {settings.certificate}, {settings.key}"
        raise SettingsError(
            message,
            cause="it takes RSA keys, and ECDSA keys on the curves P-256, P-384 and P-521, in plain PEM",
            hint="have a certificate made for such a key",
        ) from exc
    finally:
        server.stop(None)


def server_credentials(settings: TlsSettings, *, require_client_certificate: bool) -> grpc.ServerCredentials:
    """Credentials of a server. The files are checked for changes at each handshake.

    Args:
        settings: The files, with a certificate.
        require_client_certificate: Whether clients must show a certificate of one of the authorities.

    Raises:
        SettingsError: The files cannot be used.
    """

    def read() -> grpc.ServerCertificateConfiguration:
        material = _read(settings)
        assert material.key is not None  # noqa: S101 - for the type checker: there is a certificate
        assert material.certificate is not None  # noqa: S101 - likewise
        authorities = material.authorities if require_client_certificate else None
        pair = (material.key, material.certificate)
        _check_with_grpc(pair, settings)
        return grpc.ssl_server_certificate_configuration([pair], authorities)

    files = WatchedFiles(settings.files, read)

    def newer() -> Any:  # noqa: ANN401 - None if nothing has changed, which the annotations do not allow
        value, changed = files.changed()
        return value if changed else None

    return grpc.dynamic_ssl_server_credentials(
        files.value(), newer, require_client_authentication=require_client_certificate
    )


# -- the same files for Python's own TLS -------------------------------------------------------------------------------


def client_contexts(settings: TlsSettings) -> Callable[[], ssl.SSLContext]:
    """A function that returns a client's present context: another one when the files have changed.

    Raises:
        SettingsError: The files cannot be used.
    """

    def read() -> ssl.SSLContext:
        context = client_context(settings)
        # As gRPC: private authorities often do not keep to every rule of RFC 5280, which Python 3.13 asks for.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context

    return WatchedFiles(settings.files, read).value


def server_contexts(settings: TlsSettings, *, ask_for_certificates: bool) -> Callable[[], ssl.SSLContext]:
    """A function that returns a server's present context: another one when the files have changed.

    Args:
        settings: The files, with a certificate.
        ask_for_certificates: Whether clients are asked for a certificate of one of the authorities. They need not show
            one: the server looks at its names.

    Raises:
        SettingsError: The files cannot be used.
    """

    def read() -> ssl.SSLContext:
        _read(settings)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if settings.certificate is not None:
            context.load_cert_chain(settings.certificate, settings.key, password=_no_password)
        if ask_for_certificates and settings.authorities is not None:
            context.load_verify_locations(settings.authorities)
            context.verify_mode = ssl.CERT_OPTIONAL
        return context

    return WatchedFiles(settings.files, read).value
