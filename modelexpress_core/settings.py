"""How settings are declared and read: frozen attrs classes whose fields name their variable.

A settings class is read once, where the program is put together, from a mapping that is usually the
process environment. Nothing is read at import and nothing changes later::

    @frozen
    class MySettings:
        timeout_seconds: float = env("MX_MY_TIMEOUT", default=10.0, converter=seconds, help="...")


    settings = from_env(MySettings, os.environ)

A program that has flags and a file, too, reads from ``Sources``: ``from_sources(MySettings, sources)``.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import attrs
from attrs import frozen

from modelexpress_core.errors import SettingsError

__all__ = [
    "CORE_SETTINGS",
    "Given",
    "LoadSettings",
    "PluginSettings",
    "SettingValue",
    "Sources",
    "Written",
    "boolean",
    "buffer_bytes",
    "byte_count",
    "describe",
    "env",
    "from_env",
    "from_sources",
    "keys",
    "names",
    "one_of",
    "pairs",
    "positive_integer",
    "seconds",
    "tcp_port",
    "unusable",
    "usable",
    "variables",
    "warn_unknown_variables",
]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_METADATA = "modelexpress.env"

#: Ten years. Clocks and timers of the system take no number of seconds that is much longer.
_MOST_SECONDS = 10 * 365 * 86400

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
        source: What the value came from: a variable, a flag, a line of a file, or ``"default"``.
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


@frozen
class Given:
    """The value of a field that is known already.

    Attributes:
        value: As the field has it.
        source: What it came from: ``"--port"``.
    """

    value: Any = attrs.field(repr=False)
    source: str


@frozen
class Written:
    """What a file says of a field.

    Attributes:
        value: As a reader of YAML, JSON or TOML returns it: text, number, switch, list or mapping.
        key: Where it stands in the file, for messages: ``"log.level"``.
        place: Where the file is and where it stands in it, for messages: ``"mx.yaml, line 3"``.
        word: How a switch is written there (``"off"``), where that may also be meant as text; None for all else.
    """

    value: object = attrs.field(repr=False)
    key: str
    place: str
    word: str | None = attrs.field(default=None, repr=False)


@frozen
class Sources:
    """Where the fields of a settings class come from. The first that has a value wins, in this order.

    Attributes:
        given: Flags, by field.
        environ: Variables.
        written: What a file says, by field.
        fallback: What takes the place of defaults, by field.
    """

    environ: Mapping[str, str] = attrs.field(repr=False)  # where secrets are
    given: Mapping[str, Given] = attrs.field(factory=dict, kw_only=True)
    written: Mapping[str, Written] = attrs.field(factory=dict, kw_only=True)
    fallback: Mapping[str, Given] = attrs.field(factory=dict, kw_only=True)


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


def one_of(words: Sequence[str]) -> Callable[[str], str]:
    """A converter to one of ``words``, which are lower-case; the text may be in any case."""

    def convert(text: str) -> str:
        word = text.strip().lower()
        if word not in words:
            reason = f"expected one of {', '.join(words)}"
            raise ValueError(reason)
        return word

    return convert


def positive_integer(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"\d{1,9}", text.strip()) or int(text) < 1:
        reason = "expected a whole number of at least 1"
        raise ValueError(reason)
    return int(text)


def seconds(text: str) -> float:
    """A number of seconds greater than zero, up to ten years, with or without a trailing ``s``."""
    try:
        value = float(text.strip().removesuffix("s"))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        reason = "expected a number of seconds greater than 0"
        raise ValueError(reason)
    if value > _MOST_SECONDS:
        reason = f"expected a number of seconds of at most ten years ({_MOST_SECONDS})"
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
    return from_sources(cls, Sources(os.environ if environ is None else environ))


def from_sources(cls: type[_T], sources: Sources) -> _T:
    """An instance of the settings class ``cls``, each field from the first of ``sources`` that has it.

    Raises:
        SettingsError: One or more values cannot be used, another taking their place or not; all are named.
    """
    reading = _read(cls, sources)
    if reading.problems:
        message = "settings that cannot be used:\n  " + "\n  ".join(reading.problems.values())
        raise SettingsError(message, hint="correct or unset them; `mx settings` shows all that are read")
    return cls(**reading.values)


def unusable(cls: type, sources: Sources) -> tuple[str, ...]:
    """What is wrong with the values of ``sources`` for ``cls``, a line for each; nothing where all can be used."""
    reading = _read(cls, sources)
    if not reading.problems:
        try:
            cls(**reading.values)
        except SettingsError as exc:  # what only the class itself knows
            return (f"{exc.message}; {exc.hint}" if exc.hint else exc.message,)
    return tuple(reading.problems.values())


def usable(cls: type, sources: Sources) -> Mapping[str, tuple[Any, str]]:
    """The fields of ``cls`` that ``sources`` set to what can be used, each with its value and where that is from."""
    reading = _read(cls, sources)
    return {
        name: (value, reading.origins[name]) for name, value in reading.values.items() if not reading.unusable(name)
    }


@frozen
class _Reading:
    """The fields that have a value, what each came from, and by variable or place in a file what is wrong there."""

    values: dict[str, Any]
    origins: dict[str, str]
    problems: dict[tuple[str, str], str]

    def unusable(self, field: str) -> str:
        return "; ".join(problem for (name, _), problem in self.problems.items() if name == field)


def _read(cls: type, sources: Sources) -> _Reading:
    reading = _Reading({}, {}, {})

    def known(field: str, value: Any, origin: str) -> None:  # noqa: ANN401 - of any type
        reading.values[field], reading.origins[field] = value, origin

    hints = typing.get_type_hints(cls) if sources.written else {}
    for attribute, variable, converter in _fields(cls):
        field = attribute.name
        # From the last to the first, so that what is wrong with a value is told even where another wins.
        if field in sources.fallback:
            known(field, sources.fallback[field].value, sources.fallback[field].source)
        if field in sources.written:
            written = sources.written[field]
            kind = _kind(hints[field])
            # One word of several may be a switch in YAML: ``off``. Without a choice of words, no text is a switch.
            value = written.word if kind is str and converter and written.word is not None else written.value
            try:
                known(field, _from_data(value, kind, converter), written.place)
            except ValueError as exc:
                problem = f"{written.place}: {written.key}: {_why(exc, value, variable)}"
                reading.problems[field, written.place] = problem
        found = _text(variable, sources.environ)
        if found is not None:
            name, text = found
            try:
                known(field, converter(text) if converter else text, name)
            except ValueError as exc:
                hidden = "***: the value (not shown) cannot be used"
                problem = hidden if _is_hidden(variable) else f"{text!r}: {exc}"
                reading.problems[field, name] = f"{name}={problem}"
        if field in sources.given:
            known(field, sources.given[field].value, sources.given[field].source)
    return reading


def _is_hidden(variable: _Variable) -> bool:
    return variable.secret or variable.shown is not None


class _WrongTypeError(ValueError):
    """A value of another type than the field's; says so without the value."""


