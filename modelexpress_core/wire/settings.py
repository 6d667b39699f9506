"""Settings of TLS, of the token that a client sends, and of how a server authenticates callers."""

from __future__ import annotations

from attrs import frozen

from modelexpress_core.contracts.rights import Rights
from modelexpress_core.errors import SettingsError
from modelexpress_core.settings import boolean, env

__all__ = ["AuthSettings", "TlsSettings", "TokenSettings", "missing_for_certificates"]


@frozen
class TlsSettings:
    """The files of TLS, for clients and servers. They are read again when they have changed."""

    authorities: str | None = env(
        "MX_TLS_CA_PATH",
        default=None,
        help="Authorities that the other side's certificate is checked against (PEM); unset: those of the system.",
    )
    certificate: str | None = env(
        "MX_TLS_CERT_PATH",
        default=None,
        help="Certificate of this process, with those up to the authority (PEM): a server then speaks TLS, "
        "a client shows it to servers that ask.",
    )
    key: str | None = env("MX_TLS_KEY_PATH", default=None, help="Private key of that certificate (PEM, not encrypted).")
    peer_name: str | None = env(
        "MX_TLS_PEER_NAME",
        default=None,
        help="Name that the certificates of workers have to have, instead of that in their address: for workers that "
        "are reached by addresses which no certificate can list, as pods are.",
    )

    def __attrs_post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            one, other = "MX_TLS_CERT_PATH", "MX_TLS_KEY_PATH"
            one, other = (one, other) if self.key is None else (other, one)
            message = f"a certificate and its key belong together: {one} is set, and {other} is not set"
            raise SettingsError(message, hint="set both MX_TLS_CERT_PATH and MX_TLS_KEY_PATH, or none")

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are set."""
        return tuple(path for path in (self.authorities, self.certificate, self.key) if path is not None)


@frozen
class TokenSettings:
    """The token that a client sends."""

    path: str = env(
        "MX_AUTH_TOKEN_PATH",
        default="/var/run/secrets/tokens/modelexpress",
        help="File with the token for the server; read again when it changes. Without the file none is sent.",
    )
    plaintext: bool = env(
        "MX_AUTH_TOKEN_PLAINTEXT",
        default=False,
        converter=boolean,
        help="Also send the token without TLS to a server on another host. By default it goes over TLS or loopback.",
    )


_EVERYTHING = Rights()


def _word(text: str) -> str:
    return text.strip().lower()


@frozen
class AuthSettings:
    """How a server authenticates callers."""

    mode: str = env(
        "MX_AUTH_MODE",
        default="off",
        converter=_word,
        help="off: every call is answered; token: callers need a token that is in MX_AUTH_TOKENS_PATH; mtls: callers "
        "need a certificate that an authority in MX_TLS_CA_PATH signed; or the name of a plugin's authenticator.",
    )
    tokens: str | None = env(
        "MX_AUTH_TOKENS_PATH",
        default=None,
        help="File with a line name:token for each caller (or name:sha256:digest); read again when it changes.",
    )
    rights: Rights = env(  # noqa: RUF009 - it makes a field, as for the others
        "MX_AUTH_RIGHTS",
        default=_EVERYTHING,
        converter=Rights.from_text,
        help="What each caller may do with which models, as JSON; easier to write in the configuration file. Unset: "
        "each authenticated caller may do everything.",
    )

    def __attrs_post_init__(self) -> None:
        if self.mode == "off" and self.tokens is not None:
            message = "MX_AUTH_TOKENS_PATH is set, and MX_AUTH_MODE is off: everybody would be answered"
            raise SettingsError(message, hint="set MX_AUTH_MODE=token, or unset MX_AUTH_TOKENS_PATH")
        if self.mode == "off" and self.rights.rules:
            message = "MX_AUTH_RIGHTS is set, and MX_AUTH_MODE is off: everybody would be answered"
            raise SettingsError(message, hint="set MX_AUTH_MODE to token or mtls, or unset MX_AUTH_RIGHTS")

    def check(self, tls: TlsSettings) -> None:
        """Check that a server has what the mode needs: tokens, or files of ``tls``.

        Raises:
            SettingsError: Something is not set.
        """
        if self.mode == "token":
            self.tokens_path()
        missing = missing_for_certificates(tls)
        if self.mode == "mtls" and missing:
            message = f"MX_AUTH_MODE is mtls, and {missing} not set"
            raise SettingsError(message, hint="mtls needs MX_TLS_CA_PATH, MX_TLS_CERT_PATH and MX_TLS_KEY_PATH")

    def tokens_path(self) -> str:
        """The file of tokens.

        Raises:
            SettingsError: It is not set.
        """
        if self.tokens is None:
            message = "MX_AUTH_MODE is token, and MX_AUTH_TOKENS_PATH does not say where the tokens are"
            raise SettingsError(message, hint="name a file there, with a line name:token for each caller")
        return self.tokens


def missing_for_certificates(tls: TlsSettings) -> str:
    """The variables that a server needs for clients' certificates and lacks, with a verb; empty if it lacks none."""
    required = (("MX_TLS_CA_PATH", tls.authorities), ("MX_TLS_CERT_PATH", tls.certificate))
    missing = [name for name, path in required if path is None]
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'}" if missing else ""
