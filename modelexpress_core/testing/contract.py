"""What all contracts have in common: their tests are inherited whole, and gaps are written down with a reason.

A contract that can be weakened without anyone seeing it says nothing. So a subclass that replaces one of the tests, or
takes one away, cannot be made; marks that skip tests or expect them to fail stop the collection; and a rule that a
plugin does not keep to yet stands in ``known_gaps``, which fails as soon as the rule is kept.
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
            reported as expected failures; one that passes is an error, so that the list stays true.
    """

    known_gaps: ClassVar[Mapping[str, str]] = {}

    _rules: ClassVar[Mapping[str, object]] = {}

    def __init_subclass__(cls, *, contract: bool = False, **others: Any) -> None:  # noqa: ANN401 - for other bases
        """Refuse a subclass that is less than the contract.

        Args:
            contract: The class is a contract itself: the tests that it defines are rules for its subclasses.
            **others: What other base classes take.

        Raises:
            TypeError: The class replaces a test or takes one away, or its ``known_gaps`` make no sense.
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
        """Expects the failures that ``known_gaps`` announces."""
        reason = self.known_gaps.get(request.node.originalname)
        if reason is not None:
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Called by pytest for each test when it is collected: the last look at what the class has become."""
        cls = metafunc.cls or type(self)
        faults = _faults(cls)
        if not faults and metafunc.definition.originalname in self._rules:
            faults = _marked(cls, metafunc)
        if faults:
            pytest.fail(faults, pytrace=False)


def violated(message: str, cause: BaseException | None = None) -> NoReturn:
    """Fail a test of a contract: ``message`` is for the author of the plugin.

    Raises:
        AssertionError: With ``message``, from ``cause``.
    """
    __tracebackhide__ = True
    raise AssertionError(message) from cause


def _faults(cls: type[Contract]) -> str:
    """What ``cls`` lacks of the contract; empty where it is whole."""
    name = cls.__name__
    for rule, original in {**cls._rules, **{final: vars(Contract)[final] for final in _FINAL}}.items():
        present = inspect.getattr_static(cls, rule, None)
        if present is original:
            continue
        verb = "takes away" if present is None else "overrides"
        return (
            f"{name} {verb} {rule}, which is a part of the contract. Override fixtures, not tests; a rule that the "
            f'plugin does not keep to yet belongs into known_gaps = {{"{rule}": "the reason"}}'
        )
    for rule, reason in cls.known_gaps.items():
        if rule not in cls._rules:
            return f"known_gaps of {name} names {rule}, which is no test of the contract"
        if not isinstance(reason, str) or not reason.strip():
            return f"known_gaps of {name} gives no reason for {rule}: say why, and where it is being mended"
    return ""


def _marked(cls: type[Contract], metafunc: pytest.Metafunc) -> str:
    """What marks do to a test of the contract that nobody would see."""
    for mark in metafunc.definition.iter_markers():
        if mark.name == "xfail" or (mark.name == "skip" and not (mark.args or mark.kwargs.get("reason"))):
            return (
                f"{cls.__name__} is marked {mark.name}, which weakens the contract. A rule that the plugin does not "
                f"keep to yet belongs into known_gaps, with the reason; what cannot be tested here is skipped with "
                f"pytest.mark.skipif and a reason"
            )
    return ""
