"""Settings and plugins of a load, and how it opens a checkpoint with them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import lru_cache

from modelexpress_core.checkpoint import Checkpoint, open_files
from modelexpress_core.contracts.storage import Storage
from modelexpress_core.fetch import RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.plugins import PluginManager
from modelexpress_core.providers import StorageProvider
from modelexpress_core.registry import Registered
from modelexpress_core.settings import LoadSettings, PluginSettings, from_env, variables
from modelexpress_core.uri import ModelURI

__all__ = ["LoadContext", "plugins_for", "redacted_uris"]

_log = logging.getLogger(__name__)


def redacted_uris(uri: ModelURI) -> Callable[[str], str]:
    """Return a function from the path of an object in the storage of ``uri`` to its redacted URI."""
    return lambda path: str(uri.with_path(path))


@lru_cache(maxsize=8)
def _plugins_of_process(_chosen_by: tuple[str | None, ...]) -> PluginManager:
    return PluginManager.discover()


def plugins_for(environ: Mapping[str, str] | None) -> PluginManager:
    """Return the plugins that ``environ`` allows; the process's are found once for all values of its variables."""
    if environ is not None:
        return PluginManager.discover(environ)
    return _plugins_of_process(tuple(os.environ.get(name) for name in variables(PluginSettings)))


class LoadContext:
    """Settings and plugins of one call.

    Args:
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.

    Attributes:
        environ: The variables.
        settings: How loads read and verify.
        plugins: The plugins.
    """

    def __init__(self, environ: Mapping[str, str] | None, plugins: PluginManager | None) -> None:
        self.environ = os.environ if environ is None else environ
        self.settings = from_env(LoadSettings, self.environ)
        self.plugins = plugins_for(environ) if plugins is None else plugins

    def new_budget(self) -> RetryBudget:
        """Return the retry budget of one load."""
        return RetryBudget(self.settings.retry_budget_seconds)

    def asks_digests(self, provider: StorageProvider) -> bool:
        """Whether a load asks the storage for the digest of each file, besides listing them."""
        return self.settings.verify_digests and provider.capabilities.stat_digests

    def read_headers(
        self,
        uri: ModelURI,
        registered: Registered[StorageProvider],
        storage: Storage,
        budget: RetryBudget,
        *,
        to_load: bool = False,
        on_read: Callable[[float, bool], None] | None = None,
    ) -> Checkpoint:
        """Return the checkpoint at ``uri`` in an open storage, with retries as the settings say.

        Args:
            uri: The checkpoint.
            registered: The record of the storage.
            storage: The storage.
            budget: Waiting time for retries.
            to_load: Whether a load follows, which needs the digests of the files.
            on_read: As in ``RetryingStorage``.
        """
        policy = RetryPolicy.from_settings(self.settings)
        retrying = RetryingStorage(storage, policy, budget, on_read=on_read, uri_of=redacted_uris(uri))
        provider = registered.provider
        _log.debug("reading the headers below %s with %s", uri, registered.label)
        ask_digests = to_load and self.asks_digests(provider)
        return open_files(retrying, uri, provider=provider.name, ask_digests=ask_digests)
