"""Listings in pages: all entries, in bounded time, with the server's slips explained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from modelexpress_core.errors import BackendError, DeadlineError, UnavailableError, UnsupportedError
from modelexpress_core.storage.http import Failures, ListingPage, SettingNames, entries_of_pages
from modelexpress_core.uri import ModelURI

Page = Callable[[str | None], ListingPage[int]]


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _failures(closed: Callable[[], bool] = lambda: False) -> Failures:
    names = SettingNames(endpoint="MX_WEB_ENDPOINT", read_timeout="MX_WEB_READ_TIMEOUT_SECONDS")
    return Failures("mx-web", ModelURI("web", "host"), endpoint=lambda: "http://host", names=names, closed=closed)


def _listed(page: Page, clock: _Clock | None = None, failures: Failures | None = None) -> Iterator[int]:
    return entries_of_pages(
        page, failures or _failures(), "model", "list the objects", read_timeout_seconds=2.0, clock=clock or _Clock()
    )


@pytest.mark.parametrize("end", ["", None])
def test_all_pages_in_order(end: str | None) -> None:
    """Each begins where the one before says; the first has no mark."""
    pages = {None: ListingPage([1, 2], "b"), "b": ListingPage([], "c"), "c": ListingPage([3], end)}

    assert [1, 2, 3] == list(_listed(lambda mark: pages[mark]))


def test_a_page_that_follows_itself() -> None:
    """The server ignores where the next page begins."""
    with pytest.raises(UnsupportedError, match="same page of the listing again") as caught:
        list(_listed(lambda _: ListingPage([1], "again")))

    assert "MX_WEB_ENDPOINT" in str(caught.value.hint)
    assert "web://host/model" in str(caught.value)


def test_pages_without_end() -> None:
    """Ten read timeouts are allowed, and a second for a hundred objects; trying again does not help."""
    clock, numbers = _Clock(), itertools.count()

    def page(_: str | None) -> ListingPage[int]:
        clock.now += 5.0
        return ListingPage(range(100), str(next(numbers)))

    with pytest.raises(DeadlineError, match="has not ended after 25 s and 400 objects") as caught:
        list(_listed(page, clock))

    assert not caught.value.retryable
    assert "MX_WEB_READ_TIMEOUT_SECONDS raises the limit" in str(caught.value.hint)


def test_the_time_of_the_caller_does_not_count() -> None:
    """It may work on each entry as long as it likes."""
    clock = _Clock()
    pages = {None: ListingPage([1], "b"), "b": ListingPage([2], None)}
    entries = _listed(lambda mark: pages[mark], clock)
    assert 1 == next(entries)
    clock.now += 1000

    assert [2] == list(entries)


def test_a_failure_is_explained() -> None:
    """With what was tried."""

    def page(_: str | None) -> ListingPage[int]:
        raise ConnectionResetError

    with pytest.raises(UnavailableError, match="list the objects") as caught:
        list(_listed(page))

    assert isinstance(caught.value.__cause__, ConnectionResetError)


def test_a_storage_that_was_closed_lists_no_further() -> None:
    """Between two pages."""
    closed = iter([False, True])

    with pytest.raises(BackendError, match="was closed"):
        list(_listed(lambda _: ListingPage([1], "b"), failures=_failures(lambda: next(closed))))
