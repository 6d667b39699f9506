"""Loads plugins one by one, and calls their hooks.

pluggy keeps the hooks. Core loads the plugins itself, so that one broken plugin does not affect the others: it imports
and registers each alone, in order of name. It removes a plugin that fails, keeps the reason, and warns once.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pluggy

from modelexpress_core import events, hookspecs
from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.errors import ModelExpressError, PluginError, PluginLoadError
from modelexpress_core.hooks import PROJECT_NAME
from modelexpress_core.plugins.checks import (
    check_functions,
    check_plain_functions,
    check_unique,
    checked_records,
    validation_reason,
)
from modelexpress_core.plugins.entry_points import CORE, PluginEntryPoint, installed_entry_points, normalised
from modelexpress_core.plugins.kinds import KINDS, Kind
from modelexpress_core.plugins.opening import open_product
from modelexpress_core.plugins.reasons import reason_of
from modelexpress_core.providers import SchemeProvider
from modelexpress_core.registry import PluginInfo, Registered, SchemeTable, record_named
from modelexpress_core.settings import CORE_SETTINGS, PluginSettings, from_env, variables, warn_unknown_variables
from modelexpress_core.uri import ModelURI

__all__ = ["PluginManager"]

_log = logging.getLogger(__name__)
P = TypeVar("P", bound=SchemeProvider)
R = TypeVar("R")
T = TypeVar("T")

_FIX_OR_DISABLE = "fix it, or disable it: MX_DISABLED_PLUGINS={name}"

#: Failures of an observer are logged at most once in this time.
_OBSERVER_LOG_SECONDS = 60.0


class PluginManager:
    """All plugins, the tables of their records, and one typed method per hook.

    Args:
        settings: Which plugins may be used; by default all.
        clock: Time in seconds, which limits how often failures of observers are logged.

    Attributes:
        observed: Whether observers hear of loads.
    """

    def __init__(self, settings: PluginSettings | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings or PluginSettings()
        self._clock = clock
        self._pluggy = pluggy.PluginManager(PROJECT_NAME)
        self._pluggy.add_hookspecs(hookspecs)
        self._infos: dict[str, PluginInfo] = {}
        self._records: dict[str, dict[str, tuple[Any, ...]]] = {}
        self._tables: dict[str, SchemeTable[Any]] = {}
        self._observer_logged: dict[str, float] = {}
        self.observed = True

    @classmethod
    def discover(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        found: Iterable[PluginEntryPoint] | None = None,
    ) -> PluginManager:
        """A manager with every installed plugin that ``environ`` (default: the process's) allows.

        Logs a warning for each variable with our prefix that neither core nor a plugin reads.

        Raises:
            SettingsError: A variable that selects plugins has a value that cannot be used.
            PluginError: In strict mode, for the first broken plugin or conflict.
        """
        environ = os.environ if environ is None else environ
        manager = cls(from_env(PluginSettings, environ))
        for entry in sorted(installed_entry_points() if found is None else found, key=lambda entry: entry.order):
            manager._load(entry)
        if manager._settings.strict:
            for table in manager.tables():
                for conflict in table.conflicts():
                    raise conflict
        classes = [*CORE_SETTINGS, *(settings for _, settings in manager.settings_classes())]
        warn_unknown_variables(environ, [name for settings in classes for name in variables(settings)])
        return manager

    # -- loading ------------------------------------------------------------------------------------------------------

    def _blocked(self, name: str) -> str:
        wanted = {normalised(entry) for entry in self._settings.disabled}
        if normalised(name) in wanted:
            return "MX_DISABLED_PLUGINS names it"
        allowed = self._settings.allowed
        if allowed is not None and normalised(name) not in {CORE, *map(normalised, allowed)}:
            return "MX_PLUGINS does not name it"
        return ""

    def _load(self, found: PluginEntryPoint) -> None:
        name = normalised(found.distribution)
        # A second entry point of a distribution is listed beside the first.
        label = f"{name} ({found.entry_point.name})" if name in self._infos else name
        blocked = self._blocked(found.entry_point.name) or self._blocked(name)
        if blocked:
            self._add_info(PluginInfo(label, found.version, "disabled", blocked))
            return
        try:
            self.register(self._imported(found), name=name, version=found.version)
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # noqa: BLE001 - also SystemExit: no plugin decides when the process ends
            self._broken(label, found.version, exc)

    def _imported(self, found: PluginEntryPoint) -> object:
        if found.error is not None:
            raise found.error
        if not found.well_named:
            called, distribution = found.entry_point.name, found.distribution
            message = f"the entry point {called!r} of the distribution {distribution!r} has another name"
            raise PluginLoadError(message, plugin=distribution, hint="give the entry point the distribution's name")
        return found.entry_point.load()

    def _broken(self, name: str, version: str, exc: BaseException) -> None:
        reason = reason_of(exc)
        self._add_info(PluginInfo(name, version, "broken", reason))
        if self._settings.strict:
            if isinstance(exc, PluginError):
                raise exc
            message = f"the plugin {name} does not load: {reason}"
            raise PluginLoadError(message, plugin=name, hint=_FIX_OR_DISABLE.format(name=name)) from exc
        _log.warning("continuing without the plugin %s, which is broken: %s", name, reason)
        _log.debug("the plugin %s is broken", name, exc_info=exc)

    def _add_info(self, info: PluginInfo) -> None:
        self._infos[info.name] = info
        self._tables.clear()

    def register(self, plugin: object, *, name: str, version: str = "") -> PluginInfo:
        """Add ``plugin``, a module or an object with hook implementations. If that fails, nothing of it stays.

        Raises:
            PluginLoadError: It breaks the hook contract.
            PluginApiError: It was written for another version of the contract.
        """
        if name in self._infos:
            message = f"two plugins are called {name!r}"
            raise PluginLoadError(message, plugin=name, hint="uninstall one of them")
        try:
            hooks = check_functions(plugin, name)
            self._pluggy.register(plugin, name)
            check_plain_functions(name, hooks, [caller.name for caller in self._pluggy.get_hookcallers(plugin) or ()])
            records = self._collect(plugin, name)
        except BaseException as exc:
            if self._pluggy.get_plugin(name) is not None:
                self._pluggy.unregister(name=name)
            if isinstance(exc, (PluginError, KeyboardInterrupt)):
                raise
            if isinstance(exc, pluggy.PluginValidationError):
                message = f"a hook of {name} does not fit its specification: {validation_reason(exc)}"
                hint = "compare its arguments with those in modelexpress_core.hookspecs"
                raise PluginLoadError(message, plugin=name, hint=hint) from exc
            message = f"{name} failed while it was registered: {reason_of(exc)}"
            raise PluginLoadError(message, plugin=name, hint=_FIX_OR_DISABLE.format(name=name)) from exc
        schemes = {
            kind.word: tuple(
                word for record in records[kind.hook] for word in getattr(record, "schemes", (record.name,))
            )
            for kind in KINDS
            if records.get(kind.hook)
        }
        info = PluginInfo(name, version, schemes=schemes)
        self._records[name] = records
        self._add_info(info)
        return info

    def unregister(self, name: str) -> None:
        """Remove a registered plugin."""
        self._pluggy.unregister(name=name)
        del self._infos[name], self._records[name]
        self._tables.clear()

    def _collect(self, plugin: object, name: str) -> dict[str, tuple[Any, ...]]:
        """The records of one plugin by hook, after checks."""
        collected: dict[str, tuple[Any, ...]] = {}
        for kind in KINDS:
            for implementation in getattr(self._pluggy.hook, kind.hook).get_hookimpls():
                if implementation.plugin is not plugin:
                    continue
                records = checked_records(implementation.function(), kind, name)
                collected[kind.hook] = (*collected.get(kind.hook, ()), *records)
            check_unique(collected.get(kind.hook, ()), kind, name)
        return collected

    # -- plugins and records ------------------------------------------------------------------------------------------

    @property
    def plugins(self) -> tuple[PluginInfo, ...]:
        """Every plugin, usable or not, sorted by name."""
        return tuple(sorted(self._infos.values(), key=lambda info: info.name))

    def table(self, kind: Kind[P, Any]) -> SchemeTable[P]:
        """The records of ``kind`` by URI scheme."""
        if kind.hook not in self._tables:
            prefer = {
                scheme: name
                for scheme, name in self._settings.prefer.items()
                if kind.hook in (meant := self._hooks_with(scheme, name)) or not meant
            }
            self._tables[kind.hook] = SchemeTable(kind.word, self.records(kind), prefer, self.plugins)
        return self._tables[kind.hook]

    def tables(self) -> tuple[SchemeTable[Any], ...]:
        """The table of each kind that is selected by scheme."""
        return tuple(self.table(kind) for kind in KINDS if kind.by_scheme)

    def records(self, kind: Kind[R, Any]) -> tuple[Registered[R], ...]:
        """All records of ``kind``, sorted by the name of their plugin."""
        return tuple(
            Registered(record, self._infos[name])
            for name in sorted(self._records)
            for record in self._records[name].get(kind.hook, ())
        )

    def named(self, kind: Kind[R, Any], name: str) -> Registered[R]:
        """The record of ``kind`` with the name ``name``.

        Raises:
            PluginConflictError: Several plugins offer a record of that name.
            SettingsError: No usable plugin offers one.
        """
        return record_named(name, self.records(kind), kind.word, self.plugins)

    def _hooks_with(self, scheme: str, name: str) -> set[str]:
        """Hooks with which the plugin or record ``name`` offers ``scheme``. Two kinds may have the same scheme."""
        return {
            hook
            for plugin, by_hook in self._records.items()
            for hook, records in by_hook.items()
            for record in records
            if scheme in getattr(record, "schemes", ()) and name in {plugin, record.name}
        }

    def settings_classes(self) -> tuple[tuple[str, type], ...]:
        """The settings classes of all records, each with the name of its distribution."""
        pairs = []
        for name in sorted(self._records):
            for records in self._records[name].values():
                for record in records:
                    classes = getattr(record, "settings", None) or ()
                    for cls in classes if isinstance(classes, tuple) else (classes,):
                        if (name, cls) not in pairs:
                            pairs.append((name, cls))
        return tuple(pairs)

    def open(self, kind: Kind[P, T], uri: ModelURI, environ: Mapping[str, str]) -> tuple[Registered[P], T]:
        """Open ``uri`` with the plugin for its scheme. Returns the record, and the object that its factory opened.

        An alternative that needs the regular plugin of the scheme gets what that one opened.

        Raises:
            ResolveError: No usable plugin handles the scheme.
            PluginError: The factory failed with another error than ours, or returned an object of another kind.
            ModelExpressError: The factory raised it.
        """
        registered = self.table(kind).lookup(uri.scheme)
        if not getattr(registered.provider, "needs_regular", False):
            return registered, open_product(kind, registered, uri, environ)
        with contextlib.ExitStack() as opened:
            regular: Any = open_product(kind, self.table(kind).regular(uri.scheme), uri, environ)
            opened.callback(regular.close)
            product = open_product(kind, registered, uri, environ, regular)
            opened.pop_all()  # it closes the regular one
        return registered, product

    def open_named(self, kind: Kind[R, T], name: str, *arguments: object) -> T:
        """The object that the factory of the record ``name`` returns for ``arguments``.

        Raises:
            PluginConflictError: Several plugins offer a record of that name.
            SettingsError: No usable plugin offers one.
            PluginError: The factory failed with another error than ours, or returned an object of another kind.
            ModelExpressError: The factory raised it.
        """
        return open_product(kind, self.named(kind, name), *arguments)

    def without_observers(self) -> PluginManager:
        """The same plugins, for loads that only try: no observer hears of them."""
        silent = copy.copy(self)
        silent.observed = False
        return silent

    # -- one typed method per hook ------------------------------------------------------------------------------------

    def rewrite_uri(self, uri: ModelURI, environ: Mapping[str, str]) -> ModelURI:
        """The URI that the first plugin with an answer returns for ``uri``, or ``uri`` itself."""
        rewritten = self._policy("mx_rewrite_uri", uri=uri, environ=environ)
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
        """Notify observers that a load began."""
        self._observe("mx_load_started", event)

    def load_progress(self, event: events.LoadProgress) -> None:
        """Notify observers that bytes arrived."""
        self._observe("mx_load_progress", event)

    def load_finished(self, event: events.LoadFinished) -> None:
        """Notify observers that a load is complete."""
        self._observe("mx_load_finished", event)

    def load_failed(self, event: events.LoadFailed) -> None:
        """Notify observers that a load failed."""
        self._observe("mx_load_failed", event)

    def _policy(self, hook: str, **arguments: object) -> Any:  # noqa: ANN401 - checked by the callers
        caller = getattr(self._pluggy.hook, hook)
        try:
            decision = caller(**arguments)
            return (
                tuple(decision) if inspect.isgenerator(decision) else decision
            )  # a generator may fail during iteration
        except ModelExpressError:
            raise
        except Exception as exc:
            name = _failed_plugin(exc, caller.get_hookimpls())
            message = f"{hook} of the plugin {name} failed: {reason_of(exc)}"
            raise PluginError(message, plugin=name, hint=f"fix it, or disable it: MX_DISABLED_PLUGINS={name}") from exc

    def _expect(self, value: object, cls: type[R], hook: str) -> R:
        if isinstance(value, cls):
            return value
        raise self._unexpected(value, cls.__name__, hook)

    def _unexpected(self, value: object, wanted: str, hook: str) -> PluginError:
        names = _plugin_names(getattr(self._pluggy.hook, hook).get_hookimpls())
        message = f"{hook} (of {names}) returned {type(value).__name__}, not {wanted}"
        return PluginError(message, plugin=names, hint=f"fix it, or disable it: MX_DISABLED_PLUGINS={names}")

    def _observe(self, hook: str, event: object) -> None:
        if not self.observed:
            return
        for implementation in getattr(self._pluggy.hook, hook).get_hookimpls():
            try:
                implementation.function(*(event for _ in implementation.argnames))
            except Exception as exc:  # noqa: BLE001 - an observer must not break a load
                now = self._clock()
                name = implementation.plugin_name
                if now - self._observer_logged.get(name, -_OBSERVER_LOG_SECONDS) >= _OBSERVER_LOG_SECONDS:
                    self._observer_logged[name] = now
                    _log.warning("%s of the plugin %s failed: %s", hook, name, reason_of(exc), exc_info=exc)


def _plugin_names(implementations: Iterable[pluggy.HookImpl]) -> str:
    return ",".join(sorted({impl.plugin_name for impl in implementations} - {CORE}))


def _failed_plugin(exc: BaseException, implementations: Sequence[pluggy.HookImpl]) -> str:
    """The plugin of the innermost hook function in the traceback of ``exc``; if there is none, all that were called."""
    plugins: dict[object, set[str]] = {}
    for implementation in implementations:
        # Several plugins may share a decorator: the function that it decorates tells them apart.
        for function in (implementation.function, inspect.unwrap(implementation.function)):
            plugins.setdefault(getattr(function, "__code__", None), set()).add(implementation.plugin_name)
    name = ""
    traceback = exc.__traceback__
    while traceback is not None:
        among = plugins.get(traceback.tb_frame.f_code, set())
        name = next(iter(among)) if len(among) == 1 else name
        traceback = traceback.tb_next
    return name or _plugin_names(implementations)
