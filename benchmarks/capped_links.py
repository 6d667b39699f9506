"""Hosts of a network of our own: network namespaces, whose links to the reader have a rate each (Linux, as root)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from attrs import frozen

from devtools.missing import ToolMissingError

__all__ = ["CappedLinks", "capped_links"]

#: Bytes that a link may send at once, and how long a packet may wait: large enough for the segments of TCP.
_BURST_BYTES = 256 << 10
_LATENCY_MS = 50


@frozen
class CappedLinks:
    """One host that reads, and several that are read, each over a link of its own.

    Attributes:
        reader: Start of a command that runs on the reader's host.
        sources: The same for each source.
        addresses: Address of each source.
    """

    reader: Sequence[str]
    sources: Sequence[Sequence[str]]
    addresses: Sequence[str]
    _devices: Sequence[str]

    def set_rate(self, number: int, bytes_per_second: float) -> None:
        """Set how fast a source sends."""
        bucket = ["tbf", "rate", f"{bytes_per_second * 8:.0f}bit", "burst", f"{_BURST_BYTES}b"]
        device = ["dev", self._devices[number], "root", *bucket, "latency", f"{_LATENCY_MS}ms"]
        _run([*self.sources[number], "tc", "qdisc", "replace", *device])


@contextlib.contextmanager
def capped_links(count: int) -> Iterator[CappedLinks]:
    """Make the hosts, and remove them at the end.

    Raises:
        ToolMissingError: This user or this machine cannot make network namespaces.
    """
    if os.geteuid() or not all(map(shutil.which, ("ip", "tc"))):
        message = "network namespaces: run as root, with the programs ip and tc (apt install iproute2)"
        raise ToolMissingError(message)
    prefix = f"mx{os.getpid()}"
    reader = f"{prefix}r"
    sources = [f"{prefix}s{number}" for number in range(count)]
    with contextlib.ExitStack() as made:
        for name in (reader, *sources):
            try:
                _run(["ip", "netns", "add", name])
            except subprocess.CalledProcessError as exc:
                message = f"network namespaces: allow this container to make them: {exc.stderr.strip()}"
                raise ToolMissingError(message) from exc
            made.callback(_run, ["ip", "netns", "del", name])
            _run(["ip", "-n", name, "link", "set", "lo", "up"])
        for number, name in enumerate(sources):
            ends = ["link", "add", f"to{number}", "type", "veth", "peer", "name", "eth0", "netns", name]
            _run(["ip", "-n", reader, *ends])
            for host, device, last in ((reader, f"to{number}", 1), (name, "eth0", 2)):
                _run(["ip", "-n", host, "addr", "add", f"10.250.{number}.{last}/30", "dev", device])
                _run(["ip", "-n", host, "link", "set", device, "up"])
        yield CappedLinks(
            ("ip", "netns", "exec", reader),
            [("ip", "netns", "exec", name) for name in sources],
            [f"10.250.{number}.2" for number in range(count)],
            ["eth0"] * count,
        )


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
