"""Write the tables of docs/credentials.md, which tests check: ``python -m devtools.credentials_reference``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from devtools.credential_matrices import STORES, CheckedBy, Store

__all__ = ["PAGE", "with_tables"]

PAGE = Path(__file__).parents[1] / "docs" / "credentials.md"

_TABLES = re.compile(r"(<!-- tables -->\n).*(<!-- end of tables -->\n)", re.DOTALL)

#: The columns, in the order of the page.
_CONDITIONS = (
    "valid",
    "missing",
    "wrong",
    "expired",
    "expired, and renewed",
    "expired, and refused again",
    "may not list",
    "may not read",
)

_MARKS: dict[CheckedBy, str] = {"emulator": " (E)", "stand-in": " (S)", "no server": ""}


def with_tables(text: str) -> str:
    """Return ``text`` with current tables between their marks."""
    return _TABLES.sub(lambda marks: marks[1] + "\n".join(_lines()) + "\n" + marks[2], text)


def _lines() -> Iterator[str]:
    for store in STORES:
        yield f"\n## {store.name}\n"
        page = f"[{store.package}](../plugins/{store.package}/README.md)"
        yield f"Variables, permissions and promises are on the page of the package {page}.\n"
        yield "Credentials are looked up in this order:\n"
        yield from (f"{number}. {place}" for number, place in enumerate(store.order, 1))
        yield ""
        yield from (f"{note}\n" for note in store.notes)
        yield "| credential | how to give it |"
        yield "|---|---|"
        yield from (f"| {kind.name} | {kind.given_by} |" for kind in store.kinds)
        yield ""
        yield from _matrix(store)
    yield ""


def _matrix(store: Store) -> Iterator[str]:
    """The outcomes: a number for each cause, which a second table explains."""
    causes: dict[str, int] = {}
    conditions = [name for name in _CONDITIONS if any(name in kind.outcomes for kind in store.kinds)]
    yield f"| what happens | {' | '.join(conditions)} |"
    yield f"|---{'|---' * len(conditions)}|"
    for kind in store.kinds:
        cells = []
        for condition in conditions:
            outcome = kind.outcomes.get(condition)
            if outcome is None:
                cells.append("")
                continue
            shown = f"error {causes.setdefault(outcome.cause, len(causes) + 1)}" if outcome.cause else "loads"
            cells.append(f"{shown}{_MARKS[outcome.checked_by]}")
        yield f"| {kind.name} | {' | '.join(cells)} |"
    yield "\n| error | likely cause in its message |"
    yield "|---|---|"
    yield from (f"| {number} | {cause} |" for cause, number in causes.items())
    yield f"\nEmulator (E): {store.emulator}. Stand-ins (S): {store.stand_ins}."


def main() -> None:
    """Update the page."""
    PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()
