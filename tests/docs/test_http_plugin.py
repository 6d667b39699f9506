"""The storage over HTTP of docs/write-a-plugin.md does what the page says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import modelexpress_core as mx
from modelexpress_core.settings import http as http_settings
from modelexpress_core.storage import http as http_storage
from modelexpress_core.storage.http import service_errors
from modelexpress_core.testing import StorageContract
from tests.support.scripted_http import Answer, Request, serving

_PAGE = Path(__file__).parents[2] / "docs" / "write-a-plugin.md"
_SECTION = _PAGE.read_text().partition("## Build on core's HTTP client")[2].partition("\n## ")[0]
(_CODE,) = re.findall(r"```python\n(.*?)```", _SECTION, re.DOTALL)

shelf: dict[str, Any] = {"__name__": "page_shelf"}
exec(compile(f"from __future__ import annotations\n{_CODE}", "write-a-plugin.md: shelf", "exec"), shelf)

_PAGE_SIZE = 10


class Shelf:
    """The service of the page, in memory."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.port = 0

    def __call__(self, request: Request) -> Answer:
        url = urlsplit(request.path)
        if url.path == "/index":
            query = parse_qs(url.query)
            return self._index(query.get("prefix", [""])[0], int(query["page"][0]))
        name = unquote(url.path.removeprefix("/objects/"), errors="surrogateescape")
        content = self.objects.get(name)
        if content is None:
            return 404, {}, b""
        etag = f'"{hash(content)}"'
        if request.headers.get("If-Match", etag) != etag:
            return 412, {}, b""
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if span is None:
            return 200, {"ETag": etag}, content
        first, last = int(span[1]), min(int(span[2]), len(content) - 1)
        if first > last:
            return 416, {}, b""
        headers = {"ETag": etag, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return 206, headers, content[first : last + 1]

    def _index(self, prefix: str, page: int) -> Answer:
        names = sorted(name for name in self.objects if not prefix or name.startswith(f"{prefix}/"))
        shown = names[(page - 1) * _PAGE_SIZE : page * _PAGE_SIZE]
        objects = [
            {"name": name, "size": len(self.objects[name]), "etag": f'"{hash(self.objects[name])}"'} for name in shown
        ]
        following = str(page + 1) if names[page * _PAGE_SIZE :] else None
        return 200, {}, json.dumps({"objects": objects, "next": following}).encode()


class TestShelfStorage(StorageContract):
    """By the rules for all storages."""

    page_size = _PAGE_SIZE

    @pytest.fixture
    def service(self) -> Iterator[Shelf]:
        service = Shelf()
        with serving(service) as service.port:
            yield service

    @pytest.fixture
    def storage(self, service: Shelf) -> Iterator[Any]:
        with closing(shelf["open_shelf"](mx.ModelURI.parse(f"shelf://127.0.0.1:{service.port}"), {})) as storage:
            yield storage

    @pytest.fixture
    def put(self, service: Shelf) -> Callable[[str, bytes], object]:
        return service.objects.__setitem__


def test_every_name_of_the_table_exists() -> None:
    """In the modules of core that plugins may import."""
    table = "".join(line for line in _SECTION.splitlines() if line.startswith("|"))
    modules = (http_storage, http_settings, service_errors)
    known = {name for module in modules for name in module.__all__} | {"settings.http", "of_answer"}

    names = {name.removeprefix("service_errors.") for name in re.findall(r"`([A-Za-z_.0-9]+)`", table)}
    assert len(names) > 15
    assert set() == names - known - {"mx doctor"}
