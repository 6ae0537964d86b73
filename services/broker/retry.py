"""Patience: inside a worker, what must not be lost is repeated until Redis takes it."""

from __future__ import annotations

import random
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import sleep
from typing import TypeVar

import redis
from billiard.pool import SIG_SOFT_TIMEOUT, soft_timeout_sighandler
from celery.exceptions import WorkerTerminate
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from redis.exceptions import ConnectionError, RedisError, TimeoutError

from services.broker.client import place, refusal
from services.broker.outages import Outage

logger = get_logger(__name__)

T = TypeVar("T")

# The first pause: a Redis that restarts is back within a second. Doubled each time, and each cut by up to half at
# random, so that a hundred children do not come back together.
FIRST_PAUSE_SECONDS = 0.1
# The price of an outage after its end, and the load of it: a thousand waiting processes make 270 tries a second.
LONGEST_PAUSE_SECONDS = 5.0
# A connection that breaks so often while Redis answers a PING each time breaks because of what is sent (a value
# beyond proto-max-bulk-len, a proxy's limit). About 20 s: shorter faults of a network are over by then.
BROKEN_TRIES = 10
# Refusals that say something of Redis's state or of the login, and nothing of the result.
# NOPERM is one: with it FAILURE cannot be stored either, and whoever mends the user's rights loses nothing.
PASSING_ERRORS = (
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.NoPermissionError,
)
# Those for which redis-py has no class, and what a script of Redis 6 says of the others behind a dash.
PASSING_TEXT = re.compile(r"^(?:MISCONF|NOREPLICAS|BUSY|UNKILLABLE)\b|\s-(?:OOM|READONLY|MISCONF|NOREPLICAS|NOPERM)\b")
AWAY = (ConnectionError, TimeoutError, OSError)


class Patience(threading.local):
    """What this thread stores at the moment; nothing where nobody has to wait."""

    # Of the whole process.
    in_worker = False
    # Of each thread.
    what = ""


_patience = Patience()
# Threads that wait, and what they say: the first of them that they do, the last that they do no more.
_waiting: set[int] = set()
_outage = Outage("patience", logger.warning)


def asked() -> bool:
    """Whether this thread has patience."""
    return bool(_patience.what)


def main_thread_waits() -> bool:
    """Whether this process's main thread waits for Redis to take something."""
    return threading.main_thread().ident in _waiting


@contextmanager
def patience(what: str) -> Iterator[None]:
    """Inside, commands of a PatientClient wait for Redis. `what` is for the log."""
    if not Patience.in_worker or _patience.what:
        yield
        return
    _patience.what = what
    try:
        yield
    finally:
        _patience.what = ""
        _waiting.discard(threading.get_ident())
        if not _waiting and worker_state.should_terminate is None:
            _outage.over()


def insist(attempt: Callable[[], T], client: Callable[[], redis.Redis] | None = None) -> T:
    """Repeat `attempt`, which `client` is for, until it succeeds, where patience is asked for.

    Raises what it raises when that is no matter of waiting. In a cold shutdown Celery's WorkerTerminate: it would take
    an error for the end of the task, or of its chord.
    """
    if not _patience.what:
        return attempt()
    pause, broken = FIRST_PAUSE_SECONDS, 0
    while True:
        try:
            return attempt()
        except (RedisError, OSError) as error:
            if not passes(error):
                raise
            if worker_state.should_terminate is not None:
                raise WorkerTerminate(worker_state.should_terminate) from error
            broken = broken + 1 if isinstance(error, AWAY) and client and _answers(client) else 0
            if broken == BROKEN_TRIES:
                raise
            _waiting.add(threading.get_ident())
            _outage.goes_on(error, _where(client), f"take {_patience.what}")
        sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


@contextmanager
def task_ended() -> Iterator[None]:
    """Inside, no soft time limit comes to a child of a prefork pool: it is for its task, and that has ended."""
    if signal.getsignal(SIG_SOFT_TIMEOUT) is not soft_timeout_sighandler:
        yield
        return
    signal.signal(SIG_SOFT_TIMEOUT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(SIG_SOFT_TIMEOUT, soft_timeout_sighandler)


def passes(error: Exception) -> bool:
    """Whether the same command may succeed later."""
    return isinstance(error, (*AWAY, *PASSING_ERRORS)) or bool(PASSING_TEXT.search(refusal(error)))


def _where(client: Callable[[], redis.Redis] | None) -> str:
    try:
        return place(client()) if client else "Redis"
    except (RedisError, OSError):
        # A channel that has been closed makes no client any more.
        return "Redis"


def _answers(client: Callable[[], redis.Redis]) -> bool:
    """Whether Redis answers, when it is asked without patience."""
    try:
        return bool(redis.Redis(connection_pool=client().connection_pool).ping())
    except (RedisError, OSError):
        return False
