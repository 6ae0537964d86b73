"""Retry: inside a worker, a command that must not be lost is retried until Redis takes it."""

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
from redis.exceptions import RedisError

from services.broker.client import UNREACHABLE, answers_ping, describe_server, format_error
from services.broker.outages import Outage

logger = get_logger(__name__)

T = TypeVar("T")

# A Redis that restarts is back within a second. The pause is doubled each time, and shortened by up to half at random,
# so that a hundred children do not come back together.
FIRST_PAUSE_SECONDS = 0.1
# A task waits no longer than this after an outage; in one, a thousand waiting processes make 270 tries a second.
LONGEST_PAUSE_SECONDS = 5.0
# A connection that breaks so often, while Redis answers a PING each time, breaks because of what is sent (a value
# beyond proto-max-bulk-len, a proxy's limit). That takes about 20 s, in which shorter faults of a network are over.
BROKEN_TRIES = 10
# Errors because of Redis's state or of the login, and not of what is stored. NOPERM is one: with it FAILURE cannot be
# stored either, and nothing is lost when somebody corrects the user's rights.
TEMPORARY_ERRORS = (
    *UNREACHABLE,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.NoPermissionError,
)
# Those for which redis-py has no class, and how a script of Redis 6 names the others, behind a dash.
TEMPORARY_TEXT = re.compile(
    r"^(?:MISCONF|NOREPLICAS|BUSY|UNKILLABLE)\b|\s-(?:OOM|READONLY|MISCONF|NOREPLICAS|NOPERM)\b"
)


class RetryState(threading.local):
    """What this thread stores and retries, for the log; "" where a command is tried once."""

    # Of the whole process: whether it is a worker or a child of its pool.
    in_worker = False
    # Of each thread.
    purpose = ""


_state = RetryState()
# Threads that wait for Redis: the log has a line when the first begins, and one when the last has ended.
_waiting: set[int] = set()
_outage = Outage("retry", logger.warning)


def is_retrying() -> bool:
    """Whether this thread retries its commands."""
    return bool(_state.purpose)


def main_thread_is_waiting() -> bool:
    """Whether this process's main thread waits for Redis to take something."""
    return threading.main_thread().ident in _waiting


@contextmanager
def retry_commands(purpose: str) -> Iterator[None]:
    """Inside, in a worker, `run_with_retry` retries commands. `purpose` says in the log what they store."""
    if not RetryState.in_worker or _state.purpose:
        yield
        return
    _state.purpose = purpose
    try:
        yield
    finally:
        _state.purpose = ""
        _waiting.discard(threading.get_ident())
        if not _waiting and worker_state.should_terminate is None:
            _outage.record_recovery()


def run_with_retry(attempt: Callable[[], T], client: Callable[[], redis.Redis] | None = None) -> T:
    """Run `attempt`, a command of `client`; inside `retry_commands` retry it until it succeeds.

    Raises what it raises when waiting would not help. Raises WorkerTerminate in a cold shutdown, because Celery would
    take another error for the end of the task, or of its chord.
    """
    if not _state.purpose:
        return attempt()
    pause, broken = FIRST_PAUSE_SECONDS, 0
    while True:
        try:
            return attempt()
        except (RedisError, OSError) as error:
            if not is_temporary(error):
                raise
            if worker_state.should_terminate is not None:
                raise WorkerTerminate(worker_state.should_terminate) from error
            broken = broken + 1 if isinstance(error, UNREACHABLE) and client and answers_ping(client) else 0
            if broken == BROKEN_TRIES:
                raise
            _waiting.add(threading.get_ident())
            _outage.record_failure(error, _describe(client), f"take {_state.purpose}")
        sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


@contextmanager
def ignore_soft_time_limit() -> Iterator[None]:
    """Inside, a child of a prefork pool ignores its soft time limit, which is for a task: the task has ended."""
    if signal.getsignal(SIG_SOFT_TIMEOUT) is not soft_timeout_sighandler:
        yield
        return
    signal.signal(SIG_SOFT_TIMEOUT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(SIG_SOFT_TIMEOUT, soft_timeout_sighandler)


def is_temporary(error: Exception) -> bool:
    """Whether the same command may succeed later."""
    return isinstance(error, TEMPORARY_ERRORS) or bool(TEMPORARY_TEXT.search(format_error(error)))


def _describe(client: Callable[[], redis.Redis] | None) -> str:
    try:
        return describe_server(client()) if client else "Redis"
    except (RedisError, OSError):
        # A channel that was closed has no client any more.
        return "Redis"
