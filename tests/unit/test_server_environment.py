"""Factories of plugins read what the server uses, wherever it was set."""

from __future__ import annotations

from modelexpress_core.server.environment import with_settings
from modelexpress_core.server.settings import ServerSettings
from modelexpress_core.settings import from_env
from modelexpress_core.wire.settings import AuthSettings, TlsSettings


def test_settings_take_the_place_of_their_variables() -> None:
    """Every value that was set comes back, and a variable that a flag or the file has overruled does not."""
    settings = ServerSettings(host="::1", port=1, health_port=None, heartbeat_timeout_seconds=0.5, metadata="redis://h")
    tls = TlsSettings(certificate="/cert", key="/key")
    auth = AuthSettings("token", "/tokens")
    environ = {
        "MODEL_EXPRESS_HEALTH_PORT": "7",
        "MX_TLS_CA_PATH": "/old",
        "MX_HEARTBEAT_TIMEOUT_SECS": "9",
        "OTHER": "x",
    }

    merged = with_settings(environ, settings, tls, auth)

    assert (settings, tls, auth) == tuple(from_env(cls, merged) for cls in (ServerSettings, TlsSettings, AuthSettings))
    assert "x" == merged["OTHER"]
    assert "9" == environ["MX_HEARTBEAT_TIMEOUT_SECS"]
