"""A server in a process of its own, as ``mx serve`` starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tests.support.commands import Commands

__all__ = ["Serving"]

_START_SECONDS = 60


#: Lines that may come before the server says that it serves: gRPC's own log, which its threads write under load, and
#: warnings of files of tokens and keys, as tests write them.
_LINES_BEFORE = re.compile(r"[IWE]\d{4} [\d:.]+ +\d+ \S+\.cc:\d+\] |.* all users of this machine can read ")


class Serving:
    """A server on free ports of loopback, from when it says that it serves; ended at the end of its ``with`` block.

    Args:
        commands: Start it.
        *arguments: More options.
        before: Options of ``mx`` itself.
        **environ: More variables.

    Attributes:
        url: Where its gRPC services are.
        metrics_url: Where its metrics are.
        health_url: Where its health alone is, without TLS; None where that was not asked for.
        metadata: Where it says that its metadata is.
        process: Its process; what it says goes to ``process.stderr``, and what it prints to ``process.stdout``.
    """

    def __init__(self, commands: Commands, *arguments: str, before: Sequence[str] = (), **environ: str) -> None:
        here = ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
        self.process = commands.start([*before, "serve", *here, *arguments], {**os.environ, **environ})
        timer = threading.Timer(_START_SECONDS, self.process.kill)
        timer.start()
        line = next((line for line in self.process.stderr if not _LINES_BEFORE.match(line)), "")
        timer.cancel()
        match = re.fullmatch(r"serving on (\S+), metrics on (\S+), metadata in ([^\s,]+)(?:, health on (\S+))?\n", line)
        if match is not None:
            self.url, self.metrics_url, self.metadata = match[1], f"http://{match[2]}", match[3]
            self.health_url = match[4]
        elif line.startswith("{") and "grpc" in (said := json.loads(line)):
            self.url, self.metrics_url, self.metadata = said["grpc"], f"http://{said['metrics']}", said["metadata"]
            self.health_url = said.get("health")
        else:
            self.process.kill()
            raise AssertionError(line + self.process.communicate()[1])

    def metrics(self) -> str:
        """What it counted until now."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            return str(answer.read().decode())

    def ended(self) -> tuple[str, str]:
        """Told to end, what it printed and what it said from then on."""
        self.process.terminate()
        # Not with communicate, which would pass over what was read along with the first line.
        with ThreadPoolExecutor(1) as pool:
            printed = pool.submit(self.process.stdout.read)
            said = self.process.stderr.read()
        assert 128 + signal.SIGTERM == self.process.wait(_START_SECONDS), said
        return printed.result(), said

    def end(self) -> None:
        """At once, without a word."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
