"""What ``mx serve`` warns of when it starts."""

from __future__ import annotations

import pytest

from modelexpress_core.cli.serve import risk
from modelexpress_core.wire.settings import AuthSettings, TlsSettings

_TLS = TlsSettings(certificate="cert.pem", key="key.pem")
_TOKENS = AuthSettings(mode="token", tokens="tokens")


@pytest.mark.parametrize(
    ("host", "auth", "tls", "expected"),
    [
        ("127.0.0.1", AuthSettings(), TlsSettings(), ""),
        ("[::1]", AuthSettings(), TlsSettings(), ""),
        ("localhost", _TOKENS, TlsSettings(), ""),
        ("0.0.0.0", AuthSettings(), TlsSettings(), "MX_AUTH_MODE is off"),
        ("[::]", AuthSettings(), _TLS, "MX_AUTH_MODE is off"),
        ("10.0.0.1", _TOKENS, TlsSettings(), "tokens without TLS"),
        ("10.0.0.1", _TOKENS, _TLS, ""),
    ],
)
def test_a_server_beyond_this_machine_warns(host: str, auth: AuthSettings, tls: TlsSettings, expected: str) -> None:
    """That it answers every caller, or that tokens can be read on the network."""
    warning = risk(host, auth, tls)

    assert expected in warning if expected else not warning
