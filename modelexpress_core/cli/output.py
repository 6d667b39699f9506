"""Output of commands: results on stdout, everything else on stderr, errors without a traceback."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from modelexpress_core.errors import InvalidURIError, ModelExpressError, PluginLoadError

__all__ = [
    "JsonOption",
    "console",
    "errors_reported",
    "exit_code",
    "package_missing",
    "print_json",
    "printable",
    "progress_bars",
    "silence_grpc",
    "status_console",
]

_F = TypeVar("_F", bound=Callable[..., None])

#: Columns of output without a terminal: enough to print names in full.
_WIDE = 200

#: C0, DEL and C1.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

JsonOption = Annotated[bool, typer.Option("--json", help="Print only JSON to stdout.")]


def console() -> Console:
    """The console for results."""
    return Console(
        width=None if (sys.stdout and sys.stdout.isatty()) or "COLUMNS" in os.environ else _WIDE, highlight=False
    )


def status_console() -> Console:
    """The console for progress, warnings and errors."""
    return Console(stderr=True, highlight=False)


def progress_bars() -> Progress | None:
    """Progress bars with bytes, rate and time left, which disappear at the end; None without a terminal."""
    status = status_console()
    if not status.is_terminal:
        return None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=status,
        transient=True,
    )


def printable(text: str) -> str:
    """``text`` with escaped control characters, which could otherwise control the terminal or forge lines."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def print_json(value: object) -> None:
    """Print ``value`` as JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
    sys.stdout.flush()


def exit_code(exc: ModelExpressError) -> int:
    """The exit code of a command that failed with ``exc``: 2 for wrong usage, else 1."""
    return 2 if isinstance(exc, InvalidURIError) else 1


def silence_grpc() -> None:
    """Stop gRPC's core from logging to stderr, unless the user configured it: commands report failures."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def package_missing(what: str, exc: ModuleNotFoundError) -> PluginLoadError:
    """The error for ``what`` (``"the server"``) if a package of the extra ``server`` is missing."""
    message = f"{what} needs the package {exc.name}, which is not installed"
    return PluginLoadError(message, plugin="modelexpress-core", hint="pip install 'modelexpress-core[server]'")


def errors_reported(command: _F) -> _F:
    """``command`` with our errors as a message on stderr (with ``--json`` also on stdout), and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the parameters of the command
        try:
            command(*args, **kwargs)
        except ModelExpressError as exc:
            _report(exc, as_json=bool(kwargs.get("json_output")))
            raise typer.Exit(exit_code(exc)) from exc
        except KeyboardInterrupt:
            status_console().print("Interrupted. Nothing was kept.", style="red")
            raise typer.Exit(1) from None
        except BrokenPipeError:
            # The reader of our output is gone. Without this, Python reports another error when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            status_console().print(f"Error: cannot write the output: {exc.strerror}", style="red")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from exc

    return run  # type: ignore[return-value]  # the same signature, which typer reads through __wrapped__


def _report(exc: ModelExpressError, *, as_json: bool) -> None:
    if as_json:
        print_json({"error": {"type": type(exc).__name__, "message": str(exc), "hint": exc.hint}})
    first, *rest = map(printable, str(exc).split("\n"))
    out = status_console()
    out.print("Error:", style="bold red", end=" ")
    out.print(first, markup=False, soft_wrap=True)
    for line in rest:
        out.print(line, markup=False, soft_wrap=True)
