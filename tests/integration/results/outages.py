"""Redis servers that take nothing for a while, and tasks that wait meanwhile."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from redis.exceptions import OutOfMemoryError

from tests.support.harness import Stack
from tests.support.redis.server import RedisServer
from tests.support.waiting import TIMEOUT_SECONDS

FAULTS = ("killed", "frozen", "full")
# Stock Celery has lost a result, or run its task twice, within a second; the first connection of a process it tries
# for four.
OUTAGE_SECONDS = 6
# A worker's line when it begins to wait for Redis, and the one when that is over.
WAITS, GOES_ON = "retry: waiting for", "retry: goes on after"


def break_redis(redis: RedisServer, fault: str) -> None:
    """Let it take nothing any more."""
    if fault == "killed":
        redis.kill()
        assert not redis.process.alive
    elif fault == "frozen":
        redis.freeze()
    else:
        redis.ask("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(OutOfMemoryError):
            redis.client(1).set("more", "than there is room for")


def repair_redis(redis: RedisServer, fault: str) -> None:
    if fault == "killed":
        redis.start()
    elif fault == "frozen":
        redis.thaw()
    else:
        redis.ask("CONFIG", "SET", "maxmemory", "0")


def read_result(redis: RedisServer, sent: Any) -> dict[str, Any]:
    """What is stored of a task."""
    text = redis.client(1).get(f"celery-task-meta-{sent.id}")
    return dict(json.loads(str(text))) if text else {"status": None, "result": None}


def wait_results(
    stack: Stack, redis: RedisServer, sent: Mapping[str, Any], wanted: Mapping[str, object], field: str = "status"
) -> None:
    """Wait until the states of these tasks, or another field of what is stored, are as wanted."""

    def stored() -> bool:
        return {label: read_result(redis, one)[field] for label, one in sent.items()} == wanted

    stack.harness.wait_until(stored, TIMEOUT_SECONDS, f"{wanted} is stored")


def sign(stack: Stack, task: str, *arguments: object, **options: str) -> Any:
    """A signature of one of probe.py's tasks."""
    return stack.client.signature(f"probe.{task}", args=arguments, options=options)
