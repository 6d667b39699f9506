"""The network of the benchmark ``p2p_sources``."""

from __future__ import annotations

import contextlib
import subprocess

import pytest

from benchmarks.capped_links import capped_links
from devtools.missing import ToolMissingError

pytestmark = pytest.mark.slow


def test_hosts_with_links_are_made_and_removed() -> None:
    """Each source reaches the reader over a link with its rate."""
    with contextlib.ExitStack() as made:
        try:
            links = made.enter_context(capped_links(2))
        except ToolMissingError as exc:  # a right that the machine gives, and no tool that could be installed
            pytest.skip(str(exc))
        links.set_rate(1, 5e6)
        routes = _output(*links.reader, "ip", "route")
        bucket = _output(*links.sources[1], "tc", "qdisc", "show", "dev", "eth0")
        hosts = [command[-1] for command in (links.reader, *links.sources)]
        assert set(hosts) <= {line.split()[0] for line in _output("ip", "netns", "list").splitlines()}

    assert all(f"{address.rpartition('.')[0]}." in routes for address in links.addresses)
    assert "rate 40Mbit" in bucket
    assert not any(host in _output("ip", "netns", "list") for host in hosts)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
