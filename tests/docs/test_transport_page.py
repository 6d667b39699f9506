"""The transport of docs/write-a-plugin.md keeps to the contract, and its tables name what there is."""

from __future__ import annotations

import ast
import re
import sys
import types
from pathlib import Path
from typing import Any

import attrs
import pytest

import modelexpress_core as mx
from modelexpress_core.contracts.candidates import Tier
from modelexpress_core.plugins import TRANSPORT, PluginManager
from modelexpress_core.providers import SchemeProvider, TransportProvider
from modelexpress_core.testing import TransportContract

pytestmark = pytest.mark.slow

_PAGE = Path(__file__).parents[2] / "docs" / "write-a-plugin.md"
_SECTION = _PAGE.read_text().partition("## 8. Write a transport")[2]
*_CODE, _CONTRACT = re.findall(r"```python\n(.*?)```", _SECTION, re.DOTALL)


def module(name: str, *blocks: str) -> Any:
    made = types.ModuleType(name)
    sys.modules[name] = made
    text = "from __future__ import annotations\n" + "\n".join(blocks)
    exec(compile(text, f"write-a-plugin.md: {name}", "exec"), vars(made))
    return made


page = module("page_transport", *_CODE, _CONTRACT)

TestSocketTransport = page.TestSocketTransport


def test_a_plugin_of_it_is_found_by_its_scheme() -> None:
    """Its peers come last, and every worker offers its tensors over it."""
    plugins = PluginManager()
    plugins.register(page, name="mx-socket")

    registered, transport = plugins.open(TRANSPORT, mx.ModelURI.parse("socket://127.0.0.1:1/s/w"), {})

    assert page.SocketTransport is type(transport)
    assert Tier.OTHER_PEER is registered.provider.tier
    assert registered.provider.offered


def test_it_is_about_as_small_as_a_storage() -> None:
    """An author reads it in one sitting: some eighty lines of code."""
    lines = {
        node.lineno
        for node in ast.walk(ast.parse("\n".join(_CODE)))
        if isinstance(node, (ast.stmt, ast.ExceptHandler)) and not isinstance(node, (ast.Import, ast.ImportFrom))
    }

    assert len(lines) <= 85


def test_the_tables_name_what_there_is() -> None:
    """Every field of the record that storages lack, and every fixture and attribute of the contract."""
    rows = re.findall(r"^\| `(\w+)` \|", _SECTION, re.MULTILINE)
    fields = {field.name for field in attrs.fields(TransportProvider)} - {
        field.name for field in attrs.fields(SchemeProvider)
    }
    own = {name for name in vars(TransportContract) if not name.startswith(("_", "test_"))}

    assert sorted(fields | own) == sorted(rows)
