"""services.results.backend: who waits for Redis, for what, and through which of Celery's doors it gets in."""

import pytest
from celery.backends.redis import CHORD_CLEANUP_LUA, CHORD_PART_RETURN_LUA
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    DataError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)

from config.redis_url import SCHEMES
from services.broker.retry import is_temporary, retry_commands
from services.results import backend, chord_deduplication
from services.results.client import RetryingClient

# As redis-py writes it, with what a task has returned.
COMMAND = 'Command # 1 (SETEX celery-task-meta-1 86400 {"result": "-OOM BUSY NOPERM"}) of pipeline caused error: '


@pytest.mark.parametrize(
    ("temporary", "error"),
    [
        (True, ConnectionError("Error 111 connecting to redis:6379. Connection refused.")),
        (True, TimeoutError("Timeout reading from socket")),
        (True, OSError("Network is unreachable")),
        (True, AuthenticationError("invalid username-password pair")),
        (True, BusyLoadingError("Redis is loading the dataset in memory")),
        (True, OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")),
        (True, ReadOnlyError("You can't write against a read only replica.")),
        (True, NoPermissionError("this user has no permissions to run the 'setex' command")),
        (True, ResponseError("MISCONF Errors writing to the AOF file: No space left on device")),
        (True, ResponseError(COMMAND + "MISCONF Errors writing to the AOF file: No space left on device")),
        (True, ResponseError("NOREPLICAS Not enough good replicas to write.")),
        (
            True,
            ResponseError(
                "ERR Error running script (call to f_1): @user_script:1: -OOM command not allowed when used …"
            ),
        ),
        (False, ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")),
        (False, ResponseError(COMMAND + "WRONGTYPE Operation against a key holding the wrong kind of value")),
        (False, ResponseError("string exceeds maximum allowed size (proto-max-bulk-len)")),
        (False, DataError("Invalid input of type: 'dict'.")),
    ],
)
def test_only_what_may_pass_is_waited_for(temporary: bool, error: Exception) -> None:
    assert is_temporary(error) is temporary


def test_nobody_but_a_worker_waits() -> None:
    # Port 1 belongs to nobody who answers.
    with pytest.raises(ConnectionError), retry_commands("a result"):
        RetryingClient(port=1).get("key")


def test_every_kind_of_url_leads_to_this_backend() -> None:
    # As celery.app.backends.by_url reads a URL's scheme.
    assert {scheme.partition("+")[0] for scheme in SCHEMES} == backend.BACKENDS.keys()


def test_the_script_of_chords_is_the_one_that_is_known() -> None:
    assert CHORD_PART_RETURN_LUA.count(chord_deduplication.RIGHT) == 1
    assert CHORD_PART_RETURN_LUA.count(chord_deduplication.ANSWER) == 1
    assert CHORD_PART_RETURN_LUA.count("KEYS[") == 6
    assert CHORD_CLEANUP_LUA.count(chord_deduplication.END) == 1
    assert CHORD_CLEANUP_LUA.count("KEYS[") == 5
