"""Requests as they are sent: URLs, headers, and what HTTP does not allow in them."""

from __future__ import annotations

import pytest

from modelexpress_core.storage.http import Origin, Request


@pytest.mark.parametrize(
    ("url", "expected", "authority", "host_and_port"),
    [
        ("http://host/a", Origin("host", 80, False), "host", "host:80"),
        ("https://host/a", Origin("host", 443, True), "host", "host:443"),
        ("https://host:80/a", Origin("host", 80, True), "host:80", "host:80"),
        ("http://[::1]:9000/a", Origin("::1", 9000, False), "[::1]:9000", "[::1]:9000"),
        ("https://[2001:db8::1]/a", Origin("2001:db8::1", 443, True), "[2001:db8::1]", "[2001:db8::1]:443"),
    ],
)
def test_the_origin_of_a_url(url: str, expected: Origin, authority: str, host_and_port: str) -> None:
    """Ports are the scheme's unless given; an IPv6 address has brackets in headers, and none for the socket."""
    origin = Origin.of_url(url)

    assert expected == origin
    assert authority == origin.authority
    assert host_and_port == origin.host_and_port


@pytest.mark.parametrize(
    "url", ["ftp://host/", "http:///a", "http://user:secret@host/", "http://ho st/", "http://h\nx/"]
)
def test_urls_that_are_refused(url: str) -> None:
    """Only a host over http or https, and never credentials."""
    with pytest.raises(ValueError, match=r"expected an http|not a host") as caught:
        Origin.of_url(url)

    assert "secret" not in str(caught.value)


def test_a_request_as_it_is_sent() -> None:
    """Host and Accept-Encoding come first; headers that are added later come last."""
    request = Request.to_url("GET", "https://host/a%20b?c=d", [("Authorization", "token")])

    sent = request.with_headers({"Range": "bytes=0-9"}).encoded()

    expected = (
        b"GET /a%20b?c=d HTTP/1.1\r\nHost: host\r\nAccept-Encoding: identity\r\n"
        b"Authorization: token\r\nRange: bytes=0-9\r\n\r\n"
    )
    assert expected == sent
    assert expected.replace(b"Range: bytes=0-9\r\n", b"") == request.encoded()


def test_a_request_through_a_proxy() -> None:
    """The absolute form, and the proxy's own headers."""
    request = Request.to_url("GET", "http://[::1]:81/a?b", [("Host", "signed.example")])

    sent = request.encoded(through_proxy=True, proxy_lines=b"Proxy-Authorization: x\r\n")

    assert sent.startswith(b"GET http://[::1]:81/a?b HTTP/1.1\r\n")
    assert b"Host: signed.example\r\n" in sent
    assert b"Host: [::1]" not in sent
    assert sent.endswith(b"Proxy-Authorization: x\r\n\r\n")


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("http://host/a b", []),
        ("http://host/\u00e9", []),
        ("http://host/a", [("X", "a\r\nY: b")]),
        ("http://host/a", [("X", "a\nb")]),
        ("http://host/a", [("X", "a\0b")]),
        ("http://host/a", [("X: Y", "a")]),
        ("http://host/a", [("", "a")]),
        ("http://host/a", [("X", "\u4e00")]),
    ],
)
def test_a_request_cannot_be_split(url: str, headers: list[tuple[str, str]]) -> None:
    """Spaces, line breaks and other control characters are refused, wherever they come in; values are not shown."""
    with pytest.raises(ValueError, match=r"header|percent-encoded") as caught:
        Request.to_url("GET", url, headers)

    assert not [value for _, value in headers if value in str(caught.value) and len(value) > 1]
    with pytest.raises(ValueError, match="header"):
        Request.to_url("GET", "http://host/a").with_headers({"X": "a\r\nb"})


def test_a_request_does_not_show_its_secrets() -> None:
    """Neither headers nor the query, where signed URLs have them."""
    request = Request.to_url("GET", "https://host/a?sig=s3cret", [("Authorization", "s3cret")])

    assert "s3cret" not in repr(request)
