"""The discovery and the metadata store of docs/write-a-plugin.md do what the page says."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import attrs
import pytest

import modelexpress_core as mx
from modelexpress_core import plugin as core
from modelexpress_core.contracts.candidates import LoadRequest
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.contracts.metadata_store import SourceQuery, StoreUnavailableError
from modelexpress_core.hooks import hookimpl
from modelexpress_core.plugins import METADATA_STORE, PluginManager
from modelexpress_core.providers import TransportProvider
from modelexpress_core.sources.discovery import find_candidates

_PAGE = Path(__file__).parents[2] / "docs" / "write-a-plugin.md"
_SECTION = _PAGE.read_text().partition("## 7. Write another kind of plugin")[2].partition("\n## ")[0]
_DISCOVERY, _STORE, _CONTRACT = re.findall(r"```python\n(.*?)```", _SECTION, re.DOTALL)
_IDENTITY = SourceIdentity("acme/model")
_REQUEST = LoadRequest(mx.ModelURI.parse("memory://host/model"), _IDENTITY, worker_rank=1, reader="me")


def module(name: str, *blocks: str) -> Any:
    made = types.ModuleType(name)
    sys.modules[name] = made
    text = "from __future__ import annotations\n" + "\n".join(blocks)
    exec(compile(text, f"write-a-plugin.md: {name}", "exec"), vars(made))
    return made


discovery = module("page_discovery", _DISCOVERY)
store = module("page_store", _STORE, _CONTRACT)

TestSqliteStore = store.TestSqliteStore


class Nixl:
    @hookimpl
    def mx_register_transports(self) -> list[TransportProvider]:
        return [TransportProvider("mx-nixl", ("nixl",), lambda uri, settings: None)]


@pytest.fixture
def plugins() -> PluginManager:
    made = PluginManager()
    for name, plugin in {
        "mx-table": discovery,
        "mx-sqlite": store,
        "mx-nixl": Nixl(),
        "modelexpress-core": core,
    }.items():
        made.register(plugin, name=name)
    return made


def test_the_discovery_finds_the_workers_of_the_model(plugins: PluginManager, tmp_path: Path) -> None:
    """It returns workers of the requested rank. If the table cannot be read, the load continues without it."""
    row = {"source": _IDENTITY.source_id, "worker": "w", "rank": 1, "address": "10.0.0.1:5555", "load": 0.5}
    rows = [row, {**row, "rank": 0}, {**row, "source": "other"}]
    table = tmp_path / "workers.json"
    environ = {"MX_DISCOVERY": f"table://{table}"}

    without = find_candidates(plugins, environ, _REQUEST)
    table.write_text(json.dumps(rows))
    found = find_candidates(plugins, environ, _REQUEST)

    expected = [f"nixl://10.0.0.1:5555/{_IDENTITY.source_id}/w", "memory://host/model"]
    assert expected == [str(candidate.uri) for candidate in found]
    assert found[0].peer is not None
    assert 0.5 == found[0].peer.load
    assert [_REQUEST.uri] == [candidate.uri for candidate in without]
    unknown = attrs.evolve(_REQUEST, identity=SourceIdentity("acme/other"))
    assert [_REQUEST.uri] == [candidate.uri for candidate in find_candidates(plugins, environ, unknown)]


def test_a_server_can_open_the_store(plugins: PluginManager, tmp_path: Path) -> None:
    """By its URI; what cannot be answered is no empty list."""

    async def scenario() -> None:
        _, opened = plugins.open(METADATA_STORE, mx.ModelURI.parse(f"sqlite://{tmp_path}/mx.db"), {})
        assert [] == [*(await opened.list(SourceQuery())).records]
        await opened.close()
        with pytest.raises(StoreUnavailableError):
            await opened.list(SourceQuery())

    asyncio.run(scenario())
