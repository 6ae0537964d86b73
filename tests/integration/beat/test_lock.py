"""services.beat.lock: of two beats one has the lock, and each knows whether it is the one."""

from collections.abc import Callable

import pytest

from services.beat.lock import BeatLock
from services.broker.keys import BEAT_LOCK
from tests.support.redis.server import RedisServer


def test_the_lock_is_taken_by_one_beat_renewed_and_handed_over(
    redis_server: Callable[..., RedisServer], caplog: pytest.LogCaptureFixture
) -> None:
    client = redis_server().client()
    first, second = BeatLock(client), BeatLock(client)
    assert first.acquire()
    assert not second.acquire()
    assert (first.is_held(client), second.is_held(client)) == (True, False)
    client.expire(BEAT_LOCK, 15)
    token = first.token
    assert first.acquire()
    assert first.token == token
    assert client.pttl(BEAT_LOCK) > 15_000

    # As when the first beat was suspended for too long.
    client.delete(BEAT_LOCK)
    assert second.acquire()
    assert (first.is_held(client), second.is_held(client)) == (False, True)
    assert not first.acquire()
    assert first.token is None
    assert caplog.text.count("lost the lock") == 1

    second.release()
    assert first.acquire()
    assert first.token != token
