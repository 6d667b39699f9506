"""Output of the commands: results to stdout, everything else to stderr; errors without a traceback."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from modelexpress_core.cli.interruption import signal_exit_code
from modelexpress_core.errors import InvalidURIError, ModelExpressError, PluginLoadError
from modelexpress_core.installing import install_command
from modelexpress_core.messages import hide_credentials_of_urls, printable, printable_lines
from modelexpress_core.plugins import plugin_packages

__all__ = [
    "JsonOption",
    "console",
    "errors_reported",
    "exit_code",
    "package_missing",
    "print_json",
    "progress_bars",
    "set_log_level",
    "silence_grpc",
    "status_console",
    "verbatim",
    "verbatim_lines",
]

_F = TypeVar("_F", bound=Callable[..., None])

#: Width of the output if there is no terminal: enough that no name is cut.
_WIDTH_WITHOUT_TERMINAL = 200

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else there.")]


def console() -> Console:
    """Return the console for results."""
    width_known = (sys.stdout and sys.stdout.isatty()) or "COLUMNS" in os.environ
    return Console(width=None if width_known else _WIDTH_WITHOUT_TERMINAL, highlight=False)


def status_console() -> Console:
    """Return the console for progress, warnings and errors."""
    return Console(stderr=True, highlight=False)


def progress_bars() -> Progress | None:
    """Return bars with bytes, rate and time left, which disappear at the end; None if there is no terminal."""
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


def verbatim(text: str) -> str:
    """Return ``text`` of others for a console: without markup, in one line, with special characters escaped."""
    return escape(printable(text))


def verbatim_lines(text: str) -> str:
    """Return ``text``, which may have several lines of ours, likewise."""
    return escape(printable_lines(text))


def print_json(value: object) -> None:
    """Print ``value`` as JSON to stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
    sys.stdout.flush()


def exit_code(exc: ModelExpressError) -> int:
    """Return the exit code for ``exc``: 2 for wrong usage, otherwise 1."""
    return 2 if isinstance(exc, InvalidURIError) else 1


def set_log_level(level: str) -> None:
    """Set the level of the loggers of core and of installed plugins.

    Others keep theirs: the details that SDKs log contain credentials.
    """
    for name in ("modelexpress_core", *plugin_packages()):
        logging.getLogger(name).setLevel(level)


def silence_grpc() -> None:
    """Stop gRPC's C core from logging to stderr, unless the user configured it: the commands report failures."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def package_missing(what: str, exc: ModuleNotFoundError) -> PluginLoadError:
    """Return the error for ``what`` (``"the server"``), whose packages the extra ``server`` installs."""
    message = f"{what} needs the package {exc.name}, which is not installed"
    return PluginLoadError(message, plugin="modelexpress-core", hint=install_command("modelexpress-core[server]"))


def errors_reported(command: _F) -> _F:
    """Wrap ``command`` so that our errors become a message on stderr (with --json also on stdout) and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the arguments of any command
        try:
            command(*args, **kwargs)
        except ModelExpressError as exc:
            _report(exc, as_json=bool(kwargs.get("json_output")))
            raise typer.Exit(exit_code(exc)) from exc
        except KeyboardInterrupt as exc:
            status_console().print("Interrupted; nothing was kept.", style="red")
            raise typer.Exit(signal_exit_code(exc)) from None
        except BrokenPipeError:
            # The reader of our output has closed it. Without this, Python would report the error again at exit.
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
        print_json(
            {
                "error": {
                    "type": type(exc).__name__,
                    "message": str(exc),
                    "hint": exc.hint and hide_credentials_of_urls(exc.hint),
                }
            }
        )
    first, *rest = str(exc).split("\n")
    out = status_console()
    out.print("Error:", style="bold red", end=" ")
    out.print(first, markup=False, soft_wrap=True)
    for line in rest:
        out.print(line, markup=False, soft_wrap=True)
