"""How settings are declared and read: frozen attrs classes whose fields name their variable.

A settings class is read once, where the program is put together, from a mapping that is usually the
process environment. Nothing is read at import and nothing changes later::

    @frozen
    class MySettings:
        timeout_seconds: float = env("MX_MY_TIMEOUT", default=10.0, converter=seconds, help="...")


    settings = from_env(MySettings, os.environ)
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import attrs
from attrs import frozen

from modelexpress_core.errors import SettingsError

__all__ = [
    "CORE_SETTINGS",
    "LoadSettings",
    "PluginSettings",
    "SettingValue",
    "boolean",
    "buffer_bytes",
    "byte_count",
    "describe",
    "env",
    "from_env",
    "names",
    "pairs",
    "positive_integer",
    "seconds",
    "tcp_port",
    "variables",
    "warn_unknown_variables",
]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_METADATA = "modelexpress.env"

#: Variables with our prefix that other parts of ModelExpress read, so that they are not called unknown.
RESERVED_VARIABLES = frozenset(
    {
        "MX_FALLBACK",
        "MX_GC_TIMEOUT_SECS",
        "MX_HEARTBEAT_TIMEOUT_SECS",
        "MX_K8S_SERVICE_PATTERN",
        "MX_METADATA_PORT",
        "MX_MODEL_REVISION",
        "MX_MODEL_URI",
        "MX_NIXL_BACKEND",
        "MX_REAPER_SCAN_INTERVAL_SECS",
        "MX_REDIS_HOST",
        "MX_REDIS_PORT",
        "MX_SERVER_ADDRESS",
        "MX_TRANSFER_TIMEOUT",
    }
)


@frozen
class _Variable:
    names: tuple[str, ...]
    help: str
    secret: bool
    shown: Callable[[Any], str] | None


@frozen
class SettingValue:
    """One setting as ``mx settings`` shows it.

    Attributes:
        name: The variable.
        aliases: Other variables read where ``name`` is not set.
        value: Its value as text; ``"***"`` for a secret that is set.
        source: The variable that the value came from, or ``"default"``.
        help: What it does.
        owner: The distribution that reads it.
        problem: Why the value cannot be used; empty where it can.
    """

    name: str
    aliases: tuple[str, ...]
    value: str
    source: str
    help: str
    owner: str
    problem: str = ""


def env(
    name: str,
    *aliases: str,
    default: object,
    help: str,  # noqa: A002 - the word users and typer know
    converter: Callable[[str], Any] | None = None,
    secret: bool = False,
    shown: Callable[[Any], str] | None = None,
) -> Any:  # noqa: ANN401 - an attrs field stands for a value of any type
    """A field of a settings class, read from the variable ``name`` or the first alias that is set.

    Args:
        name: The variable.
        *aliases: Other variables, in order of precedence after ``name``.
        default: Value where no variable is set. An empty variable counts as not set.
        help: One sentence for the settings reference.
        converter: Turns the text into the value; raises ``ValueError`` with a reason.
        secret: Keep the value out of ``repr``, messages and ``mx settings``.
        shown: What ``mx settings`` shows of a value that may hold a secret; such a value has no ``repr``.
    """
    return attrs.field(
        default=default,
        repr=not secret and shown is None,
        metadata={_METADATA: (_Variable((name, *aliases), help, secret, shown), converter)},
    )


def boolean(text: str) -> bool:
    """``1 true yes on`` and ``0 false no off``, in any case."""
    word = text.strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"0", "false", "no", "off"}:
        return False
    reason = "expected 1 or 0 (also true/false, yes/no, on/off)"
    raise ValueError(reason)


def positive_integer(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"\d{1,9}", text.strip()) or int(text) < 1:
        reason = "expected a whole number of at least 1"
        raise ValueError(reason)
    return int(text)


def seconds(text: str) -> float:
    """A number of seconds greater than zero, with or without a trailing ``s``."""
    try:
        value = float(text.strip().removesuffix("s"))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        reason = "expected a number of seconds greater than 0"
        raise ValueError(reason)
    return value


def tcp_port(text: str) -> int:
    """A TCP port; 0 for any that is free."""
    if not re.fullmatch(r"\d{1,5}", text.strip()) or int(text) > 65535:
        reason = "expected a port: a whole number from 0 to 65535"
        raise ValueError(reason)
    return int(text)


def byte_count(text: str) -> int:
    """A number of bytes, plain or with a unit: ``268435456``, ``256MiB``, ``256M``, ``1GiB``, ``1GB``."""
    match = re.fullmatch(r"(\d{1,18})\s*(?:([kmgt])(i?))?b?", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) < 1:
        reason = "expected a number of bytes such as 268435456, 256MiB or 1GB"
        raise ValueError(reason)
    decimal = text.strip().lower().endswith("b") and not match[3] and match[2]
    base = 1000 if decimal else 1024
    return cast("int", int(match[1]) * base ** " kmgt".index((match[2] or " ").lower()))


def buffer_bytes(text: str) -> int:
    """A number of bytes that an element of any dtype fits in."""
    count = byte_count(text)
    if count < 16:
        reason = "expected at least 16 bytes"
        raise ValueError(reason)
    return count


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def pairs(text: str) -> Mapping[str, str]:
    """``key=value`` pairs separated by commas."""
    result: dict[str, str] = {}
    for part in names(text):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            reason = f"expected key=value, not {part!r}"
            raise ValueError(reason)
        if key.strip() in result:
            reason = f"{key.strip()} is given twice"
            raise ValueError(reason)
        result[key.strip()] = value.strip()
    return result


def _fields(cls: type) -> Iterable[tuple[attrs.Attribute[Any], _Variable, Callable[[str], Any] | None]]:
    for attribute in attrs.fields(cls):
        if _METADATA in attribute.metadata:
            variable, converter = attribute.metadata[_METADATA]
            yield attribute, variable, converter


def _text(variable: _Variable, environ: Mapping[str, str]) -> tuple[str, str] | None:
    for name in variable.names:
        if environ.get(name, "").strip():
            return name, environ[name]
    return None


def from_env(cls: type[_T], environ: Mapping[str, str] | None = None) -> _T:
    """An instance of the settings class ``cls``, read from ``environ`` (default: the process's).

    Raises:
        SettingsError: One or more variables cannot be used; the message names every one of them.
    """
    values, problems = _read(cls, os.environ if environ is None else environ)
    if problems:
        message = "settings that cannot be used:\n  " + "\n  ".join(problems.values())
        raise SettingsError(message, hint="correct or unset them; `mx settings` shows all that are read")
    return cls(**values)


def _read(cls: type, environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of the fields that are set, and what is wrong with those that cannot be used, by field."""
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for attribute, variable, converter in _fields(cls):
        found = _text(variable, environ)
        if found is None:
            continue
        name, text = found
        try:
            values[attribute.name] = converter(text) if converter else text
        except ValueError as exc:
            # The reason may quote the value, as int() does.
            problem = "***: the value (not shown) cannot be used" if variable.secret else f"{text!r}: {exc}"
            problems[attribute.name] = f"{name}={problem}"
    return values, problems


def variables(cls: type) -> tuple[str, ...]:
    """Every variable that the settings class ``cls`` reads, aliases included."""
    return tuple(name for _, variable, _ in _fields(cls) for name in variable.names)


def describe(cls: type, environ: Mapping[str, str], *, owner: str) -> tuple[SettingValue, ...]:
    """Every setting of ``cls`` with its value in ``environ``, where that came from, and what is wrong with it."""
    values, problems = _read(cls, environ)
    try:
        settings = cls(**values)
    except SettingsError as exc:  # what only the class itself knows, which may concern any of its fields
        problems |= {name: exc.message for name in values if any(v in exc.message for v in _names_of(cls, name))}
        settings = cls(**{name: value for name, value in values.items() if name not in problems})
    rows = []
    for attribute, variable, _ in _fields(cls):
        found = _text(variable, environ)
        problem = problems.get(attribute.name, "")
        hidden = variable.secret or problem  # what cannot be read may be a secret in the wrong place
        show = variable.shown if variable.shown and found else _shown
        shown = show(getattr(settings, attribute.name)) if not hidden else "***" if found else ""
        name, *aliases = variable.names
        source = found[0] if found else "default"
        rows.append(SettingValue(name, tuple(aliases), shown, source, variable.help, owner, problem))
    return tuple(rows)


def _names_of(cls: type, field: str) -> tuple[str, ...]:
    return next(variable.names for attribute, variable, _ in _fields(cls) if attribute.name == field)


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def warn_unknown_variables(environ: Mapping[str, str], known: Iterable[str]) -> tuple[str, ...]:
    """Log a warning for each ``MX_*`` variable that nothing reads, with the nearest name that is read.

    Returns:
        The unknown variables.
    """
    known = {*known, *RESERVED_VARIABLES}
    unknown = sorted(name for name in environ if name.startswith("MX_") and name not in known)
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        _log.warning("nothing reads the variable %s%s", name, guess)
    return tuple(unknown)


@frozen
class PluginSettings:
    """Which plugins are used."""

    allowed: tuple[str, ...] | None = env(
        "MX_PLUGINS",
        default=None,
        converter=names,
        help="Use only these plugins (distribution names, comma-separated); built-ins always stay.",
    )
    disabled: tuple[str, ...] = env(
        "MX_DISABLED_PLUGINS",
        default=(),
        converter=names,
        help="Never import these plugins (distribution names, comma-separated).",
    )
    prefer: Mapping[str, str] = env(
        "MX_PREFER",
        default=attrs.Factory(dict),
        converter=pairs,
        help="Which plugin handles a scheme that several claim: s3=mx-s3-fast,gs=...",
    )
    strict: bool = env(
        "MX_STRICT_PLUGINS",
        default=False,
        converter=boolean,
        help="Stop at the first broken plugin or conflict instead of going on without it.",
    )


@frozen
class LoadSettings:
    """How weights are fetched."""

    concurrency: int | None = env(
        "MX_CONCURRENCY",
        "RUNAI_STREAMER_CONCURRENCY",
        default=None,
        converter=positive_integer,
        help="Upper bound on concurrent reads, which are tuned below it; unset: the storage's own bound.",
    )
    chunk_bytes: int = env(
        "MX_CHUNK_BYTES",
        default=8 << 20,
        converter=buffer_bytes,
        help="Largest single read; larger tensors are split.",
    )
    staging_bytes: int = env(
        "MX_STAGING_BYTES",
        default=256 << 20,
        converter=buffer_bytes,
        help="Memory for bytes that cannot be read straight into place.",
    )
    retry_attempts: int = env(
        "MX_RETRY_ATTEMPTS",
        default=8,
        converter=positive_integer,
        help="How often one read is tried before the load fails; progress starts the count anew.",
    )
    retry_budget_seconds: float = env(
        "MX_RETRY_BUDGET_SECONDS",
        default=120.0,
        converter=seconds,
        help="Total time that all reads of one load may spend waiting between tries.",
    )
    stall_seconds: float = env(
        "MX_STALL_SECONDS",
        default=30.0,
        converter=seconds,
        help="How long a read may go without a byte at most; less as soon as it is known how long reads take here.",
    )
    verify_digests: bool = env(
        "MX_VERIFY_DIGESTS",
        default=True,
        converter=boolean,
        help="Compare what was read with the digests that the storage publishes, where whole files are read.",
    )
    force_staging: bool = env(
        "MX_FORCE_STAGING",
        default=False,
        converter=boolean,
        help="Read everything through staging buffers, as for devices that need them; for tests of that path.",
    )


#: Every settings class of core, in the order in which `mx settings` shows them.
CORE_SETTINGS: tuple[type, ...] = (LoadSettings, PluginSettings)
