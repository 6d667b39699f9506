"""A server in a process of its own, as ``mx serve`` starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import urllib.request

__all__ = ["Serving"]

_START_SECONDS = 60


class Serving:
    """A server on free ports of loopback, from when it says that it serves; ended at the end of its ``with`` block.

    Args:
        *arguments: More options.
        **environ: More variables.

    Attributes:
        url: Where its gRPC services are.
        metrics_url: Where its metrics are.
        health_url: Where its health alone is, without TLS; None where that was not asked for.
        process: Its process; what it says goes to ``process.stderr``.
    """

    def __init__(self, *arguments: str, **environ: str) -> None:
        command = [sys.executable, "-m", "modelexpress_core", "serve", "--host", "127.0.0.1"]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--metrics-port", "0", *arguments],
            env={**os.environ, **environ},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        timer = threading.Timer(_START_SECONDS, self.process.kill)
        timer.start()
        line = self.process.stderr.readline()
        timer.cancel()
        match = re.fullmatch(r"serving on (\S+), metrics on (\S+), metadata in [^\s,]+(?:, health on (\S+))?\n", line)
        if match is None:
            self.process.kill()
            raise AssertionError(line + self.process.stderr.read())
        self.url, self.metrics_url, self.health_url = match[1], f"http://{match[2]}", match[3]

    def metrics(self) -> str:
        """What it counted until now."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            return str(answer.read().decode())

    def end(self) -> None:
        """At once, without a word."""
        self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
