"""Listings without end: they are refused before they fill the memory, for loads and for pulls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import modelexpress_core as mx
from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import BackendError, ModelExpressError, UnavailableError
from modelexpress_core.fetch import RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.providers import StorageProvider
from modelexpress_core.storage.memory import MemoryStorage
from tests.support.plugins import core_and

Names = Callable[[], Iterator[str]]


class _Endless(MemoryStorage):
    """Lists as many objects as the caller takes."""

    def __init__(self, names: Names, version: str = "v") -> None:
        super().__init__("endless")
        self._names = names
        self._version = version
        self.listed = 0

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for name in self._names():
            self.listed += 1
            yield ObjectInfo(f"model/{name}", 1, self._version)


def _retrying(storage: MemoryStorage) -> RetryingStorage:
    return RetryingStorage(
        storage, RetryPolicy(attempts=3), RetryBudget(5.0), uri_of=lambda path: f"test://host/{path}"
    )


_ENDLESS: dict[str, Callable[[], _Endless]] = {
    "names": lambda: _Endless(lambda: map(str, itertools.count())),
    "long names": lambda: _Endless(lambda: (f"{number}-{'x' * 1_000_000}" for number in itertools.count())),
    "long versions": lambda: _Endless(lambda: map(str, itertools.count()), version="v" * 1_000_000),
    "repeated names": lambda: _Endless(lambda: itertools.cycle(map(str, range(100)))),
}


@pytest.mark.parametrize("storage", _ENDLESS.values(), ids=_ENDLESS)
def test_a_listing_without_end_is_refused(storage: Callable[[], _Endless]) -> None:
    """With an object, a cause and a next step, and without another try."""
    endless = storage()

    with pytest.raises(BackendError, match="test://host/model") as caught:
        list(_retrying(endless).list("model"))

    assert not caught.value.retryable
    assert caught.value.operation
    assert caught.value.cause
    assert caught.value.hint
    assert endless.listed <= 200_001


@pytest.mark.parametrize("storage", _ENDLESS.values(), ids=_ENDLESS)
@pytest.mark.parametrize("use", ["pull", "load"])
def test_loads_and_pulls_end(storage: Callable[[], _Endless], use: str, tmp_path: Path) -> None:
    """Nothing was written, and no byte read."""

    class Plugin:
        @mx.hookimpl
        def mx_register_storages(self) -> list[StorageProvider]:
            return [StorageProvider("mx-endless", ("endless",), lambda _uri, _settings: storage())]

    plugins = core_and(mx_endless=Plugin())
    with pytest.raises(ModelExpressError, match="endless://host/model"):
        if use == "pull":
            mx.pull("endless://host/model", tmp_path / "copy", plugins=plugins, environ={})
        else:
            mx.load_state_dict("endless://host/model", plugins=plugins, environ={})

    assert not (tmp_path / "copy").exists()


def test_a_large_listing_is_allowed() -> None:
    """As large as the largest repositories of data."""
    storage = _Endless(lambda: (f"train/{number:08}.parquet" for number in range(100_000)))

    assert 100_000 == sum(1 for _ in _retrying(storage).list("model"))


def test_a_listing_that_breaks_may_repeat_what_was_seen() -> None:
    """Each try begins anew; what is repeated then is no attack."""
    tries = itertools.count()

    def names() -> Iterator[str]:
        broken = next(tries) == 0
        yield from map(str, range(5000))
        if broken:
            raise UnavailableError("the connection broke")
        yield "last"

    assert 5001 == sum(1 for _ in _retrying(_Endless(names)).list("model"))