def _why(exc: ValueError, value: object, variable: _Variable) -> str:
    """Why ``value`` cannot be used, without it where it may be a secret."""
    if value is None:
        return str(exc)
    if _is_hidden(variable):  # a converter may quote it, as int() does
        return str(exc) if isinstance(exc, _WrongTypeError) else "the value (not shown) cannot be used"
    try:
        text = repr(value)
    except ValueError:  # of a number with thousands of digits
        return "the value (not shown) cannot be used"
    return f"{text if len(text) <= _SHOWN_CHARACTERS else f'{text[:_SHOWN_CHARACTERS]}...'}: {exc}"


#: What a message shows of a value.
_SHOWN_CHARACTERS = 80

_KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def _kind(hint: Any) -> Any:  # noqa: ANN401 - of any type
    """The type that values of a field with the type ``hint`` have, where they are not None."""
    is_optional = type(None) in typing.get_args(hint)
    return next(each for each in typing.get_args(hint) if each is not type(None)) if is_optional else hint


def _from_data(value: object, kind: Any, converter: Callable[[str], Any] | None) -> Any:  # noqa: ANN401 - of any type
    """``value``, as a file has it, for a field whose values are of the type ``kind``.

    Text does not pass for a number, unless it has a unit, and a number not for text. What the converter refuses in a
    variable it refuses here.
    """
    origin = typing.get_origin(kind) or kind
    if value is None or value in ("", [], {}):
        message = "nothing stands there; leave the key out, or give it a value"
        raise _WrongTypeError(message)
    if origin is bool:
        return _checked(value, bool)
    if origin in {int, float}:
        if isinstance(value, str) and converter in _WITH_UNITS and re.search(r"[A-Za-z]\s*$", value):
            return converter(value)
        number = value if origin is float and type(value) is int else _checked(value, origin)
        return converter(str(number)) if converter else origin(number)
    if origin is tuple:
        text = ",".join(_item(item) for item in _checked(value, list))
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        text = ",".join(f"{_item(key)}={_item(item)}" for key, item in _checked(value, dict).items())
    else:
        text = _checked(value, str)
    return converter(text) if converter else text


