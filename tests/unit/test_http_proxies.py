"""Which proxy leads where: the variables, their order, and the exceptions."""

from __future__ import annotations

import pytest

from modelexpress_core.storage.http import Origin, Proxies, Proxy

HTTP, HTTPS = Origin("weights.example.com", 80, tls=False), Origin("weights.example.com", 443, tls=True)


@pytest.mark.parametrize(
    ("environ", "for_http", "for_https"),
    [
        ({}, None, None),
        ({"HTTP_PROXY": "http://one:1"}, "http://one:1", None),
        ({"HTTPS_PROXY": "http://one:1"}, None, "http://one:1"),
        ({"ALL_PROXY": "http://one:1"}, "http://one:1", "http://one:1"),
        ({"all_proxy": "http://one:1", "HTTPS_PROXY": "http://two:2"}, "http://one:1", "http://two:2"),
        ({"https_proxy": "http://one:1", "HTTPS_PROXY": "http://two:2"}, None, "http://one:1"),
        ({"https_proxy": "", "HTTPS_PROXY": "http://two:2"}, None, None),
        ({"https_proxy": "", "ALL_PROXY": "http://two:2"}, "http://two:2", None),
        ({"HTTPS_PROXY": "one:3128"}, None, "http://one:3128"),
        ({"HTTPS_PROXY": "//one:3128"}, None, "http://one:3128"),
        ({"HTTPS_PROXY": "http://one"}, None, "http://one:80"),
        ({"HTTPS_PROXY": "http://[::1]:3128"}, None, "http://[::1]:3128"),
        ({"HTTPS_PROXY": "https://one"}, None, "https://one:443"),
        ({"HTTP_PROXY": "http://one:1", "REQUEST_METHOD": "GET"}, None, None),
        ({"http_proxy": "http://one:1", "REQUEST_METHOD": "GET"}, "http://one:1", None),
    ],
)
def test_the_proxy_of_each_scheme(environ: dict[str, str], for_http: str | None, for_https: str | None) -> None:
    """Lower case goes before capitals, a scheme's own before ALL_PROXY, and an empty one turns it off."""
    proxies = Proxies.from_environ(environ)

    found = [proxies.for_origin(origin) for origin in (HTTP, HTTPS)]

    assert [for_http, for_https] == [None if proxy is None else str(proxy) for proxy in found]


def test_the_first_environment_that_names_a_variable_counts() -> None:
    """Variables that are given to a load go before the process's, in either case."""
    proxies = Proxies.from_environ({"HTTPS_PROXY": "http://one:1"}, {"https_proxy": "http://two:2", "NO_PROXY": "none"})

    assert "http://one:1" == str(proxies.for_origin(HTTPS))
    assert ("none",) == proxies.exceptions


@pytest.mark.parametrize(
    ("no_proxy", "host", "port", "direct"),
    [
        ("*", "host.example.com", 443, True),
        ("example.com", "host.example.com", 443, True),
        ("example.com", "example.com", 443, True),
        (".example.com", "example.com", 443, True),
        ("*.example.com", "host.example.com", 443, True),
        ("EXAMPLE.com", "host.Example.COM", 443, True),
        ("example.com.", "host.example.com", 443, True),
        ("example.com", "notexample.com", 443, False),
        ("host", "host.example.com", 443, False),
        ("other, ,host.example.com", "host.example.com", 443, True),
        ("example.com:443", "host.example.com", 443, True),
        ("example.com:80", "host.example.com", 443, False),
        ("", "host.example.com", 443, False),
        (".", "host.example.com", 443, False),
        ("10.0.0.0/8", "10.1.2.3", 443, True),
        ("10.0.0.0/8", "11.1.2.3", 443, False),
        ("10.1.2.3", "10.1.2.3", 443, True),
        ("10.1.2.3:80", "10.1.2.3", 443, False),
        ("10.1.2", "10.1.2.3", 443, False),
        ("2.3", "10.1.2.3", 443, False),
        ("::1", "::1", 443, True),
        ("[::1]", "::1", 443, True),
        ("[::1]:80", "::1", 443, False),
        ("0:0::1", "::1", 443, True),
        ("fd00::/8", "fd12::1", 443, True),
        ("fd00::/8", "fe12::1", 443, False),
        ("127.0.0.1", "localhost", 443, False),
    ],
)
def test_exceptions(no_proxy: str, host: str, port: int, direct: bool) -> None:
    """Domains with all below them, addresses, networks, and each of these at one port only."""
    proxies = Proxies.from_environ({"HTTPS_PROXY": "http://proxy:1", "NO_PROXY": no_proxy})

    assert direct is (proxies.for_origin(Origin(host, port, tls=True)) is None)


def test_credentials_of_a_proxy_are_sent_and_never_shown() -> None:
    """They are percent-decoded (RFC 3986) and encoded as RFC 7617 says."""
    url = "http://us%40er:s3cr%3Aet@proxy:3128"

    proxy = Proxy.of_url(url)

    assert "Basic dXNAZXI6czNjcjpldA==" == proxy.authorization
    assert "http://proxy:3128" == str(proxy)
    shown = f"{proxy!r} {Proxies.from_environ({'HTTPS_PROXY': url})!r}"
    assert [] == [secret for secret in ("s3cr", "dXNAZXI6") if secret in shown]


@pytest.mark.parametrize(
    "url", ["http://:3128", "http://user:s3cret@:3128", "http://proxy:s3cret", "http://[::1", "://"]
)
def test_a_proxy_that_is_no_url(url: str) -> None:
    """It is refused, and not repeated: any part of it may be a password."""
    with pytest.raises(ValueError, match="the proxy") as caught:
        Proxy.of_url(url)

    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
