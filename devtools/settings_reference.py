"""Write the tables of docs/settings.md from the settings classes: ``python -m devtools.settings_reference``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from devtools.packages import discover
from modelexpress_core.plugins import CORE, PluginManager
from modelexpress_core.settings import CORE_SETTINGS, SettingValue, describe

__all__ = ["PAGE", "classes", "with_tables"]

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

_TABLES = re.compile(r"(<!-- tables -->\n).*(<!-- end of tables -->\n)", re.DOTALL)


def with_tables(text: str) -> str:
    """Return ``text`` with current tables between their marks."""
    return _TABLES.sub(lambda marks: marks[1] + "\n".join(_lines()) + "\n" + marks[2], text)


def _lines() -> Iterator[str]:
    for owner, cls in classes():
        about = (cls.__doc__ or "").strip().splitlines()[0].rstrip(".")
        yield f"\n## {owner}: {about[:1].lower()}{about[1:]}\n"
        yield "| variable | default | meaning |"
        yield "|---|---|---|"
        for row in describe(cls, {}, owner=owner):
            names = " or ".join(f"`{name}`" for name in (row.name, *row.aliases))
            meaning = row.help.replace("|", r"\|")
            yield f"| {names} | {_default(row)} | {meaning} |"
    yield ""


def classes() -> Iterator[tuple[str, type]]:
    """Yield every settings class of this repository, with its distribution."""
    for cls in CORE_SETTINGS:
        yield CORE, cls
    # Other installed plugins have their own documentation.
    first_party = {CORE, *(package.distribution for package in discover())}
    for owner, cls in PluginManager.discover({}).settings_classes():
        if owner in first_party:
            yield owner, cls


def _default(row: SettingValue) -> str:
    if not row.value:
        return "unset"
    if row.value in {"True", "False"}:
        return "1" if row.value == "True" else "0"
    if row.name.endswith("_BYTES"):
        return f"{int(row.value) >> 20} MiB"
    return f"{float(row.value):g} s" if row.name.endswith(("_SECONDS", "_SECS")) else row.value


def main() -> None:
    """Update the page."""
    PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()
