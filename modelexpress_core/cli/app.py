"""Builds the command line: built-in commands, commands of plugins, logging, exit codes."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from modelexpress_core.cli import doctor, explain, inspect, load, plugins, pull, settings
from modelexpress_core.cli.output import errors_reported, set_log_level
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.messages import hide_credentials, hide_credentials_of_urls, printable_lines
from modelexpress_core.plugins import COMMAND, CORE, PluginManager

__all__ = ["build_app"]

_HELP = "Load model weights from storages and peers straight into the memory where they belong."
_EPILOG = "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 ended by Ctrl-C, 143 ended by SIGTERM."
_LEVELS = ("debug", "info", "warning", "error")


class _Formatter(logging.Formatter):
    """Escapes what names of others could control a terminal with, and hides credentials of URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(hide_credentials_of_urls(super().format(record)))


def _on_version(requested: bool) -> None:
    if requested:
        typer.echo(f"mx {version(CORE)}")
        raise typer.Exit


def _log_level(text: str) -> str:
    if text.lower() not in _LEVELS:
        message = f"expected one of {', '.join(_LEVELS)}: {hide_credentials(text)!r}"
        raise typer.BadParameter(message)
    return text.upper()


def _begin(
    log_level: Annotated[
        str,
        typer.Option(
            help="Log at this level, to stderr: debug, info, warning or error.", callback=_log_level, metavar="LEVEL"
        ),
    ] = "warning",
    show_version: Annotated[  # noqa: ARG001 - its callback does the work
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_on_version),
    ] = False,
) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(levelname)s %(message)s"))
    logging.basicConfig(level="WARNING", handlers=[handler], force=True)
    set_log_level(log_level)


def build_app() -> typer.Typer:
    """Build the application, with the commands of plugins. A broken plugin never stops the built-in commands."""
    app = typer.Typer(
        name="mx",
        help=_HELP,
        epilog=_EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_begin)
    app.command("load")(errors_reported(load.load))
    app.command("inspect")(errors_reported(inspect.inspect))
    app.command("explain")(errors_reported(explain.explain))
    app.command("doctor")(errors_reported(doctor.doctor))
    app.command("pull")(errors_reported(pull.pull))
    app.command("plugins")(errors_reported(plugins.plugins))
    app.command("settings")(errors_reported(settings.settings))
    _add_plugin_commands(app)
    return app


def _add_plugin_commands(app: typer.Typer) -> None:
    logging.getLogger("modelexpress_core").setLevel(logging.ERROR)  # each command warns about broken plugins itself
    try:
        found = tuple(each.provider for each in PluginManager.discover(os.environ).records(COMMAND))
    except ModelExpressError:  # reported by the command that needs the setting or the plugin
        found = ()
    finally:
        logging.getLogger("modelexpress_core").setLevel(logging.NOTSET)
    built_in = {command.name for command in app.registered_commands}
    for provider in found:
        if provider.name in built_in:
            message = "skipping a plugin's command, because mx has a built-in command of that name: %s"
            logging.getLogger(__name__).warning(message, provider.name)
            continue
        try:
            command = provider.factory()
        except Exception as exc:  # noqa: BLE001 - a plugin's error must not stop other commands
            logging.getLogger(__name__).warning("skipping a plugin's command, %s, which fails: %s", provider.name, exc)
            continue
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=provider.name, help=provider.help)
        else:
            own_help = None if command.__doc__ else provider.help
            app.command(provider.name, help=own_help, short_help=provider.help)(errors_reported(command))
