"""Rights: what each caller of a server may do, by the caller's name and the model's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from attrs import frozen

__all__ = ["DELETE", "ENSURE", "PUBLISH", "READ", "Rights", "Rule"]

#: To publish records of a model.
PUBLISH = "publish"

#: To find workers that hold a model, and to read it from them or from the server's cache.
READ = "read"

#: To have the server download a model into its cache, with the server's own credentials.
ENSURE = "ensure"

#: To remove a model from the server's cache, where the server allows that at all.
DELETE = "delete"

_KNOWN = (PUBLISH, READ, ENSURE, DELETE)

_KEYS = ("names", "models", "allow")

#: More rules than an operator writes; each call compares its caller with all of them.
_MAX_RULES = 1000


@frozen
class Rule:
    """One rule. A pattern may hold ``*``, ``?`` and ``[abc]``.

    Attributes:
        names: Patterns of callers' names.
        models: Patterns of models' names; upper and lower case are the same, as in source ids.
        allow: Rights that these callers have for these models: ``"publish"``, ``"read"``, ``"ensure"``, ``"delete"``.
    """

    names: tuple[str, ...]
    models: tuple[str, ...]
    allow: tuple[str, ...]

    def matches(self, name: str, model: str) -> bool:
        """Whether the rule is about the caller ``name`` and ``model``."""
        lower = model.lower()
        return any(fnmatchcase(name, pattern) for pattern in self.names) and any(
            fnmatchcase(lower, pattern.lower()) for pattern in self.models
        )


@frozen
class Rights:
    """The rules of a server. A caller may do what at least one rule allows; without any rule, everything.

    Attributes:
        rules: The rules, in any order.
    """

    rules: tuple[Rule, ...] = ()

    @classmethod
    def from_text(cls, text: str) -> Rights:
        """Parse JSON: a list of objects with ``names``, ``models`` and ``allow``.

        Raises:
            ValueError: The text is no such list.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            reason = f"expected JSON such as {_EXAMPLE}"
            raise ValueError(reason) from None
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: object) -> Rights:
        """Convert a list of mappings with ``names``, ``models`` and ``allow``, as a file has it.

        Raises:
            ValueError: The data is no such list.
        """
        if not isinstance(data, list) or not data:
            reason = f"expected a list of rules such as {_EXAMPLE}"
            raise ValueError(reason)
        if len(data) > _MAX_RULES:
            reason = f"expected at most {_MAX_RULES} rules, and these are {len(data)}"
            raise ValueError(reason)
        return cls(tuple(_rule(item, number) for number, item in enumerate(data, 1)))

    def allows(self, name: str, right: str, model: str) -> bool:
        """Whether the caller ``name`` has ``right`` for ``model``; true for every caller if there are no rules."""
        return not self.rules or any(right in rule.allow and rule.matches(name, model) for rule in self.rules)

    def __str__(self) -> str:
        """As JSON, which ``from_text`` parses; empty without rules."""
        rules = [{"names": rule.names, "models": rule.models, "allow": rule.allow} for rule in self.rules]
        return json.dumps(rules) if rules else ""


_EXAMPLE = '[{"names": ["trainer-*"], "models": ["*"], "allow": ["publish", "read"]}]'


def _rule(item: object, number: int) -> Rule:
    if not isinstance(item, Mapping):
        reason = f"rule {number} is no mapping with {', '.join(_KEYS)}"
        raise ValueError(reason)  # noqa: TRY004 - converters raise it for any value that they refuse
    unknown = [str(key) for key in item if key not in _KEYS]
    missing = [key for key in _KEYS if key not in item]
    if unknown or missing:
        reason = f"rule {number} needs {', '.join(_KEYS)} and nothing else; " + (
            f"{unknown[0]!r} is unknown" if unknown else f"{missing[0]} is missing"
        )
        raise ValueError(reason)
    rule = Rule(*(_words(item[key], f"{key} of rule {number}") for key in _KEYS))
    wrong = [right for right in rule.allow if right not in _KNOWN]
    if wrong:
        reason = f"allow of rule {number} has the unknown right {wrong[0]!r}; rights are {', '.join(_KNOWN)}"
        raise ValueError(reason)
    return rule


def _words(value: Any, what: str) -> tuple[str, ...]:  # noqa: ANN401 - of any type
    words: Sequence[object] = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        reason = f"{what} must be a list of words"
        raise ValueError(reason)
    return tuple(str(word).strip() for word in words)
