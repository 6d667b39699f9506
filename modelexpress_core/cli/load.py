"""``mx load``: loads a checkpoint into memory, and reports time, bytes and memory."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from modelexpress_core.api import load_state_dict
from modelexpress_core.cli.output import JsonOption, console, print_json, progress_bars, verbatim
from modelexpress_core.errors import ModelExpressError, PlacementError
from modelexpress_core.events import LoadFinished, LoadProgress, LoadStarted
from modelexpress_core.hooks import hookimpl
from modelexpress_core.plugins import PluginManager
from modelexpress_core.report import LoadReport, format_bytes, format_compared, format_files

if TYPE_CHECKING:
    import torch

__all__ = ["load"]


class _LoadObserver:
    """Observes the load: keeps the report, and updates the progress bar if there is one."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task = bar.add_task("opening", total=None) if bar else None
        self._description = ""
        self.report: LoadReport | None = None

    @hookimpl
    def mx_load_started(self, event: LoadStarted) -> None:
        self._description = f"{event.tensors} tensors"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=self._description, total=event.checkpoint_bytes)

    @hookimpl
    def mx_load_progress(self, event: LoadProgress) -> None:
        if self._bar is not None and self._task is not None:
            description = f"{self._description} (limit: {event.limiter})" if event.limiter else self._description
            total = max(event.bytes_planned, event.bytes_done)
            self._bar.update(self._task, description=description, completed=event.bytes_done, total=total)

    @hookimpl
    def mx_load_finished(self, event: LoadFinished) -> None:
        self.report = event.report


def load(
    uri: Annotated[
        str, typer.Argument(help="A directory, an index, or one safetensors file: a URI or a path.", metavar="URI")
    ],
    json_output: JsonOption = False,
    digests: Annotated[
        Path | None,
        typer.Option(
            help="Write a JSON object to this file: tensor name to SHA-256 (hex) of its bytes.", metavar="FILE"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Create the tensors on this device.")] = "cpu",
) -> None:
    """Load a checkpoint into memory and report time, bytes and memory."""
    plugins = PluginManager.discover()
    with _digest_file(digests) as write_digests:
        bar = progress_bars()
        observer = _LoadObserver(bar)
        plugins.register(observer, name="mx-load-command")
        if bar is None:
            state = load_state_dict(uri, device=_checked(device), plugins=plugins)
        else:
            with bar:
                state = load_state_dict(uri, device=_checked(device), plugins=plugins)
        if digests is not None:
            write_digests(state)
    if observer.report is None:
        message = "the load ended without a report"
        raise ModelExpressError(message, hint="this is a bug in ModelExpress; please report it")
    if json_output:
        print_json(observer.report.to_dict())
    else:
        _print(observer.report, digests)


def _checked(device: str) -> torch.device:
    import torch

    try:
        checked = torch.device(device)
        torch.empty(1, device=checked)
    except (RuntimeError, AssertionError) as exc:  # torch built without CUDA asserts
        reason = str(exc).split("\n")[0]
        raise PlacementError(f"cannot create tensors on {device!r}: {reason}", hint="use --device cpu") from exc
    if checked.type == "meta":
        raise PlacementError("the meta device has no memory to load into", hint="use --device cpu")
    return checked


@contextmanager
def _digest_file(path: Path | None) -> Iterator[_DigestWriter]:
    """Open the file before the load, so that a wrong path fails early; move it into place when it is complete."""
    if path is None:
        yield _DigestWriter(None)
        return
    if path.is_dir() or path.suffix == ".safetensors":
        reason = "it is a directory" if path.is_dir() else "it has the name of a checkpoint file"
        raise ModelExpressError(f"cannot write the digests to {path}: {reason}", hint="choose another file")
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as file:
            temporary = Path(file.name)
            try:
                yield _DigestWriter(file)
                mask = os.umask(0)
                os.umask(mask)
                # By its descriptor: others may write to the directory, and put a link in the file's place.
                os.fchmod(file.fileno(), 0o666 & ~mask)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as exc:
        raise ModelExpressError(
            f"cannot write the digests to {path}: {exc.strerror}", hint="check directory, permissions and space"
        ) from exc


class _DigestWriter:
    def __init__(self, file: IO[str] | None) -> None:
        self._file = file

    def __call__(self, state: Mapping[str, torch.Tensor]) -> None:
        if self._file is None:
            return
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            hexes = pool.map(_sha256, state.values())
            digests = dict(zip(state, hexes, strict=True))
        json.dump(digests, self._file, indent=0, sort_keys=True)
        self._file.flush()


def _sha256(tensor: torch.Tensor) -> str:
    from modelexpress_core.placement.memory import bytes_at

    tensor = tensor.cpu().contiguous()
    if not tensor.numel():
        return hashlib.sha256().hexdigest()
    return hashlib.sha256(bytes_at(tensor.data_ptr(), tensor.numel() * tensor.itemsize)).hexdigest()


def _print(report: LoadReport, digests: Path | None) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    storage = f"{report.storage['plugin']} {report.storage['version']}"
    rows = {
        "loaded": report.uri,
        "storage": storage,
        "tensors": f"{report.tensors} in {format_files(report.files)}",
        "needed": format_bytes(report.bytes_needed),
        "fetched": f"{format_bytes(report.bytes_fetched)} in {report.requests} reads, {report.retries} of them retries",
        "time": f"{report.seconds:.2f} s, {format_bytes(report.goodput_bytes_per_second)}/s",
        "concurrency": f"at most {report.concurrency} reads at once",
        "verified": ", ".join(f"{kind} of {format_files(count)}" for kind, count in report.verified.items() if count),
        "peak RSS": format_bytes(report.peak_rss_bytes),
    }
    if compared := format_compared(report.bytes_compared, report.bytes_compared_by_server):
        rows["chunks"] = compared
    if report.channel:
        rows["channel"] = report.channel
    if digests is not None:
        rows["digests"] = str(digests)
    for name, value in rows.items():
        table.add_row(name, verbatim(value))
    console().print(table)
