"""Which plugin handles which scheme: tables that are built once from all records."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from attrs import frozen

from modelexpress_core.errors import PluginConflictError, PluginLoadError, SettingsError, UnknownSchemeError
from modelexpress_core.installing import install_command
from modelexpress_core.known_schemes import KNOWN_SCHEMES, SYNONYMS
from modelexpress_core.providers import SchemeProvider

__all__ = ["PluginInfo", "Registered", "SchemeTable", "record_named"]


@frozen
class PluginInfo:
    """One installed plugin, usable or not.

    Attributes:
        name: Name of the distribution, normalised as pip does it (PEP 503).
        version: Version of the distribution; empty for plugins registered from code.
        status: ``"loaded"``, ``"broken"`` or ``"disabled"``.
        reason: Why it is broken or disabled; empty if it is loaded.
        schemes: Schemes of its records, by kind: ``{"storage": ("s3",)}``.
    """

    name: str
    version: str = ""
    status: str = "loaded"
    reason: str = ""
    schemes: Mapping[str, tuple[str, ...]] = {}


P = TypeVar("P", bound=SchemeProvider)
R = TypeVar("R")


@frozen
class Registered(Generic[R]):
    """A record with its plugin."""

    provider: R
    plugin: PluginInfo

    @property
    def label(self) -> str:
        """The distribution, and the record's name if it adds something."""
        name = getattr(self.provider, "name", "")
        if name in {self.plugin.name, *getattr(self.provider, "schemes", ())}:
            return self.plugin.name
        return f"{self.plugin.name} ({name})"


@frozen
class SchemeTable(Generic[P]):
    """The records of one kind by scheme.

    Attributes:
        kind: ``"storage"``, ``"transport"``, ``"discovery"`` or ``"metadata store"``.
        records: All records.
        prefer: ``MX_PREFER``: scheme -> name of a provider or its distribution.
        plugins: Every plugin found, for messages.
    """

    kind: str
    records: Sequence[Registered[P]]
    prefer: Mapping[str, str]
    plugins: Sequence[PluginInfo]

    @property
    def schemes(self) -> tuple[str, ...]:
        """Every scheme that a record handles, sorted."""
        return tuple(sorted({scheme for record in self.records for scheme in record.provider.schemes}))

    def conflicts(self) -> tuple[PluginConflictError, ...]:
        """One error for each scheme that several plugins claim and ``MX_PREFER`` does not assign."""
        found = []
        for scheme in self.schemes:
            try:
                self.lookup(scheme)
            except PluginConflictError as exc:
                found.append(exc)
            except UnknownSchemeError:  # only alternatives: an error at use
                continue
        return tuple(found)

    def lookup(self, scheme: str) -> Registered[P]:
        """The record that handles ``scheme``. Does not depend on the order in which plugins were found.

        Raises:
            PluginConflictError: Several plugins claim the scheme.
            SettingsError: ``MX_PREFER`` names a plugin that does not handle it.
            PluginLoadError: ``MX_PREFER`` names a plugin that is broken or disabled.
            UnknownSchemeError: No usable plugin handles it.
        """
        claims = self._claims(scheme)
        preferred = self.prefer.get(scheme)
        if preferred is not None and (claims or self._is_installed(preferred)):
            return self._preferred(scheme, preferred, claims)
        regular = [record for record in claims if not record.provider.alternative]
        if len(regular) == 1:
            return regular[0]
        if regular:
            labels = " and ".join(record.label for record in regular)
            message = f"{len(regular)} plugins claim the {self.kind} scheme {scheme}: {labels}"
            hint = " or ".join(f"MX_PREFER={scheme}={record.plugin.name}" for record in regular)
            raise PluginConflictError(message, plugin=labels, hint=f"set {hint}, or uninstall one")
        raise self._unknown(scheme, claims)

    def regular(self, scheme: str) -> Registered[P]:
        """The record for ``scheme`` that is no alternative, whatever ``MX_PREFER`` names.

        Raises:
            PluginConflictError: Several plugins claim the scheme.
            UnknownSchemeError: Only alternatives handle it.
        """
        claims = self._claims(scheme)
        regular = [record for record in claims if not record.provider.alternative]
        if len(regular) == 1:
            return regular[0]
        if regular:
            labels = " and ".join(record.label for record in regular)
            message = (
                f"an alternative for {scheme} needs its regular plugin, and {len(regular)} are installed: {labels}"
            )
            hint = f"set MX_DISABLED_PLUGINS={regular[-1].plugin.name}, or uninstall one"
            raise PluginConflictError(message, plugin=labels, hint=hint)
        labels = ", ".join(record.label for record in claims) or "none"
        message = f"an alternative for {scheme} needs its regular plugin, and only alternatives are usable: {labels}"
        hint = _install_step(scheme) or "`mx plugins` lists what is installed"
        raise UnknownSchemeError(message, hint=hint)

    def _claims(self, scheme: str) -> list[Registered[P]]:
        return sorted(
            (record for record in self.records if scheme in record.provider.schemes),
            key=lambda record: (record.plugin.name, record.provider.name),
        )

    def _is_installed(self, name: str) -> bool:
        return any(plugin.name == name for plugin in self.plugins)

    def _preferred(self, scheme: str, preferred: str, claims: Iterable[Registered[P]]) -> Registered[P]:
        claims = list(claims)
        named = [record for record in claims if preferred in {record.provider.name, record.plugin.name}]
        exact = [record for record in named if record.provider.name == preferred]
        regular = [record for record in named if not record.provider.alternative]
        for choice in (named, exact, regular):
            if len(choice) == 1:
                return choice[0]
        options = ", ".join(record.label for record in claims) or "none"
        for plugin in self.plugins:
            if plugin.name == preferred and plugin.status != "loaded":
                message = f"MX_PREFER names {preferred} for {scheme}, which is {plugin.status}: {plugin.reason}"
                remedy = "fix it" if plugin.status == "broken" else "enable it"
                raise PluginLoadError(message, plugin=preferred, hint=f"{remedy}, or choose among: {options}")
        message = f"MX_PREFER={scheme}={preferred}: no such {self.kind} plugin for {scheme}"
        raise SettingsError(message, hint=f"choose among: {options}")

    def _unknown(self, scheme: str, alternatives: Sequence[Registered[P]]) -> UnknownSchemeError:
        message = f"no usable plugin handles the {self.kind} scheme {scheme!r}"
        usable = ", ".join(self.schemes) or "none"
        known = KNOWN_SCHEMES.get(scheme)
        for plugin in self.plugins:
            if known is None or plugin.name != known.distribution or plugin.status == "loaded":
                continue
            message = f"{plugin.name}, which handles {scheme}, is installed but {plugin.status}: {plugin.reason}"
            hint = "unset the setting" if plugin.status == "disabled" else f"reinstall {plugin.name}, or report it"
            return UnknownSchemeError(message, hint=hint)
        if alternatives:
            plugins = [record.plugin.name for record in alternatives]
            # The name of the distribution is enough, unless it offers several.
            choices = (r.provider.name if plugins.count(r.plugin.name) > 1 else r.plugin.name for r in alternatives)
            choice = " or ".join(f"MX_PREFER={scheme}={name}" for name in choices)
            return UnknownSchemeError(
                message,
                cause=f"only alternatives are installed for it: {', '.join(r.label for r in alternatives)}",
                hint=f"set {choice}",
            )
        message += f"; installed {self.kind} schemes: {usable}"
        # A plugin that is not loaded may handle this scheme.
        for plugin in self.plugins:
            if plugin.status != "loaded":
                message += f"; {plugin.name} is {plugin.status}: {plugin.reason}"
        return UnknownSchemeError(message, hint=self._next_step(scheme))

    def _next_step(self, scheme: str) -> str:
        """The next step if no installed plugin handles ``scheme``."""
        near = SYNONYMS.get(scheme)
        if near is None and scheme not in KNOWN_SCHEMES:
            guesses = difflib.get_close_matches(scheme, {*self.schemes, *KNOWN_SCHEMES}, n=1)
            near = guesses[0] if guesses else None
        install = "" if near in self.schemes else _install_step(near or scheme)
        if near is not None:
            return f"write {near}:// instead{install and f'; for that, {install}'}"
        return install or f"install the plugin that handles {scheme}; `mx plugins` lists what is installed"


