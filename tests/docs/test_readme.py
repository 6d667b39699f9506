"""What the texts promise exists: names, commands, schemes, variables, files."""

from __future__ import annotations

import re
from importlib.metadata import metadata
from pathlib import Path

import pytest

import modelexpress_core as mx
from devtools import settings_reference
from modelexpress_core.cli.app import build_app
from modelexpress_core.plugins import STORAGE, TRANSPORT
from modelexpress_core.settings import variables

ROOT = Path(__file__).parents[2]
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("plugins/*/README.md"),
    *ROOT.glob("integrations/*/README.md"),
    *ROOT.glob("examples/*/README.md"),
]
README = TEXTS[0].read_text()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    """Every relative link names a file of the repository."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", path.read_text())

    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_variables_are_read_by_something(path: Path) -> None:
    """A variable with our prefix that a text names is one that core or a plugin reads."""
    known = {name for _, cls in settings_reference.classes() for name in variables(cls)}

    assert set(re.findall(r"\bMX_[A-Z0-9_]+\b", path.read_text())) - known == set()


def test_python_examples_use_public_names() -> None:
    """Every ``mx.name`` in the README's examples is exported."""
    used = set(re.findall(r"\bmx\.(\w+)", "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))))

    assert used >= {"load_state_dict", "load_into", "deferred_weights"}
    assert used <= set(mx.__all__)


def test_commands_exist() -> None:
    """Every ``mx command`` in the README exists, and every command is in the README."""
    used = set(re.findall(r"^mx ([a-z-]+)", README, re.MULTILINE))

    assert used == {command.name for command in build_app().registered_commands}


def test_make_targets_exist() -> None:
    """Every ``make target`` that a text names is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {
        target for path in TEXTS for target in re.findall(r"(?:`|^)make ([a-z-]+)\b", path.read_text(), re.MULTILINE)
    }

    assert used >= {"demo", "test"}
    assert used <= targets


def test_the_scheme_table_is_complete() -> None:
    """The README's table, the installed storages, and the transports between processes name the same schemes."""
    table = set(re.findall(r"`([a-z0-9]+)://`", README.partition("## Packages by scheme")[2].partition("##")[0]))

    plugins = mx.PluginManager.discover({})
    transports = {scheme for each in plugins.records(TRANSPORT) for scheme in each.provider.schemes} - {"inproc"}
    assert table == {*plugins.table(STORAGE).schemes, *transports}


def test_extras_in_the_readme_exist() -> None:
    """Every extra that an install command names is defined."""
    extras = metadata("modelexpress-core").get_all("Provides-Extra") or []

    assert set(re.findall(r"modelexpress-core\[(\w+)\]", README)) <= set(extras)


def test_public_names_are_documented() -> None:
    """Every exported function and class has its own docstring."""
    assert [name for name in mx.__all__ if not (getattr(mx, name).__doc__ or callable(getattr(mx, name)))] == []
    assert [name for name in mx.__all__ if name != "hookimpl" and not getattr(mx, name).__doc__] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_headings_have_lines_of_their_own(path: Path) -> None:
    """Text that is wrapped anew may swallow them."""
    prose = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", path.read_text())

    assert [] == re.findall(r"(?m)^.*\S #{2,4} \S.*$", prose)
