"""``mx pull``: copies the files below a URI into a directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.progress import Progress, TaskID
from rich.table import Table

from modelexpress_core.cli.interruption import signal_exit_code
from modelexpress_core.cli.output import JsonOption, console, print_json, progress_bars, status_console, verbatim
from modelexpress_core.copying import PullProgress
from modelexpress_core.copying import pull as pull_files
from modelexpress_core.plugins import PluginManager
from modelexpress_core.report import PullReport, format_bytes, format_compared, format_files

__all__ = ["pull"]

#: Most files with a progress bar at one time.
_MAX_FILE_BARS = 8


class _Bars:
    """A bar for all files, and one for each file that is being copied."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._overall = progress.add_task("listing", total=None)
        self._files: dict[str, TaskID] = {}

    def __call__(self, event: PullProgress) -> None:
        bars = self._progress
        description = f"{event.files_done} of {event.files} files"
        bars.update(self._overall, description=description, completed=event.bytes_done, total=event.bytes)
        active = {file.name: file for file in event.active[:_MAX_FILE_BARS]}
        for name in self._files.keys() - active.keys():
            bars.remove_task(self._files.pop(name))
        for name, file in active.items():
            if name not in self._files:
                self._files[name] = bars.add_task(f"  {verbatim(name)}", total=file.size)
            bars.update(self._files[name], completed=file.bytes_done)


def pull(
    uri: Annotated[str, typer.Argument(help="A directory or one file: a URI or a path.", metavar="URI")],
    directory: Annotated[
        str, typer.Argument(help="Directory for the files; created if missing.", metavar="DIR", show_default=False)
    ],
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Copy no weights: only configuration and tokenizer files.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Copy files into a directory and verify them. Only complete files appear there. Run again to resume."""
    plugins = PluginManager.discover()
    try:
        with _bars() as bars:
            report = pull_files(uri, directory, weights=not no_weights, on_progress=bars, plugins=plugins)
    except KeyboardInterrupt as exc:
        message = "Interrupted. Complete files are in place; run the same command again to resume."
        status_console().print(message, style="red")
        raise typer.Exit(signal_exit_code(exc)) from None
    if json_output:
        print_json(report.to_dict())
    else:
        _print(report)


@contextmanager
def _bars() -> Iterator[_Bars | None]:
    """Show progress bars if there is a terminal."""
    progress = progress_bars()
    if progress is None:
        yield None
        return
    with progress:
        yield _Bars(progress)


def _print(report: PullReport) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    skipped = [file for file in report.file_list if file.status == "skipped"]
    left_out = [f"{count} {kind}" for kind, count in report.left_out.items() if count]
    digests = [f"{algorithm} of {format_files(count)}" for algorithm, count in report.verified_digests.items()]
    rows = {
        "pulled": report.uri,
        "into": report.directory,
        "storage": f"{report.storage['plugin']} {report.storage['version']}",
        "files": f"{format_files(report.files)}, {format_bytes(report.bytes)}",
        "copied": f"{format_bytes(report.bytes_copied)} in {report.requests} reads, {report.retries} of them retries",
        "resumed": format_bytes(report.bytes_resumed) if report.bytes_resumed else "",
        "skipped": f"{format_files(len(skipped))}, {format_bytes(report.bytes_skipped)}, already there"
        if skipped
        else "",
        "left out": ", ".join(left_out),
        "time": f"{report.seconds:.2f} s, {format_bytes(report.bytes_per_second)}/s",
        "concurrency": f"at most {report.concurrency} reads at once",
        "verified": ", ".join(["sizes", *digests]),
        "chunks": format_compared(report.bytes_compared, report.bytes_compared_by_server),
        "channel": report.channel,
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, verbatim(value))
    console().print(table)