def _install_step(scheme: str) -> str:
    """How to install the plugin for ``scheme``; empty if it is unknown, or if core has it for another kind."""
    known = KNOWN_SCHEMES.get(scheme)
    hint = known and known.install_hint
    return install_command(hint) if hint else ""


def record_named(
    name: str, records: Iterable[Registered[R]], word: str, plugins: Iterable[PluginInfo]
) -> Registered[R]:
    """The record with the name ``name``.

    Args:
        name: Name of the record.
        records: All records of one kind.
        word: Name of the kind in messages.
        plugins: Every plugin found, for messages.

    Raises:
        PluginConflictError: Several plugins offer a record of that name.
        SettingsError: No usable plugin offers one.
    """
    records = sorted(records, key=lambda record: (_name(record), record.plugin.name))
    found = [record for record in records if _name(record) == name]
    if len(found) == 1:
        return found[0]
    if found:
        labels = " and ".join(record.plugin.name for record in found)
        message = f"{len(found)} plugins offer the {word} {name}: {labels}"
        raise PluginConflictError(message, plugin=labels, hint=f"set MX_DISABLED_PLUGINS={found[-1].plugin.name}")
    message = f"no usable plugin offers the {word} {name!r}; installed: {', '.join(map(_name, records)) or 'none'}"
    for plugin in plugins:
        if plugin.status != "loaded":
            message += f"; {plugin.name} is {plugin.status}: {plugin.reason}"
    raise SettingsError(message, hint="`mx plugins` lists what is installed")


def _name(record: Registered[Any]) -> str:
    return str(record.provider.name)
