"""Converters: from the text of a variable to the value of a field. They raise ``ValueError`` with what is expected."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import cast

__all__ = [
    "WITH_UNITS",
    "boolean",
    "buffer_bytes",
    "byte_count",
    "names",
    "one_of",
    "pairs",
    "positive_integer",
    "seconds",
    "tcp_port",
]

#: Ten years. Clocks and timers of the system accept little more.
_MAX_SECONDS = 10 * 365 * 86400


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
    """Make a converter to one of ``words``, which are lower-case; the text may be in any case."""

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
    if value > _MAX_SECONDS:
        reason = f"expected a number of seconds of at most ten years ({_MAX_SECONDS})"
        raise ValueError(reason)
    return value


def tcp_port(text: str) -> int:
    """A TCP port; 0 for any free one."""
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
    """A number of bytes that holds an element of any dtype."""
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
            reason = f"{key.strip()} appears twice"
            raise ValueError(reason)
        result[key.strip()] = value.strip()
    return result


#: Converters of numbers that a file may give as text, with a unit.
WITH_UNITS = frozenset({buffer_bytes, byte_count, seconds})
