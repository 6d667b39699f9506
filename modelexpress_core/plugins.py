"""Finding plugins, loading each on its own, and asking them.

pluggy keeps the hooks. Loading is ours, because one broken plugin must not take the others with it: each is imported
and registered alone, in order of name; one that fails is taken out whole, remembered with its reason, and reported
once.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy
from attrs import frozen

from modelexpress_core import events, hookspecs
from modelexpress_core.errors import ModelExpressError, PluginApiError, PluginError, PluginLoadError
from modelexpress_core.hooks import PROJECT_NAME
from modelexpress_core.providers import (
    API_VERSION,
    Candidate,
    CommandProvider,
    DiscoveryProvider,
    LoadRequest,
    MetadataStoreProvider,
    SchemeProvider,
    ServerServiceProvider,
    StorageProvider,
    TransportProvider,
)
from modelexpress_core.registry import PluginInfo, Registered, SchemeTable
from modelexpress_core.settings import PluginSettings, from_env
from modelexpress_core.uri import ModelURI

if TYPE_CHECKING:
    from modelexpress_core.storage import Storage

__all__ = ["ENTRY_POINT_GROUP", "CORE", "PluginManager"]

_log = logging.getLogger(__name__)
_R = TypeVar("_R")

#: The entry-point group in which plugins announce themselves.
ENTRY_POINT_GROUP = "modelexpress.plugins"

#: Name of the plugin that core itself is.
CORE = "modelexpress-core"

#: register hook -> (kind of record in words, class of record)
_REGISTER: Mapping[str, tuple[str, type]] = {
    "mx_register_storages": ("storage", StorageProvider),
    "mx_register_transports": ("transport", TransportProvider),
    "mx_register_discoveries": ("discovery", DiscoveryProvider),
    "mx_register_metadata_stores": ("metadata store", MetadataStoreProvider),
    "mx_register_server_services": ("server service", ServerServiceProvider),
    "mx_register_commands": ("command", CommandProvider),
}

#: An observer that keeps failing is logged this often at most.
_OBSERVER_LOG_SECONDS = 60.0


@frozen
class _Found:
    """An entry point and the distribution that it stands in."""

    entry_point: importlib.metadata.EntryPoint
    distribution: str
    version: str

    @property
    def name(self) -> str:
        return self.entry_point.name


def _normalised(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed() -> list[_Found]:
    """Every entry point of our group. Of a distribution found twice on the path the first counts, as for imports."""
    found, seen = [], set()
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if not name or _normalised(name) in seen:
            continue
        seen.add(_normalised(name))
        found += [
            _Found(entry_point, name, distribution.version)
            for entry_point in distribution.entry_points
            if entry_point.group == ENTRY_POINT_GROUP
        ]
    return found


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip().split("\n")[0]
    if isinstance(exc, PluginError):
        return text
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


class PluginManager:
    """All plugins, the tables made of their records, and one typed method per hook.

    Args:
        settings: Which plugins may be used; by default all.
    """

    def __init__(self, settings: PluginSettings | None = None) -> None:
        self._settings = settings or PluginSettings()
        self._pluggy = pluggy.PluginManager(PROJECT_NAME)
        self._pluggy.add_hookspecs(hookspecs)
        self._infos: dict[str, PluginInfo] = {}
        self._records: dict[str, dict[str, tuple[Any, ...]]] = {}
        self._tables: dict[type, SchemeTable[Any]] = {}
        self._observer_logged: dict[str, float] = {}

    @classmethod
    def discover(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        found: Iterable[_Found] | None = None,
    ) -> PluginManager:
        """A manager with every installed plugin that ``environ`` (default: the process's) allows.

        Raises:
            SettingsError: A variable that says which plugins to use makes no sense.
            PluginError: In strict mode, for the first broken plugin or conflict.
        """
        manager = cls(from_env(PluginSettings, os.environ if environ is None else environ))
        for entry in sorted(
            _installed() if found is None else found,
            key=lambda entry: (entry.name, entry.name != _normalised(entry.distribution), entry.distribution),
        ):
            manager._load(entry)
        if manager._settings.strict:
            for table in (manager.storages, manager.transports, manager.discoveries, manager.metadata_stores):
                for conflict in table.conflicts():
                    raise conflict
        return manager

    # -- loading ------------------------------------------------------------------------------------------------------

    def _blocked(self, name: str) -> str:
        wanted = {_normalised(entry) for entry in self._settings.disabled}
        if _normalised(name) in wanted:
            return "MX_DISABLED_PLUGINS names it"
        allowed = self._settings.allowed
        if allowed is not None and _normalised(name) not in {CORE, *map(_normalised, allowed)}:
            return "MX_PLUGINS does not name it"
        return ""

    def _load(self, found: _Found) -> None:
        reason = self._blocked(found.name) or self._blocked(found.distribution)
        if reason:
            self._remember(PluginInfo(found.name, found.version, "disabled", reason))
            return
        try:
            if _normalised(found.name) != _normalised(found.distribution):
                message = (
                    f"the entry point is called {found.name!r} but stands in the distribution {found.distribution!r}"
                )
                hint = "give the entry point the distribution's name"
                raise PluginLoadError(message, plugin=found.distribution, hint=hint)
            self.register(found.entry_point.load(), name=found.name, version=found.version)
        except Exception as exc:
            name = found.distribution if found.name in self._infos else found.name
            self._broken(name, found.version, exc)

    def _broken(self, name: str, version: str, exc: Exception) -> None:
        reason = _first_line(exc)
        self._remember(PluginInfo(name, version, "broken", reason))
        if self._settings.strict:
            if isinstance(exc, PluginError):
                raise exc
            message = f"the plugin {name} does not load: {reason}"
            raise PluginLoadError(message, plugin=name, hint="mend it, or set MX_DISABLED_PLUGINS") from exc
        _log.warning("going on without the plugin %s, which is broken: %s", name, reason)
        _log.debug("why the plugin %s is broken", name, exc_info=exc)

    def _remember(self, info: PluginInfo) -> None:
        self._infos[info.name] = info
        self._tables.clear()

    def register(self, plugin: object, *, name: str, version: str = "") -> PluginInfo:
        """Add ``plugin`` (a module or any object with hook implementations), or leave no trace of it.

        Raises:
            PluginLoadError: It does not keep to the contract.
            PluginApiError: It was built for another version of the contract.
        """
        if name in self._infos:
            message = f"two plugins are called {name!r}"
            raise PluginLoadError(message, plugin=name, hint="uninstall one of them")
        self._check_functions(plugin, name)
        try:
            self._pluggy.register(plugin, name)
            records = self._collect(plugin, name)
        except Exception as exc:
            if self._pluggy.get_plugin(name) is not None:
                self._pluggy.unregister(name=name)
            if isinstance(exc, PluginError):
                raise
            if isinstance(exc, pluggy.PluginValidationError):
                message = f"a hook of {name} does not fit its specification: {_validation_reason(exc)}"
                raise PluginLoadError(message, plugin=name) from exc
            message = f"{name} failed while it was registered: {_first_line(exc)}"
            raise PluginLoadError(message, plugin=name) from exc
        schemes = {
            _REGISTER[hook][0]: tuple(s for record in of_hook for s in getattr(record, "schemes", (record.name,)))
            for hook, of_hook in records.items()
            if of_hook
        }
        info = PluginInfo(name, version, schemes=schemes)
        self._records[name] = records
        self._remember(info)
        return info

    def unregister(self, name: str) -> None:
        """Take out a plugin that was registered."""
        self._pluggy.unregister(name=name)
        del self._infos[name], self._records[name]
        self._tables.clear()

    def _check_functions(self, plugin: object, name: str) -> None:
        """Refuse what pluggy would accept in silence: misspelt, unmarked, async and wrapping hook functions."""
        known = [hook for hook in vars(hookspecs) if hook.startswith("mx_")]
        for attribute in dir(plugin):
            function = getattr(plugin, attribute, None)
            if not callable(function) or isinstance(function, type):
                continue
            options = getattr(function, f"{PROJECT_NAME}_impl", None)
            if options is None:
                if attribute in known and _defined_in(function, plugin):
                    message = f"{name} defines {attribute} without marking it"
                    raise PluginLoadError(message, plugin=name, hint="have you forgotten @hookimpl above it?")
                continue
            hook = options.get("specname") or attribute
            if hook not in known:
                near = difflib.get_close_matches(hook, known, n=1)
                message = f"{name} implements {hook}, which is no hook"
                hint = f"did you mean {near[0]}?" if near else f"the hooks are: {', '.join(sorted(known))}"
                raise PluginLoadError(message, plugin=name, hint=hint)
            if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
                message = f"{name} implements {hook} as async def; hooks are called without an event loop"
                raise PluginLoadError(message, plugin=name, hint="write it as a plain def")
            if hook in _REGISTER and (options["wrapper"] or options["hookwrapper"]):
                message = f"{name} wraps {hook}; what a plugin registers is its own and is not wrapped"
                raise PluginLoadError(message, plugin=name, hint="return your own records from a plain @hookimpl")

    def _collect(self, plugin: object, name: str) -> dict[str, tuple[Any, ...]]:
        """The records of one plugin, checked."""
        collected: dict[str, tuple[Any, ...]] = {}
        for hook, (kind, cls) in _REGISTER.items():
            for implementation in getattr(self._pluggy.hook, hook).get_hookimpls():
                if implementation.plugin is not plugin:
                    continue
                collected[hook] = self._records_of(implementation.function(), hook, kind, cls, name)
        return collected

    def _records_of(self, returned: object, hook: str, kind: str, cls: type[_R], name: str) -> tuple[_R, ...]:
        if isinstance(returned, cls) or not isinstance(returned, Iterable) or isinstance(returned, str):
            message = f"{hook} of {name} returned {type(returned).__name__}, not a list of {cls.__name__} records"
            hint = "put the record into a list" if isinstance(returned, cls) else f"return [{cls.__name__}(...)]"
            raise PluginLoadError(message, plugin=name, hint=hint)
        records = tuple(returned)
        seen: dict[str, str] = {}
        for record in records:
            version = getattr(record, "api_version", None)
            if version is not None and version != API_VERSION:
                side = "modelexpress-core" if version > API_VERSION else name
                message = f"{name} was written for version {version} of the hook contract, and this is {API_VERSION}"
                raise PluginApiError(message, plugin=name, hint=f"upgrade {side}")
            if not isinstance(record, cls):
                message = f"{hook} of {name} returned a {type(record).__name__} among its records"
                raise PluginLoadError(message, plugin=name, hint=f"return {cls.__name__} records for a {kind}")
            if isinstance(record, SchemeProvider) and not record.alternative:
                for scheme in record.schemes:
                    if scheme in seen:
                        message = f"{name} claims the {kind} scheme {scheme} twice: {seen[scheme]}, {record.name}"
                        raise PluginLoadError(message, plugin=name, hint="mark one alternative=True")
                    seen[scheme] = record.name
        return records

    # -- what is there ------------------------------------------------------------------------------------------------

    @property
    def plugins(self) -> tuple[PluginInfo, ...]:
        """Every plugin, usable or not, sorted by name."""
        return tuple(sorted(self._infos.values(), key=lambda info: info.name))

    def _table(self, hook: str, cls: type[_R]) -> SchemeTable[Any]:
        if cls not in self._tables:
            records = [
                Registered(record, self._infos[name])
                for name in sorted(self._records)
                for record in self._records[name].get(hook, ())
            ]
            self._tables[cls] = SchemeTable(_REGISTER[hook][0], tuple(records), self._settings.prefer, self.plugins)
        return self._tables[cls]

    @property
    def storages(self) -> SchemeTable[StorageProvider]:
        """Storages by scheme."""
        return self._table("mx_register_storages", StorageProvider)

    @property
    def transports(self) -> SchemeTable[TransportProvider]:
        """Transports by scheme."""
        return self._table("mx_register_transports", TransportProvider)

    @property
    def discoveries(self) -> SchemeTable[DiscoveryProvider]:
        """Discoveries by scheme."""
        return self._table("mx_register_discoveries", DiscoveryProvider)

    @property
    def metadata_stores(self) -> SchemeTable[MetadataStoreProvider]:
        """Metadata stores by scheme."""
        return self._table("mx_register_metadata_stores", MetadataStoreProvider)

    @property
    def server_services(self) -> tuple[ServerServiceProvider, ...]:
        """Services that a server offers beside its own."""
        return self._all("mx_register_server_services")

    @property
    def commands(self) -> tuple[CommandProvider, ...]:
        """Subcommands of ``mx``."""
        return self._all("mx_register_commands")

    def _all(self, hook: str) -> tuple[Any, ...]:
        return tuple(record for name in sorted(self._records) for record in self._records[name].get(hook, ()))

    def settings_classes(self) -> tuple[tuple[str, type], ...]:
        """The settings class of every record that has one, with its distribution."""
        pairs = []
        for name in sorted(self._records):
            for records in self._records[name].values():
                for record in records:
                    cls = getattr(record, "settings", None)
                    if cls is not None and (name, cls) not in pairs:
                        pairs.append((name, cls))
        return tuple(pairs)

    def open_storage(self, uri: ModelURI, environ: Mapping[str, str]) -> tuple[Registered[StorageProvider], Storage]:
        """The storage for ``uri``, opened, with the record it came from.

        Raises:
            ResolveError: No usable plugin handles the scheme.
            PluginError: The plugin's factory failed for a reason of its own.
            ModelExpressError: Whatever the factory reports.
        """
        registered = self.storages.lookup(uri.scheme)
        try:
            return registered, registered.provider.factory(uri, environ)
        except ModelExpressError:
            raise
        except ImportError as exc:
            missing = exc.name or str(exc)
            what = registered.provider.install_hint or registered.plugin.name
            message = f"{registered.label} cannot be used for {uri}: the package {missing} is missing"
            raise PluginLoadError(message, plugin=registered.plugin.name, hint=f"pip install '{what}'") from exc
        except Exception as exc:
            message = f"{registered.label} failed to open {uri}: {_first_line(exc)}"
            raise PluginLoadError(message, plugin=registered.plugin.name, hint="report it to its authors") from exc

    # -- one typed method per hook ------------------------------------------------------------------------------------

    def rewrite_uri(self, uri: ModelURI) -> ModelURI:
        """``uri``, or what the first plugin that has an opinion puts in its place."""
        rewritten = self._policy("mx_rewrite_uri", uri=uri)
        return uri if rewritten is None else self._expect(rewritten, ModelURI, "mx_rewrite_uri")

    def rank_candidates(self, request: LoadRequest, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """The candidates to try, best first."""
        if not candidates:
            return ()
        ranked = self._policy("mx_rank_candidates", request=request, candidates=tuple(candidates))
        if ranked is None:
            return tuple(candidates)
        return tuple(self._expect(candidate, Candidate, "mx_rank_candidates") for candidate in ranked)

    def load_started(self, event: events.LoadStarted) -> None:
        """Tell observers that a load began."""
        self._observe("mx_load_started", event)

    def load_progress(self, event: events.LoadProgress) -> None:
        """Tell observers that bytes arrived."""
        self._observe("mx_load_progress", event)

    def load_finished(self, event: events.LoadFinished) -> None:
        """Tell observers that a load is complete."""
        self._observe("mx_load_finished", event)

    def load_failed(self, event: events.LoadFailed) -> None:
        """Tell observers that a load failed."""
        self._observe("mx_load_failed", event)

    def _policy(self, hook: str, **arguments: object) -> Any:  # noqa: ANN401 - checked by the callers
        caller = getattr(self._pluggy.hook, hook)
        try:
            return caller(**arguments)
        except ModelExpressError:
            raise
        except Exception as exc:
            name = _culprit(exc, {impl.function: impl.plugin_name for impl in caller.get_hookimpls()})
            message = f"{hook} of the plugin {name} failed: {_first_line(exc)}"
            raise PluginError(message, plugin=name, hint=f"MX_DISABLED_PLUGINS={name} goes on without it") from exc

    def _expect(self, value: object, cls: type[_R], hook: str) -> _R:
        if isinstance(value, cls):
            return value
        implementations = getattr(self._pluggy.hook, hook).get_hookimpls()
        names = ", ".join(impl.plugin_name for impl in implementations if impl.plugin_name != CORE)
        message = f"{hook} (of {names}) returned {type(value).__name__} where {cls.__name__} belongs"
        raise PluginError(message, plugin=names)

    def _observe(self, hook: str, event: object) -> None:
        for implementation in getattr(self._pluggy.hook, hook).get_hookimpls():
            try:
                implementation.function(*(event for _ in implementation.argnames))
            except Exception as exc:  # an observer must not break a load
                now = time.monotonic()
                name = implementation.plugin_name
                if now - self._observer_logged.get(name, -_OBSERVER_LOG_SECONDS) >= _OBSERVER_LOG_SECONDS:
                    self._observer_logged[name] = now
                    _log.warning("%s of the plugin %s failed: %s", hook, name, _first_line(exc), exc_info=exc)


def _validation_reason(exc: pluggy.PluginValidationError) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return "; ".join(lines[1:]) or lines[0]


def _defined_in(function: Callable[..., object], plugin: object) -> bool:
    """Whether ``function`` was written in ``plugin``, not imported into it."""
    if isinstance(plugin, ModuleType):
        return getattr(function, "__module__", None) == plugin.__name__
    return True


def _culprit(exc: BaseException, functions: Mapping[Callable[..., object], str]) -> str:
    """The plugin whose function stands in the traceback of ``exc``."""
    by_code = {getattr(function, "__code__", None): name for function, name in functions.items()}
    name, traceback = "unknown", exc.__traceback__
    while traceback is not None:
        name = by_code.get(traceback.tb_frame.f_code, name)
        traceback = traceback.tb_next
    return name
