"""``mx serve``: the server that knows which worker holds which model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Annotated, Any

import attrs
import typer

from modelexpress_core.cli.output import status_console
from modelexpress_core.errors import PluginLoadError
from modelexpress_core.plugins import PluginManager
from modelexpress_core.server.settings import ServerSettings
from modelexpress_core.settings import from_env
from modelexpress_core.uri import ModelURI
from modelexpress_core.wire.settings import AuthSettings, TlsSettings

__all__ = ["serve"]


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", metavar="ADDRESS")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gRPC services.", min=0, max=65535)] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port of the metrics.", min=0, max=65535)] = None,
    health_port: Annotated[
        int | None, typer.Option(help="Port of health alone, without TLS, for probes.", min=0, max=65535)
    ] = None,
    metadata: Annotated[
        str | None, typer.Option(help="Where metadata is kept: memory:// or redis://host:6379/0", metavar="URI")
    ] = None,
) -> None:
    """Run a server: workers publish what they hold, and others find it. Ends on SIGTERM or Ctrl-C."""
    settings = from_env(ServerSettings, os.environ)
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "metrics_port": metrics_port,
        "health_port": health_port,
        "metadata": metadata,
    }
    settings = attrs.evolve(settings, **{name: value for name, value in given.items() if value is not None})
    tls, auth = from_env(TlsSettings, os.environ), from_env(AuthSettings, os.environ)
    asyncio.run(_run(settings, tls, auth))


async def _run(settings: ServerSettings, tls: TlsSettings, auth: AuthSettings) -> None:
    try:
        from modelexpress_core.server.app import Server
    except ModuleNotFoundError as exc:
        raise _missing(exc) from exc
    uri = ModelURI.parse(settings.metadata)
    store = PluginManager.discover().open_metadata_store(uri, os.environ)
    async with Server(settings, store, tls=tls, auth=auth) as server:
        health = f", health on {settings.host}:{server.health_port}" if server.health_port else ""
        status_console().print(
            f"serving on {settings.host}:{server.port}, metrics on {settings.host}:{server.metrics_port}/metrics, "
            f"metadata in {uri}{health}",
            markup=False,
            soft_wrap=True,
        )
        await _told_to_end()
        status_console().print("ending: calls that are under way may end first")


async def _told_to_end() -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, ended.set)
    await ended.wait()


def _missing(exc: ModuleNotFoundError) -> PluginLoadError:
    message = f"the server needs the package {exc.name}, which is not installed"
    return PluginLoadError(message, plugin="modelexpress-core", hint="pip install 'modelexpress-core[server]'")
