"""The base class of all contracts: subclasses inherit every test, and declare known gaps with a reason.

A contract must not be weakened silently. So a subclass that overrides or removes a test cannot be defined; marks that
skip tests or expect them to fail stop the collection; and a rule that a plugin does not follow yet is listed in
``known_gaps``, which fails as soon as the plugin follows the rule.
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
            reported as expected failures; one that passes is an error, so that the list stays correct.
    """

    known_gaps: ClassVar[Mapping[str, str]] = {}

    _rules: ClassVar[Mapping[str, object]] = {}

    def __init_subclass__(cls, *, contract: bool = False, **others: Any) -> None:  # noqa: ANN401 - for other bases
        """Refuse a subclass that weakens the contract.

        Args:
            contract: The class is a contract itself: the tests that it defines are rules for its subclasses.
            **others: Arguments for other base classes.

        Raises:
            TypeError: The class overrides or removes a test, or its ``known_gaps`` are not valid.
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
        """Expect the failures that ``known_gaps`` lists."""
        reason = self.known_gaps.get(request.node.originalname)
        if reason is not None:
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Check the class once more. pytest calls this for each test that it collects."""
        cls = metafunc.cls or type(self)
        faults = _faults(cls)
        if not faults and metafunc.definition.originalname in self._rules:
            faults = _marked(cls, metafunc)
        if faults:
            pytest.fail(faults, pytrace=False)


def violated(message: str, cause: BaseException | None = None) -> NoReturn:
    """Fail a test of a contract with ``message``, which the author of the plugin reads.

    Raises:
        AssertionError: With ``message``, from ``cause``.
    """
    __tracebackhide__ = True
    raise AssertionError(message) from cause


def _faults(cls: type[Contract]) -> str:
    """Return how ``cls`` weakens the contract; empty if it does not."""
    name = cls.__name__
    for rule, original in {**cls._rules, **{final: vars(Contract)[final] for final in _FINAL}}.items():
        present = inspect.getattr_static(cls, rule, None)
        if present is original:
            continue
        verb = "removes" if present is None else "overrides"
        return (
            f"{name} {verb} {rule}, which is part of the contract. Override fixtures, not tests. If the plugin does "
            f'not follow the rule yet, write known_gaps = {{"{rule}": "the reason"}}'
        )
    for rule, reason in cls.known_gaps.items():
        if rule not in cls._rules:
            return f"known_gaps of {name} lists {rule}, which is not a test of the contract"
        if not isinstance(reason, str) or not reason.strip():
            return f"known_gaps of {name} has no reason for {rule}: say why, and where it will be fixed"
    return ""


def _marked(cls: type[Contract], metafunc: pytest.Metafunc) -> str:
    """Return how a mark weakens a test of the contract silently; empty if none does."""
    for mark in metafunc.definition.iter_markers():
        if mark.name == "xfail" or (mark.name == "skip" and not (mark.args or mark.kwargs.get("reason"))):
            return (
                f"{cls.__name__} is marked {mark.name}, which weakens the contract. If the plugin does not follow a "
                f"rule yet, list it in known_gaps with the reason. If a test cannot run here, use pytest.mark.skipif "
                f"with a reason"
            )
    return ""
