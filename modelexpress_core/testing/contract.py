"""The base of all contracts: subclasses inherit all tests, and list gaps with a reason.

A contract must not be weakened silently. A subclass that replaces or removes a test cannot be created. Marks that skip
tests, or expect them to fail, stop the collection. ``known_gaps`` lists rules that a plugin breaks so far; an entry
fails as soon as the plugin keeps the rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import pytest

__all__ = ["Contract", "violated"]

_FINAL = ("pytest_generate_tests", "_known_gap")


class Contract:
    """Tests to inherit. A subclass whose name begins with ``Test`` runs them, with the fixtures that it overrides.

    Attributes:
        known_gaps: Tests that fail, with the reason: ``{"test_close_may_be_called_again": "it closes once"}``. They are
            reported as expected failures. A test in the list that passes is an error.
    """

    known_gaps: ClassVar[Mapping[str, str]] = {}

    _rules: ClassVar[Mapping[str, object]] = {}

    def __init_subclass__(cls, *, contract: bool = False, **others: Any) -> None:  # noqa: ANN401 - for other bases
        """Refuse a subclass that weakens the contract.

        Args:
            contract: Whether the class is a contract itself: its tests are rules for its subclasses.
            **others: Arguments of other base classes.

        Raises:
            TypeError: The class replaces or removes a test, or its ``known_gaps`` are invalid.
        """
        super().__init_subclass__(**others)
        faults = _faults(cls)
        if faults:
            raise TypeError(faults)
        if contract:
            own = {name: rule for name, rule in vars(cls).items() if name.startswith("test_")}
            cls._rules = {**cls._rules, **own}

    @pytest.fixture(autouse=True)
    def _known_gap(self, request: pytest.FixtureRequest) -> None:
        """Expects the failures that ``known_gaps`` lists."""
        reason = self.known_gaps.get(request.node.originalname)
        if reason is not None:
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Check the complete class; pytest calls this for each collected test."""
        cls = metafunc.cls or type(self)
        faults = _faults(cls)
        if not faults and metafunc.definition.originalname in self._rules:
            faults = _marked(cls, metafunc)
        if faults:
            pytest.fail(faults, pytrace=False)


def violated(message: str, cause: BaseException | None = None) -> NoReturn:
    """Fail a test of a contract with a message for the author of the plugin.

    Raises:
        AssertionError: With ``message``, from ``cause``.
    """
    __tracebackhide__ = True
    raise AssertionError(message) from cause


def _faults(cls: type[Contract]) -> str:
    """How ``cls`` weakens the contract; empty if it does not."""
    name = cls.__name__
    for rule, original in {**cls._rules, **{final: vars(Contract)[final] for final in _FINAL}}.items():
        present = inspect.getattr_static(cls, rule, None)
        if present is original:
            continue
        verb = "removes" if present is None else "overrides"
        return (
            f"{name} {verb} {rule}, which is a part of the contract. Override fixtures, not tests; list a rule that "
            f'the plugin breaks so far in known_gaps = {{"{rule}": "the reason"}}'
        )
    for rule, reason in cls.known_gaps.items():
        if rule not in cls._rules:
            return f"known_gaps of {name} names {rule}, which is no test of the contract"
        if not isinstance(reason, str) or not reason.strip():
            return f"known_gaps of {name} gives no reason for {rule}: say why, and where it will be fixed"
    return ""


def _marked(cls: type[Contract], metafunc: pytest.Metafunc) -> str:
    """The mark that silently weakens a test of the contract; empty if there is none."""
    for mark in metafunc.definition.iter_markers():
        if mark.name == "xfail" or (mark.name == "skip" and not (mark.args or mark.kwargs.get("reason"))):
            return (
                f"{cls.__name__} is marked {mark.name}, which weakens the contract. List a rule that the plugin breaks "
                f"so far in known_gaps, with the reason; skip a test that cannot run here with pytest.mark.skipif "
                f"and a reason"
            )
    return ""
