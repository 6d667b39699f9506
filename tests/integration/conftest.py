"""Checkpoints on disk and on a real S3 server, and the command line."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from devtools.models import generate_sharded, real_checkpoint
from devtools.seaweedfs import SeaweedFS
from tests.support.commands import Commands
from tests.support.serving import Serving


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None) -> None:
    pass


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated checkpoint in three files with an index, 15 MB."""
    return generate_sharded(tmp_path_factory.mktemp("model") / "sharded", shards=3, layers=2, hidden=512)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real checkpoint, 91 MB in one file."""
    return real_checkpoint()


@pytest.fixture(scope="session")
def uploaded(s3_server: SeaweedFS, sharded: Path) -> str:
    """The URI of the generated checkpoint on the S3 server."""
    return s3_server.upload(sharded, "models", "sharded")


@pytest.fixture
def environ(s3_server: SeaweedFS) -> dict[str, str]:
    """Variables of a user who may read everything on the S3 server."""
    return s3_server.environ()


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """Starts commands in processes of their own, which have imported torch already."""
    with closing(Commands("torch", "safetensors.torch")) as commands:
        yield commands


@pytest.fixture(scope="session")
def server_commands() -> Iterator[Commands]:
    """The same for servers, which need no torch; some tests measure their memory."""
    with closing(Commands()) as commands:
        yield commands


@pytest.fixture
def mx(commands: Commands, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own."""

    def mx(*arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return commands.run(arguments, {**os.environ, "HOME": str(tmp_path), **(environ or {})}, timeout=120)

    return mx


@pytest.fixture
def on_terminal() -> Callable[..., tuple[int, bytes]]:
    """Runs the command line on a terminal; the exit code, and what a person would see."""

    def on_terminal(*arguments: str, **environ: str) -> tuple[int, bytes]:
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "modelexpress_core", *arguments],
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120", **environ},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        seen = b""
        while select.select([master], [], [], 60)[0]:
            try:
                part = os.read(master, 65536)
            except OSError:  # the other end was closed
                break
            if not part:
                break
            seen += part
        os.close(master)
        return process.wait(60), seen

    return on_terminal


@pytest.fixture
def expected() -> Callable[[Path], dict[str, torch.Tensor]]:
    """What the safetensors library reads from a directory."""

    def expected(directory: Path) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            state.update(load_file(file))
        return state

    return expected


@pytest.fixture
def assert_equal() -> Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], None]:
    """Compares names, shapes, dtypes and bits."""

    def assert_equal(expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor]) -> None:
        assert sorted(expected) == sorted(actual)
        for name, tensor in expected.items():
            other = actual[name]
            assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), name
            assert torch.equal(
                tensor.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
            ), name

    return assert_equal


@pytest.fixture
def start(server_commands: Commands) -> Iterator[Callable[..., Serving]]:
    """Starts a server of ours, with arguments and variables."""
    started: list[Serving] = []

    def start(*arguments: str, **environ: str) -> Serving:
        started.append(Serving(server_commands, *arguments, **environ))
        return started[-1]

    yield start
    for server in started:
        server.end()
