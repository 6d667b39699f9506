"""What core itself offers, registered the way any plugin's offers are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import (
    Candidate,
    CommandProvider,
    LoadRequest,
    MetadataStoreProvider,
    StorageCapabilities,
    StorageProvider,
)
from modelexpress_core.server.settings import ConfigPath, LogSettings, ServerSettings, SpanSettings, StoreVariables
from modelexpress_core.sources.settings import ServerAddress

if TYPE_CHECKING:
    from modelexpress_core.server.stores import MetadataStore
    from modelexpress_core.storage import Storage
    from modelexpress_core.uri import ModelURI


def _open_file(uri: ModelURI, settings: Mapping[str, str]) -> Storage:
    from modelexpress_core.storage.file import open_file

    return open_file(uri, settings)


def _open_memory(uri: ModelURI, settings: Mapping[str, str]) -> Storage:
    from modelexpress_core.storage.memory import open_memory

    return open_memory(uri, settings)


def _open_memory_store(uri: ModelURI, settings: Mapping[str, str]) -> MetadataStore:  # noqa: ARG001 - a factory's signature
    from modelexpress_core.server.stores.memory import MemoryStore

    return MemoryStore()


def _serve() -> Callable[..., None]:
    from modelexpress_core.cli.serve import serve

    return serve


def _health() -> Callable[..., None]:
    from modelexpress_core.cli.sources import health

    return health


def _sources() -> Callable[..., None]:
    from modelexpress_core.cli.sources import sources

    return sources


@hookimpl
def mx_register_commands() -> list[CommandProvider]:
    """``mx serve``, and those that ask a server."""
    return [
        CommandProvider(
            "serve",
            _serve,
            help="Run a server: it knows which worker holds which model.",
            settings=(ConfigPath, ServerSettings, StoreVariables, LogSettings, SpanSettings),
        ),
        CommandProvider("health", _health, help="Ask a server for its version and uptime.", settings=ServerAddress),
        CommandProvider(
            "sources",
            _sources,
            help="List the workers that hold models, as a server knows them.",
            settings=ServerAddress,
        ),
    ]


@hookimpl
def mx_register_storages() -> list[StorageProvider]:
    """``file`` and ``memory``."""
    return [
        # Gaps are skipped, however short: on a network file system bytes are what is dear, and rows of a matrix that
        # are split among ranks have gaps. What lies in the page cache comes no faster with more threads than there are
        # processors; a disk or a network file system shows soon that it can do more.
        StorageProvider(
            "file",
            ("file",),
            _open_file,
            capabilities=StorageCapabilities(
                read_runs=True,
                concurrency=min(8, len(os.sched_getaffinity(0))),
                most_concurrency=32,
                request_cost_bytes=128,
            ),
        ),
        StorageProvider(
            "memory",
            ("memory",),
            _open_memory,
            capabilities=StorageCapabilities(concurrency=4, most_concurrency=8, request_cost_bytes=128),
        ),
    ]


def _open_redis_store(uri: ModelURI, settings: Mapping[str, str]) -> MetadataStore:
    from modelexpress_core.server.stores.redis import open_redis

    return open_redis(uri, settings)


@hookimpl
def mx_register_metadata_stores() -> list[MetadataStoreProvider]:
    """``memory``, ``redis`` and ``rediss``."""
    return [
        MetadataStoreProvider("memory", ("memory",), _open_memory_store),
        MetadataStoreProvider(
            "redis", ("redis", "rediss"), _open_redis_store, install_hint="modelexpress-core[server]"
        ),
    ]


@hookimpl(trylast=True)
def mx_rank_candidates(request: LoadRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:  # noqa: ARG001 - the hook's signature
    """In the order in which they were found."""
    return candidates