def _checked(value: object, kind: type) -> Any:  # noqa: ANN401 - of the type ``kind``
    if type(value) is not kind:
        is_now = _KINDS.get(type(value), f"a {type(value).__name__}")
        message = f"expected {_KINDS[kind]}, and this is {is_now}"
        raise _WrongTypeError(message)
    return value


def _item(value: object) -> str:
    """An item of a list or a mapping, which variables separate by commas."""
    text: str = _checked(value, str)
    if "," in text or not text.strip():
        message = "expected items that are not empty and have no commas"
        raise _WrongTypeError(message)
    return text


def keys(cls: type) -> tuple[str, ...]:
    """Every field of the settings class ``cls`` that a file may set, in order."""
    return tuple(attribute.name for attribute, _, _ in _fields(cls))


def variables(cls: type) -> tuple[str, ...]:
    """Every variable that the settings class ``cls`` reads, aliases included."""
    return tuple(name for _, variable, _ in _fields(cls) for name in variable.names)


def describe(cls: type, environ: Mapping[str, str] | Sources, *, owner: str) -> tuple[SettingValue, ...]:
    """Every setting of ``cls`` with its value in ``environ``, where that came from, and what is wrong with it."""
    reading = _read(cls, environ if isinstance(environ, Sources) else Sources(environ))
    wrong = {name: reading.unusable(name) for name in keys(cls)}
    settings: Any
    settings, concerned = _without_unusable(cls, reading.values)
    wrong |= {name: wrong[name] or problem for name, problem in concerned.items()}
    rows = []
    for attribute, variable, _ in _fields(cls):
        problem = wrong[attribute.name]
        # Of what cannot be used, that is where it stands.
        source = next((place for name, place in reading.problems if name == attribute.name), None)
        source = source or reading.origins.get(attribute.name)
        hidden = variable.secret or problem  # what cannot be read may be a secret in the wrong place
        show = variable.shown if variable.shown and source else _shown
        shown = show(getattr(settings, attribute.name)) if not hidden else "***" if source else ""
        name, *aliases = variable.names
        rows.append(SettingValue(name, tuple(aliases), shown, source or "default", variable.help, owner, problem))
    return tuple(rows)


def _without_unusable(cls: type[_T], values: Mapping[str, Any]) -> tuple[_T, Mapping[str, str]]:
    """An instance of ``cls`` of those ``values`` that fit together, and what is wrong by field: of the others too."""
    wrong: dict[str, str] = {}
    while True:
        try:
            return cls(**values), wrong
        except SettingsError as exc:  # what only the class itself knows, and tells with the variables' names
            if not values:
                raise
            words = set(re.findall(r"\w+", exc.message))
            named = {attribute.name for attribute, variable, _ in _fields(cls) if words.intersection(variable.names)}
            if named.isdisjoint(values):
                named = set(values)
            wrong |= dict.fromkeys(named - set(wrong), exc.message)
            values = {name: value for name, value in values.items() if name not in named}


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


#: Numbers that may be written as text, with a unit.
_WITH_UNITS = frozenset({buffer_bytes, byte_count, seconds})

#: Every settings class of core, in the order in which `mx settings` shows them.
CORE_SETTINGS: tuple[type, ...] = (LoadSettings, PluginSettings)
