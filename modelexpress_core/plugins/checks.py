"""The rules for plugins and their records that pluggy does not check."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import pluggy

from modelexpress_core import hookspecs
from modelexpress_core.errors import PluginApiError, PluginLoadError
from modelexpress_core.hooks import PROJECT_NAME
from modelexpress_core.plugins.kinds import KINDS, Kind
from modelexpress_core.providers import API_VERSION

__all__ = ["check_functions", "check_plain_functions", "check_unique", "checked_records", "validation_reason"]

R = TypeVar("R")

_HOOKS = frozenset(name for name in vars(hookspecs) if name.startswith("mx_"))

_REGISTER_HOOKS = frozenset(kind.hook for kind in KINDS)

#: Hooks whose result decides something. A hook that neither registers nor decides observes.
POLICY_HOOKS = frozenset({"mx_rank_candidates", "mx_rewrite_uri"})


def check_functions(plugin: object, name: str) -> list[str]:
    """The hooks that ``plugin`` implements.

    Raises:
        PluginLoadError: A mistake that pluggy accepts silently: a misspelt, unmarked or async function, or a wrapper
            of a hook that has nothing to wrap.
    """
    hooks = []
    for attribute in dir(plugin):
        function = getattr(plugin, attribute, None)
        options = _mark(function, "impl")
        if options is None:
            if attribute in _HOOKS and callable(function) and _mark(function, "spec") is None:
                message = f"{name} defines {attribute} without @hookimpl"
                raise PluginLoadError(message, plugin=name, hint="have you forgotten @hookimpl above it?")
            continue
        hook = options.get("specname") or attribute
        if hook not in _HOOKS:
            if options["optionalhook"]:  # for example of a later version of the contract
                continue
            near = difflib.get_close_matches(hook, _HOOKS, n=1)
            message = f"{name} implements {hook}, which is no hook"
            hint = f"did you mean {near[0]}?" if near else f"the hooks are: {', '.join(sorted(_HOOKS))}"
            raise PluginLoadError(message, plugin=name, hint=hint)
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            message = f"{name} implements {hook} as async def; hooks are called without an event loop"
            raise PluginLoadError(message, plugin=name, hint="write it as a plain def")
        wraps = options["wrapper"] or options["hookwrapper"]
        if hook in _REGISTER_HOOKS and wraps:
            message = f"{name} wraps {hook}, but the records of a plugin cannot be wrapped"
            raise PluginLoadError(message, plugin=name, hint="return your own records from a plain @hookimpl")
        if (
            hook not in _REGISTER_HOOKS
            and hook not in POLICY_HOOKS
            and (wraps or inspect.isgeneratorfunction(function))
        ):
            message = f"{name} implements {hook} as a generator or wrapper, but observers are only called"
            raise PluginLoadError(message, plugin=name, hint="write it as a plain def without yield")
        hooks.append(hook)
    return hooks


def check_plain_functions(name: str, hooks: Iterable[str], seen: Collection[str]) -> None:
    """Refuse marked objects that pluggy ignores because they are no plain functions: those missing in ``seen``."""
    for hook in hooks:
        if hook not in seen:
            message = f"{name} implements {hook}, but not as a plain function or method"
            raise PluginLoadError(message, plugin=name, hint="write it as a plain def, with @hookimpl on top")


def check_unique(records: Iterable[Any], kind: Kind[Any, Any], name: str) -> None:
    """Refuse records of one plugin that claim the same scheme."""
    seen: dict[tuple[str, str], str] = {}
    for record in records:
        for scheme in getattr(record, "schemes", ()):
            # A scheme may have one regular record, and any number of alternatives with different names.
            keys = [("record", f"{scheme} {record.name}")]
            keys += [] if record.alternative else [("regular", scheme)]
            for key in keys:
                if key in seen:
                    message = f"{name} claims the {kind.word} scheme {scheme} twice: {seen[key]}, {record.name}"
                    hint = "mark one alternative=True, and give them different names"
                    raise PluginLoadError(message, plugin=name, hint=hint)
                seen[key] = record.name


def checked_records(returned: object, kind: Kind[R, Any], name: str) -> tuple[R, ...]:
    """The records in ``returned``, the result of the hook of ``kind``, after checks."""
    hook, cls = kind.hook, kind.record
    if isinstance(returned, cls) or not isinstance(returned, Iterable) or isinstance(returned, str):
        message = f"{hook} of {name} returned {type(returned).__name__}, not a list of {cls.__name__} records"
        hint = "put the record into a list" if isinstance(returned, cls) else f"return [{cls.__name__}(...)]"
        raise PluginLoadError(message, plugin=name, hint=hint)
    records = tuple(returned)
    for record in records:
        version = getattr(record, "api_version", None)
        if version is not None and version != API_VERSION:
            side = "modelexpress-core" if version > API_VERSION else name
            message = (
                f"{name} was written for version {version} of the hook contract, but this is version {API_VERSION}"
            )
            raise PluginApiError(message, plugin=name, hint=f"upgrade {side}")
        if not isinstance(record, cls):
            message = f"{hook} of {name} returned a {type(record).__name__} among its records"
            raise PluginLoadError(message, plugin=name, hint=f"return {cls.__name__} records for a {kind.word}")
    return records


def validation_reason(exc: pluggy.PluginValidationError) -> str:
    """The reason in ``exc``, without the first line, which repeats the plugin's name."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return "; ".join(lines[1:]) or lines[0]


def _mark(function: object, kind: str) -> dict[str, Any] | None:
    """The options that a marker attached to ``function``."""
    # A static lookup does not load lazy modules, and ignores mocks, which have every attribute.
    lookup = getattr if inspect.isroutine(function) else inspect.getattr_static
    options = lookup(function, f"{PROJECT_NAME}_{kind}", None)
    return options if isinstance(options, dict) else None
