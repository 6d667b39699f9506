"""A stand-in for the Hub, with its CDN on another port, and storages on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from devtools.fake_hub import FakeHub
from modelexpress_core.uri import ModelURI
from mx_hf._storage import HfStorage, open_hf

REPOSITORY = "org/model"
TOKEN = "hf_aVeryGoodTokenForTheTests"


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None) -> None:
    pass


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A new one for each test; it starts in a few milliseconds."""
    with FakeHub() as hub:
        hub.put(REPOSITORY, "README.md", b"a model")
        hub.tokens.add(TOKEN)
        yield hub


@pytest.fixture
def opened() -> Iterator[Callable[..., HfStorage]]:
    """Opens storages with the given variables."""
    with contextlib.ExitStack() as stack:

        def opened(
            uri: str = f"hf://{REPOSITORY}", clock: Callable[[], float] | None = None, **variables: str
        ) -> HfStorage:
            options: dict[str, Any] = {} if clock is None else {"clock": clock}
            return stack.enter_context(contextlib.closing(open_hf(ModelURI.parse(uri), variables, **options)))

        yield opened


@pytest.fixture
def on_hub(hub: FakeHub, opened: Callable[..., HfStorage]) -> Callable[..., HfStorage]:
    """Opens storages on the stand-in."""

    def on_hub(uri: str = f"hf://{REPOSITORY}", **variables: str) -> HfStorage:
        return opened(uri, **{**hub.environ(), **variables})

    return on_hub
