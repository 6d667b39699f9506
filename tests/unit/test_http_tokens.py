"""The cache of tokens: one thread fetches for all, renews early, and leaves a service alone that throttles."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from modelexpress_core.storage.http import Token, TokenCache
from tests.support.waiting import eventually


class _RefusedError(Exception):
    """Has arguments that its text does not repeat, as the errors of plugins."""

    def __init__(self, place: str, *, wait_seconds: float | None = None) -> None:
        super().__init__("no token")
        self.place = place
        self.wait_seconds = wait_seconds


class _Service:
    """Gives tokens.

    Attributes:
        lifetime_seconds: Of each token.
        failure: What it raises in place of a token.
        same: It gives the last token again.
        gate: It answers when this is set.
        asked: How often it was asked.
    """

    def __init__(self) -> None:
        self.lifetime_seconds = 3600.0
        self.failure: _RefusedError | None = None
        self.same = False
        self.gate = threading.Event()
        self.gate.set()
        self.asked = 0
        self.given = 0
        self.now = 1000.0

    def fetch(self) -> Token[str]:
        self.asked += 1
        assert self.gate.wait(10.0)
        if self.failure is not None:
            raise self.failure
        self.given += 0 if self.same else 1
        return Token(f"token {self.given}", self.lifetime_seconds)


def _wait_of(failure: Exception) -> float | None:
    return failure.wait_seconds if isinstance(failure, _RefusedError) else None


@pytest.fixture
def service() -> _Service:
    return _Service()


@pytest.fixture
def cache(service: _Service) -> TokenCache[str]:
    return TokenCache(service.fetch, failures=_RefusedError, throttled=_wait_of, clock=lambda: service.now)


def _failures(call: Callable[[], object], threads: int = 8) -> list[_RefusedError]:
    """What ``call`` raises in each of many threads at once."""
    begin = threading.Barrier(threads)

    def failure(_: int) -> _RefusedError:
        begin.wait()
        with pytest.raises(_RefusedError) as caught:
            call()
        return caught.value

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(failure, range(threads)))


def test_one_token_for_all_threads(service: _Service, cache: TokenCache[str]) -> None:
    """Fetched at first use, and kept."""
    assert cache.held is None
    with ThreadPoolExecutor(8) as pool:
        assert {"token 1"} == set(pool.map(lambda _: cache.get(), range(50)))
    assert (1, "token 1") == (service.asked, cache.held)


def test_a_failure_is_shared_by_those_that_wait(service: _Service, cache: TokenCache[str]) -> None:
    """Each thread gets an error of its own with the same fields; a later call asks again."""
    service.failure = _RefusedError("here")
    service.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        failures = pool.submit(_failures, cache.get)
        eventually(lambda: service.asked == 1)
        service.gate.set()

        found = failures.result(10.0)

    assert service.asked < 8
    assert {("no token", "here")} == {(str(each), each.place) for each in found}
    assert len(found) == len({id(each) for each in found})
    service.failure = None
    assert "token 1" == cache.get()


def test_a_failure_keeps_no_frames(service: _Service, cache: TokenCache[str]) -> None:
    """The frames of a read hold its buffer."""

    class Buffer:
        pass

    def read() -> weakref.ref[Buffer]:
        buffer = Buffer()
        with pytest.raises(_RefusedError):
            cache.get()
        return weakref.ref(buffer)

    service.failure = _RefusedError("here")
    found = read()
    service.failure = None
    gc.collect()

    assert found() is None


@pytest.mark.parametrize(("lifetime", "renewed", "ended"), [(3600.0, 3300.0, 3570.0), (60.0, 30.0, 54.0)])
def test_a_token_is_renewed_early(
    service: _Service, cache: TokenCache[str], lifetime: float, renewed: float, ended: float
) -> None:
    """By one thread, minutes before the end or at half of its life; the others use the old one until then."""
    service.lifetime_seconds = lifetime
    cache.get()
    service.now += renewed - 1
    assert "token 1" == cache.get()
    service.now += 2
    service.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        renewing = pool.submit(cache.get)
        eventually(lambda: service.asked == 2)
        assert "token 1" == cache.get()
        service.now += ended - renewed
        waiting = pool.submit(cache.get)
        service.gate.set()

        assert ["token 2", "token 2"] == [renewing.result(10.0), waiting.result(10.0)]
    assert 2 == service.asked


def test_a_token_is_used_to_its_end_if_it_cannot_be_renewed(service: _Service, cache: TokenCache[str]) -> None:
    """The service is asked once in half a minute; after the end the failure is raised."""
    cache.get()
    service.failure = _RefusedError("here")
    service.now += 3301

    assert {"token 1"} == {cache.get() for _ in range(20)}
    assert 2 == service.asked
    service.now += 31
    assert "token 1" == cache.get()
    assert 3 == service.asked
    service.now += 300
    with pytest.raises(_RefusedError):
        cache.get()


def test_a_token_without_an_end_is_kept(service: _Service, cache: TokenCache[str]) -> None:
    """Until it is refused."""
    service.lifetime_seconds = float("inf")
    cache.get()
    service.now += 1e9

    assert "token 1" == cache.get()


def test_a_refused_token_is_replaced_once(service: _Service, cache: TokenCache[str]) -> None:
    """For all threads; a token that is not the refused one needs no request."""
    cache.get()

    with ThreadPoolExecutor(8) as pool:
        assert {True} == set(pool.map(lambda _: cache.renew(lambda token: token == "token 1"), range(50)))
    assert (2, "token 2") == (service.asked, cache.get())


def test_the_same_token_again_is_final(service: _Service, cache: TokenCache[str]) -> None:
    """The service is asked once; if its answer may change at any time, each time."""
    cache.get()
    service.same = True

    assert not cache.renew(lambda _: True, is_final=lambda _: False)
    assert not cache.renew(lambda _: True)
    assert 3 == service.asked
    assert not cache.renew(lambda _: True)
    assert 3 == service.asked
    assert "token 1" == cache.get()


def test_a_failure_to_replace_is_shared(service: _Service, cache: TokenCache[str]) -> None:
    """The old token stays."""
    cache.get()
    service.failure = _RefusedError("here")

    assert 8 == len(_failures(lambda: cache.renew(lambda _: True)))
    assert "token 1" == cache.get()


def test_a_service_that_throttles_is_left_alone(service: _Service, cache: TokenCache[str]) -> None:
    """For as long as it says; if it does not say, for a second, then two; a success begins anew."""
    for wait, expected in [(40.0, 40.0), (0.0, 2.0), (0.0, 4.0), (3600.0, 60.0)]:
        service.failure = _RefusedError("here", wait_seconds=wait)
        asked = service.asked
        assert 8 == len(_failures(cache.get))
        service.now += expected - 0.5
        with pytest.raises(_RefusedError):
            cache.get()
        assert asked + 1 == service.asked
        service.now += 1

    service.failure = None
    assert "token 1" == cache.get()
    service.failure = _RefusedError("here", wait_seconds=0.0)
    with pytest.raises(_RefusedError):
        cache.renew(lambda _: True)
    service.now += 1.5
    service.failure = None
    assert cache.renew(lambda token: token == "token 1")


def test_a_token_is_not_shown(service: _Service, cache: TokenCache[str]) -> None:
    """Nor is what holds it."""
    assert "token" not in repr(service.fetch()).replace("Token(", "")
