"""The format of lists, byte ranges, hints and text of others in messages."""

from __future__ import annotations

import re
from collections.abc import Collection

__all__ = [
    "PUBLIC_QUERY",
    "byte_range",
    "hide_credentials",
    "hide_credentials_of_urls",
    "listed",
    "may_hold_credentials",
    "printable",
    "printable_lines",
    "with_hint",
    "without_credentials",
]

#: Number of names that a message lists; it counts the others.
_LISTED = 8


#: Letters and marks without a shape, which ``str.isprintable`` lets pass.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]")

#: Query values that are shown; all others may be credentials (SAS tokens, signatures) and are hidden.
PUBLIC_QUERY = frozenset({"region", "revision", "tls", "version", "versionId"})

#: Ends a URL in the middle of a text.
_BETWEEN_URLS = re.compile(r"([\s'\"<>]+)")

_AFTER_SCHEME = re.compile(r"(?<=[A-Za-z0-9+.-]):/{1,3}")

#: Punctuation of the sentence after a URL.
_PUNCTUATION = ".,;:)"

_SCHEME_AND_SLASHES = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")


def printable(text: str) -> str:
    """``text`` of others in one line, with each character visible that can be printed, and the others escaped.

    Escaped are control characters and line ends, which could forge lines or control a terminal, and characters that
    have no width or change the direction of text, which could make one name look like another.
    """
    if text.isprintable() and not _INVISIBLE.search(text):
        return text
    return "".join(c if c.isprintable() and not _INVISIBLE.match(c) else _escaped(c) for c in text)


def printable_lines(text: str) -> str:
    """``text`` in its own lines, each of them as ``printable`` returns it."""
    return "\n".join(map(printable, text.split("\n")))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def may_hold_credentials(text: str) -> bool:
    """Whether ``text`` may be a URL, or a part of one, with a password or a signature."""
    return "://" in text or "@" in text.partition(":")[2] or "=" in text.partition("?")[2]


def hide_credentials(text: str) -> str:
    """``text``, without what may be credentials if it may be a URL or a part of one."""
    return without_credentials(text) if may_hold_credentials(text) else text


def hide_credentials_of_urls(text: str) -> str:
    """``text``, of any length, with URLs that show no user information, and of queries only public values."""
    if ":/" not in text:
        return text
    return "".join(_shown_url(part) if ":/" in part else part for part in _BETWEEN_URLS.split(text))


def _shown_url(word: str) -> str:
    scheme = _AFTER_SCHEME.search(word)
    if scheme is None:
        return word
    rest = word[scheme.end() :]
    _, at, address = rest.rpartition("@")
    rest = f"***@{address}" if at else rest
    start, mark, query = rest.partition("?")
    if mark:
        end = len(query.rstrip(_PUNCTUATION))
        rest = f"{start}?{'&'.join(map(_shown_pair, query[:end].split('&')))}{query[end:]}"
    return word[: scheme.end()] + rest


def _shown_pair(pair: str) -> str:
    key, equals, value = pair.partition("=")
    return f"{key}={value if key in PUBLIC_QUERY else '***'}" if equals else "***"


def without_credentials(text: str) -> str:
    """``text``, perhaps an invalid URI, without what may be user information, a query or a fragment."""
    before, at, rest = text.rpartition("@")
    if at:
        scheme = _SCHEME_AND_SLASHES.match(before)
        text = f"{scheme[0] if scheme else ''}***"
        # Behind an at sign in a query, the query continues.
        text += "" if "?" in before or "#" in before else f"@{rest}"
    start, mark, _ = text.partition("?")
    return start.partition("#")[0] + (f"{mark}***" if mark else "")


def listed(names: Collection[str], *, most: int = _LISTED, separator: str = ", ") -> str:
    """``names``, or the first ``most`` of them and the number of the others: ``"a, b and 3 more"``, each printable."""
    shown = separator.join(map(printable, list(names)[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def byte_range(offset: int, length: int) -> str:
    """The range of ``length`` bytes from ``offset``, with the last byte included, as in HTTP: ``"bytes 0-99"``."""
    return f"bytes {offset}-{offset + length - 1}"


def with_hint(message: str, hint: str | None) -> str:
    """``message`` and the next step, if there is one, on one line."""
    return f"{message}; {hint}" if hint else message
