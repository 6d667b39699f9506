"""What the commands print, and where: results to stdout, everything else to stderr; errors without a traceback."""

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

#: Columns where nobody's terminal says how many: enough that no name is cut.
_WIDE = 200

#: C0, DEL and C1.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else there.")]


def console() -> Console:
    """For results."""
    return Console(
        width=None if (sys.stdout and sys.stdout.isatty()) or "COLUMNS" in os.environ else _WIDE, highlight=False
    )


def status_console() -> Console:
    """For progress, warnings and errors."""
    return Console(stderr=True, highlight=False)


def progress_bars() -> Progress | None:
    """Bars with bytes, rate and time left, which go away at the end; None where no terminal shows them."""
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
    """``text`` with its control characters as escapes: those of others must not steer the terminal, nor forge lines."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def print_json(value: object) -> None:
    """``value`` as JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
    sys.stdout.flush()


def exit_code(exc: ModelExpressError) -> int:
    """What a command ends with that failed with ``exc``: 2 where it was used wrongly, or else 1."""
    return 2 if isinstance(exc, InvalidURIError) else 1


def silence_grpc() -> None:
    """Keep gRPC's core from writing lines of its own to stderr, unless the user set it up: what fails we say."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def package_missing(what: str, exc: ModuleNotFoundError) -> PluginLoadError:
    """The error for ``what`` (``"the server"``), which the extra ``server`` brings the packages of."""
    message = f"{what} needs the package {exc.name}, which is not installed"
    return PluginLoadError(message, plugin="modelexpress-core", hint="pip install 'modelexpress-core[server]'")


def errors_reported(command: _F) -> _F:
    """``command``, with our errors as a message on stderr (and as JSON on stdout where asked for) and exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - whatever the command takes
        try:
            command(*args, **kwargs)
        except ModelExpressError as exc:
            _report(exc, as_json=bool(kwargs.get("json_output")))
            raise typer.Exit(exit_code(exc)) from exc
        except KeyboardInterrupt:
            status_console().print("Interrupted; nothing was kept.", style="red")
            raise typer.Exit(1) from None
        except BrokenPipeError:
            # Whoever read our output has gone. Python would complain once more while it flushes.
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
