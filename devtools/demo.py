"""The demonstration: a real checkpoint and a generated one, loaded from a disk, from a real S3 server and from workers.

Every tensor that was loaded is compared, bit by bit, with what the safetensors library reads from the files.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import modelexpress_core as mx
from devtools.demo_peers import show_peers
from devtools.models import generate_sharded, real_checkpoint
from devtools.seaweedfs import SeaweedFS
from modelexpress_core.events import LoadFinished
from modelexpress_core.report import format_bytes


class _Reports:
    """An observer that keeps the report of the last load."""

    report: mx.LoadReport

    @mx.hookimpl
    def mx_load_finished(self, event: LoadFinished) -> None:
        self.report = event.report


def _expected(directory: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        state.update(load_file(file))
    return state


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _equal(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> int:
    """Return how many tensors are equal in name, shape, dtype and every bit."""
    return sum(
        name in actual
        and actual[name].shape == tensor.shape
        and actual[name].dtype == tensor.dtype
        and torch.equal(_bits(actual[name]), _bits(tensor))
        for name, tensor in expected.items()
    )


def main() -> int:
    """Run the demonstration; the exit code is 0 if all tensors are equal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]  # the test server has other users
    table = Table(title="Loaded and compared with the safetensors library", title_justify="left", box=None)
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for column in ("tensors", "size", "reads", "seconds", "goodput", "equal"):
        table.add_column(column, justify="right", no_wrap=True)
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        console.print("Generating a sharded checkpoint and starting an S3 server (SeaweedFS) ...")
        directories = {
            "all-MiniLM-L6-v2": real_checkpoint(),
            "generated": generate_sharded(Path(scratch) / "generated"),
        }
        with SeaweedFS() as server:
            environ = {**os.environ, **server.environ()}
            plugins = mx.PluginManager.discover(environ)
            reports = _Reports()
            plugins.register(reports, name="demo")
            for label, directory in directories.items():
                expected = _expected(directory)
                console.print(f"Uploading {label} ...")
                uploaded = server.upload(directory, "models", label.lower())
                for uri in (directory.as_uri(), uploaded):
                    state = mx.load_state_dict(uri, environ=environ, plugins=plugins)
                    report = reports.report
                    equal = _equal(expected, state)
                    failed = equal != len(expected) or len(state) != len(expected)
                    failures += failed
                    table.add_row(
                        label,
                        uri.partition("://")[0] + "://",
                        str(len(state)),
                        format_bytes(report.bytes_needed),
                        str(report.requests),
                        f"{report.seconds:.2f}",
                        f"{format_bytes(report.goodput_bytes_per_second)}/s",
                        f"[red]{equal} of {len(expected)}[/]" if failed else f"[green]all {equal}[/]",
                    )
            console.print()
            console.print(table)
            console.print()
            failures += show_peers(console, uploaded, expected, environ)
    if failures:
        console.print(f"\n[red]{failures} loads differ.[/]")
        return 1
    console.print("\nEvery tensor is equal, bit for bit.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
