"""Endpoints, as users write servers, and as clients connect to them."""

from __future__ import annotations

import pytest

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import InvalidURIError


@pytest.mark.parametrize(
    ("text", "expected", "url"),
    [
        ("server", Endpoint("server", 8001), "http://server:8001"),
        ("server:1", Endpoint("server", 1), "http://server:1"),
        (" http://server:1/ ", Endpoint("server", 1), "http://server:1"),
        ("https://server", Endpoint("server", 8001, tls=True), "https://server:8001"),
        ("[::1]:65535", Endpoint("::1", 65535), "http://[::1]:65535"),
        ("https://[fe80::1]", Endpoint("fe80::1", 8001, tls=True), "https://[fe80::1]:8001"),
    ],
)
def test_addresses_of_servers(text: str, expected: Endpoint, url: str) -> None:
    """The port is 8001 by default; brackets belong to the address of IPv6 in text alone."""
    endpoint = Endpoint.parse(text)

    assert expected == endpoint
    assert url == str(endpoint)
    assert url.partition("://")[2] == endpoint.target


@pytest.mark.parametrize(
    "text",
    ["", "server:65536", "server:port", "ftp://server", "server/path", "a b", "::1", "https://", "user:word@host"],
)
def test_what_is_no_address(text: str) -> None:
    """Is refused, without a password in it."""
    with pytest.raises(InvalidURIError, match="no address of a server") as raised:
        Endpoint.parse(text)

    assert "word" not in str(raised.value)
