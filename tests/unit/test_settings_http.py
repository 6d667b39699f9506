"""Settings that storages over HTTP share: declared in one line each, the same for every store."""

from __future__ import annotations

import pytest
from attrs import frozen

from modelexpress_core.errors import SettingsError
from modelexpress_core.settings import describe, env, from_env
from modelexpress_core.settings.http import (
    anonymous,
    ca_bundle,
    connect_timeout,
    http_url,
    is_http_url,
    read_timeout,
    refuse_credentials_in_urls,
)


@frozen
class _WebSettings:
    """How a web server is reached."""

    endpoint: str | None = env("MX_WEB_ENDPOINT", default=None, converter=http_url("https://a", "http://b"), help="-")
    ca_bundle: str | None = ca_bundle("MX_WEB_CA_BUNDLE", "REQUESTS_CA_BUNDLE", unset="those of this system")
    anonymous: bool = anonymous("MX_WEB", "without credentials", "sites")
    connect_timeout_seconds: float = connect_timeout("MX_WEB")
    read_timeout_seconds: float = read_timeout("MX_WEB")

    def __attrs_post_init__(self) -> None:
        refuse_credentials_in_urls({"MX_WEB_ENDPOINT": self.endpoint}, hint="write them elsewhere")


def test_each_has_its_variable_default_and_text() -> None:
    """As `mx settings` and the reference show them."""
    rows = {row.name: (row.value, row.help) for row in describe(_WebSettings, {}, owner="mx-web")}

    assert {
        "MX_WEB_ENDPOINT": ("", "-"),
        "MX_WEB_CA_BUNDLE": ("", "File with the trusted certificate authorities; unset: those of this system."),
        "MX_WEB_ANONYMOUS": ("False", "Send requests without credentials, for public sites."),
        "MX_WEB_CONNECT_TIMEOUT_SECONDS": ("10.0", "How long to wait for a connection."),
        "MX_WEB_READ_TIMEOUT_SECONDS": ("30.0", "How long to wait for the next bytes."),
    } == rows


def test_they_are_read() -> None:
    """An alias too; a slash at the end of a URL is left out."""
    settings = from_env(
        _WebSettings,
        {
            "MX_WEB_ENDPOINT": " https://web.example:8443/models/ ",
            "REQUESTS_CA_BUNDLE": "/ca.pem",
            "MX_WEB_ANONYMOUS": "yes",
            "MX_WEB_CONNECT_TIMEOUT_SECONDS": "3",
            "MX_WEB_READ_TIMEOUT_SECONDS": "0.5",
        },
    )

    assert _WebSettings("https://web.example:8443/models", "/ca.pem", True, 3.0, 0.5) == settings


@pytest.mark.parametrize("url", ["https://user:s3cret@web.example", "https://web.example/?sig=s3cret", "s3cret@web"])
def test_a_url_with_credentials_is_refused_and_not_shown(url: str) -> None:
    """The variable is named, with where credentials go."""
    with pytest.raises(SettingsError, match="MX_WEB_ENDPOINT must not contain credentials") as caught:
        from_env(_WebSettings, {"MX_WEB_ENDPOINT": url})

    assert "write them elsewhere" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["web.example", "ftp://web.example", "https://", "https://web:x", "https://web/#part"])
def test_what_is_no_url_is_refused(url: str) -> None:
    """With examples."""
    with pytest.raises(SettingsError, match="expected a URL such as https://a or http://b"):
        from_env(_WebSettings, {"MX_WEB_ENDPOINT": url})

    assert not is_http_url(url)
