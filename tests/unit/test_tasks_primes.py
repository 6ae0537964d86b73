"""services.tasks.primes"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tasks import primes
from services.tasks.primes import MAX_LIMIT, count_primes


def is_prime(number: int) -> bool:
    return number >= 2 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


@pytest.mark.parametrize(
    ("limit", "count"),
    # https://oeis.org/A006880, the small numbers where a sieve goes wrong, and a large prime, which counts itself.
    [
        *((0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (9, 4), (25, 9), (7918, 999), (7919, 1000)),
        *((10**4, 1229), (10**6, 78498), (10**7, 664579)),
    ],
)
def test_count_primes_agrees_with_the_known_counts(limit: int, count: int) -> None:
    assert count_primes(limit) == count


@given(limit=st.integers(0, 3000), size=st.integers(1, 200))
def test_segments_of_any_size_mark_exactly_the_odd_primes(limit: int, size: int) -> None:
    marks = b"".join(primes._segments(limit, size))
    assert [bool(mark) for mark in marks] == [is_prime(number) for number in range(3, limit + 1, 2)]


@pytest.mark.parametrize("limit", [-1, MAX_LIMIT + 1])
def test_count_primes_refuses_a_limit_out_of_bounds(limit: int) -> None:
    with pytest.raises(ValueError, match=f"limit must be from 0 to {MAX_LIMIT}, not {limit}"):
        count_primes(limit)


@pytest.mark.parametrize("limit", [10.5, "10", None])
def test_count_primes_refuses_a_limit_that_is_no_whole_number(limit: object) -> None:
    with pytest.raises(TypeError):
        count_primes(limit)
