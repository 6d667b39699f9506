"""``mx inspect``: shows the contents of a checkpoint, from its headers."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer
from rich.table import Table

from modelexpress_core.api import open_checkpoint
from modelexpress_core.checkpoint import Checkpoint
from modelexpress_core.cli.output import JsonOption, console, print_json, verbatim
from modelexpress_core.report import format_bytes

__all__ = ["inspect"]


def inspect(
    uri: Annotated[
        str, typer.Argument(help="A directory, an index, or one safetensors file: a URI or a path.", metavar="URI")
    ],
    json_output: JsonOption = False,
) -> None:
    """Show tensors, dtypes, shapes, sizes, files and versions; reads headers only."""
    checkpoint = open_checkpoint(uri)
    if json_output:
        print_json(_as_data(checkpoint))
    else:
        _print(checkpoint)


def _as_data(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "uri": str(checkpoint.uri),
        "storage": checkpoint.provider,
        "bytes": checkpoint.tensor_bytes,
        "dtypes": _bytes_by_dtype(checkpoint),
        "files": [
            {
                "name": file.name,
                "bytes": file.size,
                "version": file.version,
                "header_bytes": file.header_bytes,
                "digests": dict(file.digests),
                "metadata": dict(file.metadata),
            }
            for file in checkpoint.files
        ],
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor.length,
                "file": tensor.file.name,
                "offset": tensor.offset,
            }
            for tensor in checkpoint.tensors.values()
        ],
    }


def _bytes_by_dtype(checkpoint: Checkpoint) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        counts[tensor.dtype] += tensor.length
    return dict(counts.most_common())


def _print(checkpoint: Checkpoint) -> None:
    out = console()
    tensors = Table(box=None, pad_edge=False, header_style="bold")
    tensors.add_column("tensor", overflow="fold")
    tensors.add_column("dtype")
    tensors.add_column("shape")
    tensors.add_column("size", justify="right")
    tensors.add_column("file", overflow="fold")
    for tensor in checkpoint.tensors.values():
        shape = verbatim(str(list(tensor.shape)))
        tensors.add_row(
            verbatim(tensor.name), tensor.dtype, shape, format_bytes(tensor.length), verbatim(tensor.file.name)
        )
    out.print(tensors)
    files = Table(box=None, pad_edge=False, header_style="bold")
    files.add_column("file", overflow="fold")
    files.add_column("tensors", justify="right")
    files.add_column("size", justify="right")
    files.add_column("version", overflow="fold")
    held = Counter(tensor.file.name for tensor in checkpoint.tensors.values())
    for file in checkpoint.files:
        files.add_row(
            verbatim(file.name), str(held[file.name]), format_bytes(file.size), verbatim(file.version or "not pinned")
        )
    out.print()
    out.print(files)
    dtypes = ", ".join(f"{dtype} {format_bytes(count)}" for dtype, count in _bytes_by_dtype(checkpoint).items())
    summary = f"{len(checkpoint.tensors)} tensors, {format_bytes(checkpoint.tensor_bytes)} ({dtypes})"
    out.print(f"\n{verbatim(str(checkpoint.uri))}: {summary} in {len(checkpoint.files)} files")
