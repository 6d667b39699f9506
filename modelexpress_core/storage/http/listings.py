"""Listings in pages: each listing ends in bounded time, whatever the server says follows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from attrs import frozen

from modelexpress_core.errors import DeadlineError, UnsupportedError
from modelexpress_core.storage.http.failures import Failures, Meaning

__all__ = ["ListingPage", "entries_of_pages"]

E = TypeVar("E")

#: A listing may take this many times the read timeout, and the time of its objects at this rate. Object stores give a
#: thousand in half a second.
_LISTING_TIMEOUTS = 10
_MIN_OBJECTS_PER_SECOND = 100


@frozen
class ListingPage(Generic[E]):
    """A part of a listing.

    Attributes:
        entries: What it lists.
        next_page: Where the next page begins, in the service's own words; empty or None at the end.
    """

    entries: Iterable[E]
    next_page: str | None


def entries_of_pages(
    page: Callable[[str | None], ListingPage[E]],
    failures: Failures,
    path: str,
    operation: str,
    *,
    read_timeout_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    things: str = "objects",
) -> Iterator[E]:
    """The entries of all pages of a listing. The time of the caller's own work is not counted.

    Args:
        page: Fetches the page that begins at a mark, or the first one. Its exceptions are explained by ``failures``.
        failures: Explains what goes wrong.
        path: What is listed.
        operation: What is tried, as a verb phrase.
        read_timeout_seconds: How long to wait for the next bytes; sets the bound of the whole listing.
        clock: Seconds.
        things: The service's word for objects.

    Raises:
        BackendError: A page cannot be had, the same page follows itself, or the listing does not end.
    """
    listed, seconds, mark = 0, 0.0, None
    while True:
        failures.check_open(path, operation)
        begun = clock()
        try:
            found = page(mark)
        except failures.caught as exc:
            raise failures.of_exception(exc, path, operation, read_timeout_seconds) from exc
        seconds += clock() - begun
        if seconds > _LISTING_TIMEOUTS * read_timeout_seconds + listed / _MIN_OBJECTS_PER_SECOND:
            reason = f"the listing has not ended after {seconds:.0f} s and {listed} {things}"
            raise failures.described(_slow(failures), reason, path, operation)
        for entry in found.entries:
            listed += 1
            yield entry
        if not found.next_page:
            return
        if found.next_page == mark:
            reason = "the server sends the same page of the listing again"
            raise failures.described(_repeated(failures), reason, path, operation)
        mark = found.next_page


def _slow(failures: Failures) -> Meaning:
    return Meaning(
        DeadlineError,
        "the server sends pages without end, or very slowly",
        f"{failures.names.check_server}; {failures.names.read_timeout} raises the limit",
        retryable=False,
    )


def _repeated(failures: Failures) -> Meaning:
    return Meaning(
        UnsupportedError,
        "the server, or a proxy before it, ignores where the next page begins",
        f"{failures.names.check_server}, or use another server",
    )
