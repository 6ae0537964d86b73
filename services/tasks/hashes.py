"""Hash chains: long work that says how far it is."""

import hashlib
import time
from collections.abc import Callable

from celery import Task, shared_task
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.log import get_task_logger

logger = get_task_logger(__name__)

# Some six minutes of one core. A task that dies starts over, so go further in several tasks, each from the
# result of the one before: chain(hash_chain.s(seed, n), hash_chain.s(n), …).
MAX_ROUNDS = 10**9

# A few milliseconds of work: reading the clock after each costs nothing, and a report is never late by more.
CHUNK_ROUNDS = 10_000

# Each report is a write to the result backend, and nobody watches a progress bar more often than that.
REPORT_SECONDS = 1.0


@shared_task(bind=True)
def hash_chain(self: Task, seed: str, rounds: int) -> str:
    """Hash the seed with SHA-256, then the hex digits of that, and so on; return the last digest.

    No number of cores makes a chain shorter, so its end shows that time went by since the seed was known. The
    seed is no place for a secret: arguments are seen in Flower.

    While it runs, `AsyncResult(id).info` is {"done": rounds so far, "total": rounds}. Idempotent: a second
    run starts from the seed and ends at the same digest. Raises ValueError if rounds is not from 1 to
    MAX_ROUNDS.
    """
    if not 1 <= rounds <= MAX_ROUNDS:
        raise ValueError(f"rounds must be from 1 to {MAX_ROUNDS}, not {rounds}")
    throttle, done, digest = Throttle(REPORT_SECONDS), 0, seed
    try:
        while done < rounds:
            step = min(CHUNK_ROUNDS, rounds - done)
            digest = _walk(digest, step)
            done += step
            # Called as a plain function it has no id, hence nobody to report to.
            if not self.request.called_directly and throttle.ready():
                self.update_state(state="PROGRESS", meta={"done": done, "total": rounds})
    except SoftTimeLimitExceeded:
        # Half a chain is of no use to anybody, so there is nothing to save. Swallowing the exception would
        # turn the task into a success; raised again it is a failure that names the limit.
        logger.warning("stopped by the time limit after %d of %d rounds", done, rounds)
        raise
    return digest


class Throttle:
    """Lets something happen at most once per so many seconds, the first time at once."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._next = float("-inf")

    def ready(self) -> bool:
        """Return whether it may happen now; if so, it counts as having happened."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


def _walk(digest: str, rounds: int) -> str:
    """Return the digest that many rounds further."""
    for _ in range(rounds):
        digest = hashlib.sha256(digest.encode()).hexdigest()
    return digest
