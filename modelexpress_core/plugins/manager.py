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
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy
from attrs import frozen

from modelexpress_core import events, hookspecs
from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.errors import ModelExpressError, PluginApiError, PluginError, PluginLoadError
from modelexpress_core.hooks import PROJECT_NAME
from modelexpress_core.providers import (
    API_VERSION,
    CommandProvider,
    DiscoveryProvider,
    MetadataStoreProvider,
    ServerServiceProvider,
    StorageProvider,
    TransportProvider,
)
from modelexpress_core.registry import PluginInfo, Registered, SchemeTable
from modelexpress_core.settings import CORE_SETTINGS, PluginSettings, from_env, variables, warn_unknown_variables
from modelexpress_core.uri import ModelURI

if TYPE_CHECKING:
    from modelexpress_core.contracts.discovery import Discovery
    from modelexpress_core.contracts.metadata_store import MetadataStore
    from modelexpress_core.contracts.storage import Storage

__all__ = ["CORE", "ENTRY_POINT_GROUP", "PluginManager"]

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

#: Hooks whose result decides something; what is neither here nor in ``_REGISTER`` observes.
_POLICY = frozenset({"mx_rank_candidates", "mx_rewrite_uri"})

_HOOKS = frozenset(name for name in vars(hookspecs) if name.startswith("mx_"))

#: What a factory of storages must return has these.
_STORAGE_METHODS = ("list", "stat", "read_into", "close")

#: And one of metadata stores these.
_METADATA_STORE_METHODS = ("publish", "get", "list", "update", "reap", "counts", "lead", "check", "close")

#: And one of discoveries these.
_DISCOVERY_METHODS = ("candidates", "close")

_MEND = "mend it, or go on without it: MX_DISABLED_PLUGINS={name}"

#: An observer that keeps failing is logged this often at most.
_OBSERVER_LOG_SECONDS = 60.0


@frozen
class _Found:
    """An entry point and the distribution that it stands in, or why the distribution cannot be read."""

    entry_point: importlib.metadata.EntryPoint
    distribution: str
    version: str
    error: Exception | None = None

    @property
    def well_named(self) -> bool:
        return _normalised(self.entry_point.name) == _normalised(self.distribution)

    @property
    def order(self) -> tuple[bool, bool, str, str]:
        """Sorts by name; core last, so that its ``trylast`` defaults come after those of plugins."""
        name = _normalised(self.distribution)
        return not self.well_named, name == CORE, name, self.entry_point.name


