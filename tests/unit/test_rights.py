"""Rights of callers: which rules allow what, and which texts are no rules."""

from __future__ import annotations

import json

import pytest

from modelexpress_core.contracts.rights import PUBLISH, READ, Rights
from modelexpress_core.errors import SettingsError
from modelexpress_core.settings import from_env
from modelexpress_core.wire.settings import AuthSettings

_RULES = [
    {"names": ["trainer-*"], "models": ["acme/*"], "allow": ["publish", "read"]},
    {"names": ["*"], "models": ["Public/*"], "allow": ["read"]},
]


@pytest.mark.parametrize(
    ("name", "right", "model", "expected"),
    [
        ("trainer-1", PUBLISH, "acme/llama", True),
        ("trainer-1", PUBLISH, "ACME/Llama", True),  # source ids do not distinguish the case either
        ("trainer-1", PUBLISH, "other/llama", False),
        ("trainer-1", PUBLISH, "public/llama", False),
        ("Trainer-1", READ, "acme/llama", False),
        ("reader", READ, "public/llama", True),
        ("reader", READ, "acme/llama", False),
        ("reader", "delete", "public/llama", False),
    ],
)
def test_a_caller_may_do_what_one_rule_allows(name: str, right: str, model: str, expected: bool) -> None:
    """Patterns of names distinguish upper and lower case, patterns of models do not."""
    assert expected == Rights.from_data(_RULES).allows(name, right, model)


def test_without_rules_everything_is_allowed() -> None:
    """As before there were rights."""
    assert Rights().allows("anybody", PUBLISH, "any/model")


def test_text_and_file_mean_the_same() -> None:
    """The variable holds JSON; the rights print as JSON that means the same."""
    rights = Rights.from_data(_RULES)

    assert rights == Rights.from_text(json.dumps(_RULES)) == Rights.from_text(str(rights))
    assert str(Rights()) == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[]", "expected a list of rules"),
        ('{"names": "a"}', "expected a list of rules"),
        ("[1]", "rule 1 is no mapping"),
        ('[{"names": ["a"], "models": ["*"]}]', "allow is missing"),
        ('[{"names": ["a"], "models": ["*"], "allow": ["read"], "deny": []}]', "'deny' is unknown"),
        ('[{"names": ["a"], "models": ["*"], "allow": ["write"]}]', "unknown right 'write'; rights are publish, read"),
        ('[{"names": [], "models": ["*"], "allow": ["read"]}]', "names of rule 1 must be a list of words"),
        ('[{"names": ["a", 1], "models": ["*"], "allow": ["read"]}]', "names of rule 1 must be a list of words"),
    ],
)
def test_what_is_no_rule_is_refused(text: str, problem: str) -> None:
    """The message says what is wrong with which rule."""
    with pytest.raises(ValueError, match=problem):
        Rights.from_text(text)


def test_rights_without_authentication_are_an_error() -> None:
    """They would restrict nobody."""
    with pytest.raises(SettingsError, match="MX_AUTH_RIGHTS is set, and MX_AUTH_MODE is off"):
        from_env(AuthSettings, {"MX_AUTH_RIGHTS": json.dumps(_RULES)})
