"""Primes: work that keeps one core busy and waits for nothing."""

import math
from collections.abc import Iterator

from celery import shared_task
from celery.utils.log import get_task_logger

logger = get_task_logger(__name__)

# Some twenty seconds of one core. Ten times as many numbers take more than ten times as long, and a task that
# dies starts over.
MAX_LIMIT = 10**10

# A byte per odd number: 4 MiB a segment. Smaller ones spend their time in Python rather than in the slices,
# larger ones gain little and cost every process of a worker that much memory.
SEGMENT_SIZE = 1 << 22


@shared_task
def count_primes(limit: int) -> int:
    """Return how many primes there are up to and including `limit`.

    Idempotent. Raises ValueError if limit is negative or above MAX_LIMIT, TypeError if it is no whole number.
    """
    if not 0 <= limit <= MAX_LIMIT:
        raise ValueError(f"limit must be from 0 to {MAX_LIMIT}, not {limit}")
    # The sieve holds odd numbers only, so the one even prime is counted here.
    two = 1 if limit >= 2 else 0
    count = two + sum(segment.count(1) for segment in _segments(limit, SEGMENT_SIZE))
    logger.info("%d primes up to %d", count, limit)
    return count


def _segments(limit: int, size: int) -> Iterator[bytearray]:
    """Yield the odd numbers from 3 to limit, `size` at a time, as bytes: 1 for a prime, 0 for the others."""
    divisors = _odd_primes(math.isqrt(limit))
    for low in range(3, limit + 1, 2 * size):
        odds = range(low, min(limit + 1, low + 2 * size), 2)
        yield _sieve(odds, divisors)


def _sieve(odds: range, divisors: list[int]) -> bytearray:
    """Mark the primes among consecutive odd numbers, given the odd primes up to the root of the last."""
    marks = bytearray(b"\x01") * len(odds)
    for prime in divisors:
        if prime * prime > odds[-1]:
            break
        # Smaller multiples have a smaller prime factor, which crosses them out.
        start = max(prime * prime, _next_odd_multiple(prime, odds[0]))
        crossed = slice((start - odds[0]) // 2, None, prime)
        marks[crossed] = bytes(len(range(*crossed.indices(len(marks)))))
    return marks


def _next_odd_multiple(prime: int, number: int) -> int:
    """Return the first odd multiple of an odd prime that is not below `number`."""
    multiple = -(-number // prime) * prime
    return multiple if multiple % 2 else multiple + prime


def _odd_primes(limit: int) -> list[int]:
    """Return the odd primes up to and including `limit`."""
    odds = range(3, limit + 1, 2)
    if not odds:
        return []
    marks = _sieve(odds, _odd_primes(math.isqrt(limit)))
    return [number for number, prime in zip(odds, marks, strict=True) if prime]
