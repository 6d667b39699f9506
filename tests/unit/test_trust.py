"""Which records of workers a reader believes, and where it connects."""

from __future__ import annotations

import pytest

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.sources.settings import TrustSettings
from modelexpress_core.sources.trust import Claim, reason_to_distrust


def reason(
    host: str,
    *,
    publisher: str = "me",
    address: str = "10.1.2.3",
    caller: str = "me",
    publishers: tuple[str, ...] = (),
    hosts: tuple[str, ...] = (),
) -> str:
    claim = Claim(Endpoint(host, 6555), publisher, address)
    return reason_to_distrust(claim, caller, TrustSettings(publishers, hosts))


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "0xa9fea9fe",
        "2852039166",
        "169.16689662",
        "0251.0376.0251.0376",
        "::ffff:169.254.169.254",
        "fe80::1",
        "fe80::1%eth0",
        "0.0.0.0",
        "0",
        "::",
        "224.0.0.1",
        "ff02::1",
    ],
)
@pytest.mark.parametrize("caller", ["", "me"])
def test_no_record_leads_to_an_address_without_a_worker(host: str, caller: str) -> None:
    """However it is spelled, whoever published it, and whatever is allowed: link-local, unspecified, multicast."""
    assert "where no worker can be" in reason(host, caller=caller, address=host, hosts=("*", "0.0.0.0/0", "::/0"))


def test_where_callers_are_not_authenticated_records_are_believed() -> None:
    """Nothing is known of their publishers."""
    assert reason("10.9.9.9", publisher="", address="", caller="") == ""


@pytest.mark.parametrize(
    ("publisher", "publishers", "expected"),
    [
        ("me", (), ""),
        ("other", (), "MX_TRUSTED_PUBLISHERS"),
        ("other", ("other",), ""),
        ("worker-7", ("trainer", "worker-*"), ""),
        ("Worker-7", ("worker-*",), "MX_TRUSTED_PUBLISHERS"),
        ("", ("*",), "MX_TRUSTED_PUBLISHERS"),  # published before callers were authenticated
    ],
)
def test_the_publisher_is_the_reader_itself_or_trusted(
    publisher: str, publishers: tuple[str, ...], expected: str
) -> None:
    """By its authenticated name."""
    found = reason("10.1.2.3", publisher=publisher, publishers=publishers)

    assert expected in found if expected else not found


@pytest.mark.parametrize(
    ("host", "address", "hosts", "trusted"),
    [
        ("10.1.2.3", "10.1.2.3", (), True),
        ("::ffff:10.1.2.3", "10.1.2.3", (), True),
        ("2001:DB8:0::1", "2001:db8::1", (), True),
        ("10.1.2.4", "10.1.2.3", (), False),
        ("10.1.2.4", "10.1.2.3", ("10.1.0.0/16",), True),
        ("10.1.2.4", "10.1.2.3", ("10.1.2.4",), True),
        ("10.2.2.4", "10.1.2.3", ("10.1.0.0/16", "2001:db8::/32"), False),
        ("2001:db8::9", "10.1.2.3", ("10.1.0.0/16", "2001:db8::/32"), True),
        ("127.0.0.1", "10.1.2.3", (), False),
        ("127.0.0.1", "", (), False),
        ("w-1.pods.example.com", "10.1.2.3", (), False),
        ("w-1.pods.example.com", "10.1.2.3", ("*.pods.example.com",), True),
        ("W-1.Pods.Example.Com.", "10.1.2.3", ("*.pods.example.com",), True),
        ("pods.example.com.evil.example", "10.1.2.3", ("*.pods.example.com",), False),
        ("10.1.2.4", "10.1.2.3", ("*",), False),  # a pattern is for names
        ("0x0a010204", "10.1.2.3", ("*",), False),
        ("0x0a010203", "10.1.2.3", (), True),
        ("", "", ("",), False),
    ],
)
def test_the_worker_is_where_it_was_published_from_or_where_the_user_says(
    host: str, address: str, hosts: tuple[str, ...], trusted: bool
) -> None:
    """Addresses are compared in their usual form; names need a pattern."""
    found = reason(host, address=address, hosts=hosts)

    assert (found == "") == trusted, found


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST", True),
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost.example.com", False),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("127.0.0.1.example.com", False),
        ("2130706433", False),  # 127.0.0.1, but another spelling is no reason to send a token in plain text
    ],
)
def test_what_is_loopback(host: str, expected: bool) -> None:
    """Tokens go there in plain text."""
    assert expected == Endpoint(host, 8001).is_loopback
