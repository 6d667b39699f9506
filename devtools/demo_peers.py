"""The second half of the demonstration: one worker loads a model from S3, and others read it from that worker."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.table import Table

from devtools.demo_worker import sha256
from modelexpress_core.plugins import TRANSPORT, PluginManager
from modelexpress_core.report import format_bytes

__all__ = ["show_peers"]

_START_SECONDS = 60

#: Transports that are shown, and what installs them.
_TRANSPORTS = {"nixl": "mx-nixl", "grpc": "mx-grpc-stream"}

#: NIXL's library, by its names.
_NIXL = ("nixl", "nixl_cu12", "nixl_cu13")


def show_peers(console: Console, uri: str, expected: Mapping[str, torch.Tensor], environ: Mapping[str, str]) -> int:
    """Load ``uri`` in worker A, and from A in worker B and so on, one for each transport; print a table.

    Returns:
        How many of the loads differ from ``expected``, or came from elsewhere.
    """
    offered = {
        scheme for each in PluginManager.discover(environ).records(TRANSPORT) for scheme in each.provider.schemes
    }
    if not any(importlib.util.find_spec(name) for name in _NIXL):
        offered.discard("nixl")
    for scheme, package in _TRANSPORTS.items():
        if scheme not in offered:
            console.print(f"{package}, or its library, is not installed, so no worker reads over {scheme}://.")
    table = Table(title="Read by workers, and compared by the SHA-256 of each tensor", title_justify="left", box=None)
    for column in ("worker", "served by", "over"):
        table.add_column(column, no_wrap=True)
    for column in ("size", "seconds", "goodput", "of raw sockets", "equal"):
        table.add_column(column, justify="right", no_wrap=True)
    digests = {name: sha256(tensor) for name, tensor in expected.items()}
    raw = _raw_bytes_per_second(sum(tensor.nbytes for tensor in expected.values()))
    failures = 0
    with contextlib.ExitStack() as running:
        directory = Path(running.enter_context(tempfile.TemporaryDirectory()))
        layout = directory / "layout.json"
        layout.write_text(json.dumps({name: (str(t.dtype)[6:], list(t.shape)) for name, t in expected.items()}))
        url = running.enter_context(_server(environ))
        variables = {**environ, "MODEL_EXPRESS_URL": url, "MX_WORKER_HOST": "127.0.0.1", "MX_WORKER_GRPC_PORT": "0"}

        def load(name: str, over: str, variables: Mapping[str, str], *publish: str) -> IO[str]:
            nonlocal failures
            answers = running.enter_context(_worker([uri, str(layout), *publish], variables))
            said = json.loads(answers.readline() or "{}")
            report = said.get("report", {"uri": "", "bytes_needed": 0, "seconds": 0.0, "goodput_bytes_per_second": 0.0})
            equal = sum(said.get("sha256", {}).get(name) == digest for name, digest in digests.items())
            right = equal == len(digests) and report["uri"].startswith(f"{over}://")
            failures += not right
            rate = report["goodput_bytes_per_second"]
            table.add_row(
                name,
                "the bucket" if over == "s3" else "A",
                report["uri"].partition("://")[0] + "://",
                format_bytes(report["bytes_needed"]),
                f"{report['seconds']:.2f}",
                f"{format_bytes(rate)}/s",
                f"{rate / raw:.0%}",
                f"[green]all {equal}[/]" if right else f"[red]{equal} of {len(digests)}[/]",
            )
            return answers

        console.print("Starting a server, and worker A, which loads from S3 and offers its model ...")
        # Without RDMA, workers do not offer their memory over NIXL by themselves.
        answers = load("A", "s3", {**variables, "MX_NIXL_OFFER": "1"}, "publish")
        if not answers.readline():  # it says so once others can find it
            return failures + 1
        for name, scheme in zip("BC", sorted(offered & _TRANSPORTS.keys(), reverse=True), strict=False):
            others = ",".join(package for other, package in _TRANSPORTS.items() if other != scheme)
            console.print(f"Starting worker {name}, which reads from A over {scheme}:// ...")
            load(name, scheme, {**variables, "MX_DISABLED_PLUGINS": others})
    console.print()
    console.print(table)
    return failures


@contextlib.contextmanager
def _server(environ: Mapping[str, str]) -> Iterator[str]:
    """``mx serve`` on free ports; gives its address."""
    command = [sys.executable, "-m", "modelexpress_core", "serve", "--port", "0", "--metrics-port", "0"]
    with _ended(command, environ, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        timer = threading.Timer(_START_SECONDS, process.kill)
        timer.start()
        lines = []
        for line in process.stderr:
            if match := re.match(r"serving on (\S+),", line):
                timer.cancel()
                threading.Thread(target=process.stderr.read, daemon=True).start()  # so that it never waits
                yield match[1]
                return
            lines.append(line)
        message = f"mx serve did not start: {''.join(lines)}"
        raise RuntimeError(message)


@contextlib.contextmanager
def _worker(arguments: list[str], environ: Mapping[str, str]) -> Iterator[IO[str]]:
    command = [sys.executable, "-m", "devtools.demo_worker", *arguments]
    with _ended(command, environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout


@contextlib.contextmanager
def _ended(command: list[str], environ: Mapping[str, str], **streams: Any) -> Iterator[subprocess.Popen[str]]:  # noqa: ANN401
    """A process that is ended with the block."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with subprocess.Popen(command, env={**environ, "PYTHONPATH": path}, text=True, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def _raw_bytes_per_second(total: int) -> float:
    """How fast plain sockets carry ``total`` bytes over loopback, into memory that was touched before."""
    chunk = memoryview(bytes(1 << 20))
    memory = memoryview(bytearray(b"\1") * len(chunk))
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def send() -> None:
            with listening.accept()[0] as sending:
                for _ in range(0, total, len(chunk)):
                    sending.sendall(chunk)

        thread = threading.Thread(target=send)
        thread.start()
        with socket.create_connection(listening.getsockname()) as receiving:
            begun = time.perf_counter()
            received = 0
            while count := receiving.recv_into(memory):
                received += count
            seconds = time.perf_counter() - begun
        thread.join()
    return received / seconds
