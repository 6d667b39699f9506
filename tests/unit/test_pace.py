"""How much work each source of a load gets, and when it is stopped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelexpress_core.loads.pace import Pace, batch_bytes, is_too_slow

_MIB = 1 << 20
_GIB = 1 << 30

rates = st.floats(1e3, 1e11)


def test_the_rate_is_unknown_before_the_first_arrival() -> None:
    """What is asked for is expected to take as long again as it has taken."""
    pace = Pace(100.0)

    assert pace.rate(103.0) is None
    assert 3.0 == pace.seconds_for(_MIB, 103.0)


def test_the_rate_is_that_of_the_last_arrivals() -> None:
    """What came long ago does not count, and silence does."""
    pace = Pace(0.0)
    for second in range(10):
        pace.arrived(_MIB, float(second + 1))
    assert _MIB == pytest.approx(pace.rate(10.0))

    for tenth in range(30):
        pace.arrived(_MIB, 10.0 + (tenth + 1) / 10)

    assert 10 * _MIB == pytest.approx(pace.rate(13.0), rel=0.1)
    assert pytest.approx(pace.rate(13.0), rel=0.1) == 2 * (pace.rate(14.1) or 0.0)
    assert pace.seconds_for(_MIB, 20.0) > pace.seconds_for(_MIB, 13.0)


def test_a_source_gets_work_in_proportion_to_its_rate() -> None:
    """For the same time; the first batch, before its rate is known, is small."""
    fast, slow = (batch_bytes(rate, 3.1e9, 100 * _GIB, 2) for rate in (1e8, 1e7))

    assert 10 * slow == pytest.approx(fast, rel=0.01)
    assert fast / (1e8 / 2) == pytest.approx(0.15, rel=0.01)
    assert 4 * _MIB == batch_bytes(None, 3.1e9, 100 * _GIB, 2)


@given(rate=st.none() | rates, others=st.floats(0, 1e11), left=st.integers(0, 1 << 40), threads=st.integers(1, 8))
def test_a_batch_has_bounds(rate: float | None, others: float, left: int, threads: int) -> None:
    """And no thread takes more than its part of what is left, but for a little."""
    nbytes = batch_bytes(rate, (rate or 0.0) + others, left, threads)

    assert 64 << 10 <= nbytes <= 64 * _MIB
    assert nbytes <= max(left / threads, 64 << 10)


@given(rate=rates, others=rates, left=st.integers(0, 1 << 40))
def test_batches_shrink_towards_the_end(rate: float, others: float, left: int) -> None:
    """Never the other way."""
    assert batch_bytes(rate, rate + others, left, 2) >= batch_bytes(rate, rate + others, left // 2, 2)


@pytest.mark.parametrize(
    ("left", "elsewhere", "too_slow"),
    [
        (10.0, 1.0, True),
        (10.0, 4.9, True),
        (10.0, 5.1, False),
        (0.05, 0.01, False),
        (0.1, 0.04, True),
        (0.0, 1.0, False),
    ],
)
def test_a_source_is_stopped_if_that_saves_time(left: float, elsewhere: float, too_slow: bool) -> None:
    """More than half of it, and more than a moment."""
    assert too_slow is is_too_slow(left, elsewhere_seconds=elsewhere)
