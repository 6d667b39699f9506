"""A server with a cache in this process, for tests that change what it caches all the time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from modelexpress_core.plugins import PluginManager
from modelexpress_core.server.app import Server
from modelexpress_core.server.settings import CacheSettings, ServerSettings
from modelexpress_core.server.stores.memory import MemoryStore

__all__ = ["serving_cache"]

_SECONDS = 60.0


@contextlib.contextmanager
def serving_cache(directory: Path, sources: tuple[str, ...], environ: Mapping[str, str]) -> Iterator[Server]:
    """Serve during the ``with`` block, on free ports of loopback; ``directory`` has the cached models."""
    started = threading.Event()
    ended: list[BaseException] = []
    stopping: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    server = Server(
        ServerSettings(host="127.0.0.1", port=0, metrics_port=0),
        MemoryStore(),
        PluginManager.discover(environ),
        cache=CacheSettings(directory=str(directory), sources=sources, min_free_bytes=1, bulk_port=_any_port()),
        environ=environ,
    )

    async def serve() -> None:
        stop = asyncio.Event()
        stopping.append((asyncio.get_running_loop(), stop))
        async with server:
            started.set()
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as exc:  # noqa: BLE001 - raised below
            ended.append(exc)
        finally:
            started.set()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    assert started.wait(_SECONDS)
    try:
        if ended:
            raise ended[0]
        yield server
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended
            stopping[0][0].call_soon_threadsafe(stopping[0][1].set)
        thread.join(_SECONDS)


def _any_port() -> int:
    """A port for the bulk channel; another one is taken where it is in use."""
    return 18002