def _normalised(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed() -> list[_Found]:
    """Every entry point of our group. Of a distribution found twice on the path the first counts, as for imports."""
    found, seen = [], set()
    for distribution in importlib.metadata.distributions():
        try:
            metadata = distribution.metadata
            name = metadata["Name"] if "Name" in metadata else ""  # noqa: SIM401 - get came with 3.12
        except Exception as exc:  # noqa: BLE001 - whatever is wrong with another package is not ours to report
            _log.debug("passing over a distribution whose metadata cannot be read: %s", exc)
            continue
        if not name or _normalised(name) in seen:
            continue
        seen.add(_normalised(name))
        found += _announced(distribution, name)
    return found


def _announced(distribution: importlib.metadata.Distribution, name: str) -> list[_Found]:
    """The entry points of our group in ``distribution``."""
    try:
        entry_points = [point for point in distribution.entry_points if point.group == ENTRY_POINT_GROUP]
        return [_Found(point, name, distribution.version) for point in entry_points]
    except Exception as exc:  # noqa: BLE001 - one unreadable file must not hide all plugins
        try:
            text = distribution.read_text("entry_points.txt") or ""
        except UnicodeDecodeError as undecodable:
            text = repr(undecodable.object)
        if ENTRY_POINT_GROUP not in text:
            return []
        message = f"the entry_points.txt of {name} cannot be read: {_reason(exc)}"
        error = PluginLoadError(message, plugin=name, hint=f"reinstall {name}")
        return [_Found(importlib.metadata.EntryPoint(name, "", ENTRY_POINT_GROUP), name, "", error)]


def _reason(exc: BaseException) -> str:
    """What ``exc`` says, on one line; of our own errors also what to do."""
    text = str(exc).strip().split("\n")[0]
    if isinstance(exc, ModelExpressError):
        return f"{text}; {exc.hint}" if exc.hint else text
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

        Variables with our prefix that neither core nor a plugin reads earn a warning.

        Raises:
            SettingsError: A variable that says which plugins to use makes no sense.
            PluginError: In strict mode, for the first broken plugin or conflict.
        """
        environ = os.environ if environ is None else environ
        manager = cls(from_env(PluginSettings, environ))
        for entry in sorted(_installed() if found is None else found, key=lambda entry: entry.order):
            manager._load(entry)
        if manager._settings.strict:
            for table in (manager.storages, manager.transports, manager.discoveries, manager.metadata_stores):
                for conflict in table.conflicts():
                    raise conflict
        classes = [*CORE_SETTINGS, *(settings for _, settings in manager.settings_classes())]
        warn_unknown_variables(environ, [name for settings in classes for name in variables(settings)])
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
        name = _normalised(found.distribution)
        # A second entry point of a distribution is remembered beside the first.
        label = f"{name} ({found.entry_point.name})" if name in self._infos else name
        blocked = self._blocked(found.entry_point.name) or self._blocked(name)
        if blocked:
            self._remember(PluginInfo(label, found.version, "disabled", blocked))
            return
        try:
            self.register(self._imported(found), name=name, version=found.version)
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # noqa: BLE001 - also SystemExit: no plugin decides when the process ends
            self._broken(label, found.version, exc)

    def _imported(self, found: _Found) -> object:
        if found.error is not None:
            raise found.error
        if not found.well_named:
            called, distribution = found.entry_point.name, found.distribution
            message = f"the entry point is called {called!r} but stands in the distribution {distribution!r}"
            raise PluginLoadError(message, plugin=distribution, hint="give the entry point the distribution's name")
        return found.entry_point.load()

    def _broken(self, name: str, version: str, exc: BaseException) -> None:
        reason = _reason(exc)
        self._remember(PluginInfo(name, version, "broken", reason))
        if self._settings.strict:
            if isinstance(exc, PluginError):
                raise exc
            message = f"the plugin {name} does not load: {reason}"
            raise PluginLoadError(message, plugin=name, hint=_MEND.format(name=name)) from exc
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
        try:
            hooks = self._check_functions(plugin, name)
            self._pluggy.register(plugin, name)
            self._check_registered(plugin, name, hooks)
            records = self._collect(plugin, name)
        except BaseException as exc:
            if self._pluggy.get_plugin(name) is not None:
                self._pluggy.unregister(name=name)
            if isinstance(exc, (PluginError, KeyboardInterrupt)):
                raise
            if isinstance(exc, pluggy.PluginValidationError):
                message = f"a hook of {name} does not fit its specification: {_validation_reason(exc)}"
                hint = "compare its arguments with those in modelexpress_core.hookspecs"
                raise PluginLoadError(message, plugin=name, hint=hint) from exc
            message = f"{name} failed while it was registered: {_reason(exc)}"
            raise PluginLoadError(message, plugin=name, hint=_MEND.format(name=name)) from exc
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

    def _check_functions(self, plugin: object, name: str) -> list[str]:
        """The hooks that ``plugin`` implements, without what pluggy would accept in silence.

        That is: misspelt, unmarked and async functions, wrappers where there is nothing to wrap.
        """
        hooks = []
        for attribute in dir(plugin):
            function = getattr(plugin, attribute, None)
            options = _mark(function, "impl")
            if options is None:
                if attribute in _HOOKS and callable(function) and _mark(function, "spec") is None:
                    message = f"{name} defines {attribute} without marking it"
                    raise PluginLoadError(message, plugin=name, hint="have you forgotten @hookimpl above it?")
                continue
            hook = options.get("specname") or attribute
            if hook not in _HOOKS:
                if options["optionalhook"]:  # of a later version of the contract, say
                    continue
                near = difflib.get_close_matches(hook, _HOOKS, n=1)
                message = f"{name} implements {hook}, which is no hook"
                hint = f"did you mean {near[0]}?" if near else f"the hooks are: {', '.join(sorted(_HOOKS))}"
                raise PluginLoadError(message, plugin=name, hint=hint)
            if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
                message = f"{name} implements {hook} as async def; hooks are called without an event loop"
                raise PluginLoadError(message, plugin=name, hint="write it as a plain def")
            wraps = options["wrapper"] or options["hookwrapper"]
            if hook in _REGISTER and wraps:
                message = f"{name} wraps {hook}; what a plugin registers is its own and is not wrapped"
                raise PluginLoadError(message, plugin=name, hint="return your own records from a plain @hookimpl")
            if hook not in _REGISTER and hook not in _POLICY and (wraps or inspect.isgeneratorfunction(function)):
                message = f"{name} implements {hook} as a generator or wrapper; observers are called, nothing more"
                raise PluginLoadError(message, plugin=name, hint="write it as a plain def without yield")
            hooks.append(hook)
        return hooks

    def _check_registered(self, plugin: object, name: str, hooks: Iterable[str]) -> None:
        """Refuse marked objects that pluggy passes over because they are no plain functions."""
        seen = {caller.name for caller in self._pluggy.get_hookcallers(plugin) or ()}
        for hook in hooks:
            if hook not in seen:
                message = f"{name} implements {hook} as something that is no plain function or method"
                raise PluginLoadError(message, plugin=name, hint="write it as a plain def, with @hookimpl on top")

    def _collect(self, plugin: object, name: str) -> dict[str, tuple[Any, ...]]:
        """The records of one plugin, checked."""
        collected: dict[str, tuple[Any, ...]] = {}
        for hook, (kind, cls) in _REGISTER.items():
            for implementation in getattr(self._pluggy.hook, hook).get_hookimpls():
                if implementation.plugin is not plugin:
                    continue
                records: tuple[Any, ...] = self._records_of(implementation.function(), hook, kind, cls, name)
                collected[hook] = (*collected.get(hook, ()), *records)
            self._check_unique(collected.get(hook, ()), kind, name)
        return collected

    @staticmethod
    def _check_unique(records: Iterable[Any], kind: str, name: str) -> None:
        seen: dict[tuple[str, str], str] = {}
        for record in records:
            for scheme in getattr(record, "schemes", ()):
                # One regular record for a scheme, and any number of alternatives as long as their names differ.
                keys = [("record", f"{scheme} {record.name}")]
                keys += [] if record.alternative else [("regular", scheme)]
                for key in keys:
                    if key in seen:
                        message = f"{name} claims the {kind} scheme {scheme} twice: {seen[key]}, {record.name}"
                        hint = "mark one alternative=True, and give each a name of its own"
                        raise PluginLoadError(message, plugin=name, hint=hint)
                    seen[key] = record.name

    @staticmethod
    def _records_of(returned: object, hook: str, kind: str, cls: type[_R], name: str) -> tuple[_R, ...]:
        if isinstance(returned, cls) or not isinstance(returned, Iterable) or isinstance(returned, str):
            message = f"{hook} of {name} returned {type(returned).__name__}, not a list of {cls.__name__} records"
            hint = "put the record into a list" if isinstance(returned, cls) else f"return [{cls.__name__}(...)]"
            raise PluginLoadError(message, plugin=name, hint=hint)
        records = tuple(returned)
        for record in records:
            version = getattr(record, "api_version", None)
            if version is not None and version != API_VERSION:
                side = "modelexpress-core" if version > API_VERSION else name
                message = f"{name} was written for version {version} of the hook contract, and this is {API_VERSION}"
                raise PluginApiError(message, plugin=name, hint=f"upgrade {side}")
            if not isinstance(record, cls):
                message = f"{hook} of {name} returned a {type(record).__name__} among its records"
                raise PluginLoadError(message, plugin=name, hint=f"return {cls.__name__} records for a {kind}")
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
            prefer = {
                scheme: name
                for scheme, name in self._settings.prefer.items()
                if hook in (meant := self._hooks_with(scheme, name)) or not meant
            }
            self._tables[cls] = SchemeTable(_REGISTER[hook][0], tuple(records), prefer, self.plugins)
        return self._tables[cls]

    def _hooks_with(self, scheme: str, name: str) -> set[str]:
        """Hooks by which the plugin or record ``name`` offers ``scheme``: one word may be a scheme of two kinds."""
        return {
            hook
            for plugin, by_hook in self._records.items()
            for hook, records in by_hook.items()
            for record in records
            if scheme in getattr(record, "schemes", ()) and name in {plugin, record.name}
        }

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
    def server_services(self) -> tuple[tuple[str, ServerServiceProvider], ...]:
        """Services that a server offers beside its own, each with its distribution."""
        return tuple(
            (name, record)
            for name in sorted(self._records)
            for record in self._records[name].get("mx_register_server_services", ())
        )

    @property
    def commands(self) -> tuple[CommandProvider, ...]:
        """Subcommands of ``mx``."""
        return tuple(
            record for name in sorted(self._records) for record in self._records[name].get("mx_register_commands", ())
        )

    def settings_classes(self) -> tuple[tuple[str, type], ...]:
        """The settings classes of every record that has some, each with its distribution."""
        pairs = []
        for name in sorted(self._records):
            for records in self._records[name].values():
                for record in records:
                    classes = getattr(record, "settings", None) or ()
                    for cls in classes if isinstance(classes, tuple) else (classes,):
                        if (name, cls) not in pairs:
                            pairs.append((name, cls))
        return tuple(pairs)

    def open_storage(self, uri: ModelURI, environ: Mapping[str, str]) -> tuple[Registered[StorageProvider], Storage]:
        """The storage for ``uri``, opened, with the record it came from.

        Raises:
            ResolveError: No usable plugin handles the scheme.
            PluginError: The plugin's factory failed for a reason of its own, or returned no storage.
            ModelExpressError: Whatever the factory reports.
        """
        registered = self.storages.lookup(uri.scheme)
        return registered, self._opened(registered, uri, environ, "storage", _STORAGE_METHODS)

    def open_metadata_store(self, uri: ModelURI, environ: Mapping[str, str]) -> MetadataStore:
        """The metadata store for ``uri``, opened.

        Raises:
            ResolveError: No usable plugin handles the scheme.
            PluginError: The plugin's factory failed for a reason of its own, or returned no metadata store.
            ModelExpressError: Whatever the factory reports.
        """
        registered = self.metadata_stores.lookup(uri.scheme)
        store: MetadataStore = self._opened(registered, uri, environ, "metadata store", _METADATA_STORE_METHODS)
        return store

    def open_discovery(
        self, uri: ModelURI, environ: Mapping[str, str]
    ) -> tuple[Registered[DiscoveryProvider], Discovery]:
        """The discovery for ``uri``, opened, with the record it came from.

        Raises:
            ResolveError: No usable plugin handles the scheme.
            PluginError: The plugin's factory failed for a reason of its own, or returned no discovery.
            ModelExpressError: Whatever the factory reports.
        """
        registered = self.discoveries.lookup(uri.scheme)
        return registered, self._opened(registered, uri, environ, "discovery", _DISCOVERY_METHODS)

    @staticmethod
    def _opened(
        registered: Registered[Any], uri: ModelURI, environ: Mapping[str, str], kind: str, methods: Iterable[str]
    ) -> Any:  # noqa: ANN401 - what has the methods
        plugin, label = registered.plugin.name, registered.label
        what = registered.provider.install_hint or plugin
        try:
            product = registered.provider.factory(uri, environ)
        except ModelExpressError:
            raise
        except ModuleNotFoundError as exc:
            message = f"{label} cannot be used for {uri}: the package {exc.name or exc} is missing"
            raise PluginLoadError(message, plugin=plugin, hint=f"pip install '{what}'") from exc
        except ImportError as exc:
            message = f"{label} cannot be used for {uri}: {_reason(exc)}"
            cause = "another version of the package is installed than the plugin was written for"
            raise PluginLoadError(message, plugin=plugin, cause=cause, hint=f"pip install -U '{what}'") from exc
        except Exception as exc:
            message = f"{label} failed to open {uri}: {_reason(exc)}"
            raise PluginLoadError(message, plugin=plugin, hint="report it to its authors") from exc
        lacking = [method for method in methods if not callable(getattr(product, method, None))]
        if lacking or isinstance(product, type):
            returned = "a class, not an instance" if isinstance(product, type) else type(product).__name__
            message = f"the factory of {label} returned {returned}, which is no {kind}"
            cause = f"it has no {', '.join(lacking)}" if lacking else "have you forgotten the ()?"
            raise PluginLoadError(message, plugin=plugin, cause=cause, hint=f"have it return an open {kind}")
        return product

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
        if not isinstance(ranked, Iterable):
            raise self._unexpected(ranked, "a sequence of Candidate", "mx_rank_candidates")
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
            decision = caller(**arguments)
            return tuple(decision) if inspect.isgenerator(decision) else decision  # it may fail as it is read
        except ModelExpressError:
            raise
        except Exception as exc:
            name = _culprit(exc, caller.get_hookimpls())
            message = f"{hook} of the plugin {name} failed: {_reason(exc)}"
            raise PluginError(message, plugin=name, hint=f"MX_DISABLED_PLUGINS={name} goes on without it") from exc

    def _expect(self, value: object, cls: type[_R], hook: str) -> _R:
        if isinstance(value, cls):
            return value
        raise self._unexpected(value, cls.__name__, hook)

    def _unexpected(self, value: object, wanted: str, hook: str) -> PluginError:
        names = _asked(getattr(self._pluggy.hook, hook).get_hookimpls())
        message = f"{hook} (of {names}) returned {type(value).__name__} where {wanted} belongs"
        return PluginError(message, plugin=names, hint=f"MX_DISABLED_PLUGINS={names} goes on without it")

    def _observe(self, hook: str, event: object) -> None:
        for implementation in getattr(self._pluggy.hook, hook).get_hookimpls():
            try:
                implementation.function(*(event for _ in implementation.argnames))
            except Exception as exc:  # noqa: BLE001 - an observer must not break a load
                now = time.monotonic()
                name = implementation.plugin_name
                if now - self._observer_logged.get(name, -_OBSERVER_LOG_SECONDS) >= _OBSERVER_LOG_SECONDS:
                    self._observer_logged[name] = now
                    _log.warning("%s of the plugin %s failed: %s", hook, name, _reason(exc), exc_info=exc)


def _validation_reason(exc: pluggy.PluginValidationError) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return "; ".join(lines[1:]) or lines[0]


def _mark(function: object, kind: str) -> dict[str, Any] | None:
    """The options that a marker left at ``function``."""
    # Looked up so that lazy modules stay unloaded and stand-ins that have any attribute are not taken for hooks.
    lookup = getattr if inspect.isroutine(function) else inspect.getattr_static
    options = lookup(function, f"{PROJECT_NAME}_{kind}", None)
    return options if isinstance(options, dict) else None


def _asked(implementations: Iterable[pluggy.HookImpl]) -> str:
    return ",".join(sorted({impl.plugin_name for impl in implementations} - {CORE}))


def _culprit(exc: BaseException, implementations: Sequence[pluggy.HookImpl]) -> str:
    """The plugin whose function stands deepest in the traceback of ``exc``; all that were asked, where none does."""
    plugins: dict[object, set[str]] = {}
    for implementation in implementations:
        # A decorator that several plugins use says nothing; the function that it decorates does.
        for function in (implementation.function, inspect.unwrap(implementation.function)):
            plugins.setdefault(getattr(function, "__code__", None), set()).add(implementation.plugin_name)
    name = ""
    traceback = exc.__traceback__
    while traceback is not None:
        among = plugins.get(traceback.tb_frame.f_code, set())
        name = next(iter(among)) if len(among) == 1 else name
        traceback = traceback.tb_next
    return name or _asked(implementations)
