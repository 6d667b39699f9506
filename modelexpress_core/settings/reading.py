"""Reading settings: an instance of a settings class from its sources, or every problem with them at once."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from attrs import frozen

from modelexpress_core.errors import SettingsError
from modelexpress_core.messages import hide_credentials, may_hold_credentials, with_hint
from modelexpress_core.settings.converters import WITH_UNITS
from modelexpress_core.settings.declaring import Variable, fields
from modelexpress_core.settings.provenance import SettingSources

__all__ = ["Reading", "find_problems", "from_env", "from_sources", "read", "usable_values"]

_T = TypeVar("_T")

#: Characters of a value that a message shows.
_SHOWN_CHARACTERS = 80

#: Why a value that may be a secret, or is too long, cannot be used.
_NOT_SHOWN = "the value (not shown) cannot be used"

_KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def from_env(cls: type[_T], environ: Mapping[str, str] | None = None) -> _T:
    """An instance of the settings class ``cls``, read from ``environ`` (default: the process's).

    Raises:
        SettingsError: One or more variables cannot be used; the message names all of them.
    """
    return from_sources(cls, SettingSources(os.environ if environ is None else environ))


def from_sources(cls: type[_T], sources: SettingSources) -> _T:
    """An instance of the settings class ``cls``, each field from the first of ``sources`` that has it.

    Raises:
        SettingsError: One or more values cannot be used, even if another value wins over them; all are named.
    """
    reading = read(cls, sources)
    if reading.problems:
        message = "settings that cannot be used:\n  " + "\n  ".join(reading.problems.values())
        raise SettingsError(message, hint="correct or unset them; `mx settings` shows all that are read")
    return cls(**reading.values)


def find_problems(cls: type, sources: SettingSources) -> tuple[str, ...]:
    """The problems of ``cls`` with the values of ``sources``, a line each; none if all can be used."""
    reading = read(cls, sources)
    if not reading.problems:
        try:
            cls(**reading.values)
        except SettingsError as exc:  # a condition of the class itself
            return (with_hint(exc.message, exc.hint),)
    return tuple(reading.problems.values())


def usable_values(cls: type, sources: SettingSources) -> Mapping[str, tuple[Any, str]]:
    """The fields of ``cls`` with a usable value in ``sources``: the value and its source."""
    reading = read(cls, sources)
    return {name: (value, reading.origins[name]) for name, value in reading.values.items() if not reading.problem(name)}


@frozen
class Reading:
    """What was read of a settings class.

    Attributes:
        values: By field, for those that have one.
        origins: Where each value comes from, by field.
        problems: Why a value cannot be used, by field and variable or location in a file.
    """

    values: dict[str, Any]
    origins: dict[str, str]
    problems: dict[tuple[str, str], str]

    def problem(self, field: str) -> str:
        """The problems of ``field``; empty if there are none."""
        return "; ".join(problem for (name, _), problem in self.problems.items() if name == field)


def read(cls: type, sources: SettingSources) -> Reading:
    """Read all fields of ``cls``, whatever is wrong with some."""
    reading = Reading({}, {}, {})

    def accept(field: str, value: Any, origin: str) -> None:  # noqa: ANN401 - of any type
        reading.values[field], reading.origins[field] = value, origin

    hints = typing.get_type_hints(cls) if sources.file_values else {}
    for attribute, variable in fields(cls):
        field, converter = attribute.name, variable.converter
        # From the last source to the first, so that problems with a value are found even if another wins over it.
        if field in sources.fallbacks:
            accept(field, sources.fallbacks[field].value, sources.fallbacks[field].source)
        if field in sources.file_values:
            found = sources.file_values[field]
            kind = _kind(hints[field])
            # A word of several may be a switch in YAML: ``off``. Free text is never written as a switch.
            value = found.switch_text if kind is str and converter and found.switch_text is not None else found.value
            try:
                accept(field, _from_data(value, kind, converter), found.location)
            except ValueError as exc:
                problem = f"{found.location}: {found.key}: {_explain(exc, value, variable)}"
                reading.problems[field, found.location] = problem
        name, text = _text(variable, sources.environ)
        if text is not None:
            try:
                accept(field, converter(text) if converter else text, name)
            except ValueError as exc:
                problem = f"***: {_NOT_SHOWN}" if variable.hidden else _shown_problem(exc, text)
                reading.problems[field, name] = f"{name}={problem}"
        if field in sources.overrides:
            accept(field, sources.overrides[field].value, sources.overrides[field].source)
    return reading


def _text(variable: Variable, environ: Mapping[str, str]) -> tuple[str, str | None]:
    """The first name of ``variable`` that is set, and its text; None if none is."""
    for name in variable.names:
        if environ.get(name, "").strip():
            return name, environ[name]
    return "", None


class _WrongTypeError(ValueError):
    """A value does not have the type of the field. The text does not quote the value."""


def _explain(exc: ValueError, value: object, variable: Variable) -> str:
    """Why ``value`` cannot be used, without the value if it may be a secret."""
    if value is None:
        return str(exc)
    if variable.hidden:  # a converter may quote it, as int() does
        return str(exc) if isinstance(exc, _WrongTypeError) else _NOT_SHOWN
    try:
        text = repr(value)
    except ValueError:  # of a number with thousands of digits
        return _NOT_SHOWN
    if isinstance(value, str):
        return _shown_problem(exc, value)
    if may_hold_credentials(text):
        return _NOT_SHOWN
    return f"{text if len(text) <= _SHOWN_CHARACTERS else f'{text[:_SHOWN_CHARACTERS]}...'}: {exc}"


def _shown_problem(exc: ValueError, text: str) -> str:
    """The value ``text`` without credentials, and why it cannot be used."""
    shown = hide_credentials(text)
    quoted = repr(shown)
    if len(quoted) > _SHOWN_CHARACTERS:
        quoted = f"{quoted[:_SHOWN_CHARACTERS]}..."
    reason = str(exc)
    if shown != text and "'" in reason:  # the reason may quote a part of the value
        return f"{quoted}: the value cannot be used"
    return f"{quoted}: {reason}"


def _kind(hint: Any) -> Any:  # noqa: ANN401 - of any type
    """The type of a field's values, without None, from its annotation."""
    is_optional = type(None) in typing.get_args(hint)
    return next(each for each in typing.get_args(hint) if each is not type(None)) if is_optional else hint


def _from_data(value: object, kind: Any, converter: Callable[[str], Any] | None) -> Any:  # noqa: ANN401 - of any type
    """The value of a field of type ``kind``, from the value in a file.

    Text is no number, unless it has a unit, and a number is no text. A file may not set what the converter refuses.
    """
    origin = typing.get_origin(kind) or kind
    if value is None or value in ("", [], {}):
        message = "the value is empty; leave the key out, or give it a value"
        raise _WrongTypeError(message)
    if hasattr(origin, "from_data"):  # a class for values that are more than words
        return origin.from_data(value)
    if origin is bool:
        return _checked(value, bool)
    if origin in {int, float}:
        if isinstance(value, str) and converter in WITH_UNITS and re.search(r"[A-Za-z]\s*$", value):
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
        actual = _KINDS.get(type(value), f"a {type(value).__name__}")
        message = f"expected {_KINDS[kind]}, and this is {actual}"
        raise _WrongTypeError(message)
    return value


def _item(value: object) -> str:
    """An item of a list or a mapping; a variable separates items by commas."""
    text: str = _checked(value, str)
    if "," in text or not text.strip():
        message = "expected items that are not empty and have no commas"
        raise _WrongTypeError(message)
    return text
