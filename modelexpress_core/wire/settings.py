"""How a process proves who it is, how it knows the other side, and whom it answers."""

from __future__ import annotations

from attrs import frozen

from modelexpress_core.errors import SettingsError
from modelexpress_core.settings import env, one_of

__all__ = ["AUTH_MODES", "AuthSettings", "TlsSettings", "TokenSettings"]

AUTH_MODES = ("off", "token", "mtls")


@frozen
class TlsSettings:
    """The files of TLS, whichever side of a connection a process is on. They are read again when they change."""

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
        help="File with the token that is sent to servers; read again when it changes. Without the file none is sent.",
    )


@frozen
class AuthSettings:
    """Whose calls a server answers."""

    mode: str = env(
        "MX_AUTH_MODE",
        default="off",
        converter=one_of(AUTH_MODES),
        help="off: everybody's; token: of those whose token stands in MX_AUTH_TOKENS_PATH; "
        "mtls: of those whose certificate an authority in MX_TLS_CA_PATH signed.",
    )
    tokens: str | None = env(
        "MX_AUTH_TOKENS_PATH",
        default=None,
        help="File with a line name:token for each caller (or name:sha256:digest); read again when it changes.",
    )

    def __attrs_post_init__(self) -> None:
        if self.mode == "token" and self.tokens is None:
            message = "MX_AUTH_MODE is token, and MX_AUTH_TOKENS_PATH does not say where the tokens are"
            raise SettingsError(message, hint="write a line name:token for each caller into a file, and name it there")
        if self.mode == "off" and self.tokens is not None:
            message = "MX_AUTH_TOKENS_PATH is set, and MX_AUTH_MODE is off: everybody would be answered"
            raise SettingsError(message, hint="set MX_AUTH_MODE=token, or unset MX_AUTH_TOKENS_PATH")

    def check(self, tls: TlsSettings) -> None:
        """Return where ``tls`` has what these ask for.

        Raises:
            SettingsError: It lacks something.
        """
        lacking = [
            name
            for name, path in (("MX_TLS_CA_PATH", tls.authorities), ("MX_TLS_CERT_PATH", tls.certificate))
            if path is None
        ]
        if self.mode == "mtls" and lacking:
            message = (
                f"MX_AUTH_MODE is mtls, and {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not set"
            )
            raise SettingsError(message, hint="mtls needs MX_TLS_CA_PATH, MX_TLS_CERT_PATH and MX_TLS_KEY_PATH")
