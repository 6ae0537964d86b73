"""Overtime: what runs longer than its time limit in a pool of threads, or in a solo pool, is said.

Only a pool of processes can end a task. A thread of the node looks, and keeps in Redis what it finds: a solo pool that
runs a task answers nobody who asks.
"""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from time import sleep, time
from typing import Any

from celery import bootsteps
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from redis import Redis
from redis.exceptions import RedisError

from services.broker.client import connect
from services.broker.keys import OVERTIME
from services.pool import time_limits
from services.pool.time_limits import Limits

logger = get_logger(__name__)

# Limits are seconds at least; a look goes through what runs, which takes microseconds.
LOOK_SECONDS = 5.0
# Kept for three more looks, which may come late on a busy machine: what a node that has died had kept goes with that.
KEPT_SECONDS = 20
SHOWN = ("node", "id", "name", "limit")


class OvertimeStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Bootstep of a node whose pool ends no task."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        # What has been said, by the task's id: as it is in Redis.
        self._known: dict[str, str] = {}
        super().__init__(worker, **options)

    def include_if(self, worker: Any) -> bool:
        return not issubclass(worker.pool_cls, PreforkPool)

    def start(self, worker: Any) -> None:
        threading.Thread(target=self._run, args=(worker,), name="overtime", daemon=True).start()

    def _run(self, worker: Any) -> None:
        client = connect(worker.app.settings.broker_url, worker.app.settings)
        while True:
            sleep(LOOK_SECONDS)
            # Whatever Redis has against it now, it may not have the next time; the log has it.
            with suppress(RedisError, OSError):
                self._look(worker, client)

    def _look(self, worker: Any, client: Redis) -> None:
        found = _over_limit(worker.app)
        if not found and not self._known:
            return
        seconds, _ = client.time()
        for request, limit, ran in found:
            if request.id in self._known:
                continue
            said = "%s[%s] has run for %.0f s and its limit is %g s: in this pool nothing ends it but the node's end"
            logger.warning(said, request.name, request.id, ran, limit)
            told = dict(zip(SHOWN, (worker.hostname, request.id, request.name, limit), strict=True))
            self._known[request.id] = json.dumps({**told, "since": seconds - round(ran)})
        ended = self._known.keys() - {request.id for request, *_ in found}
        with client.pipeline() as pipe:
            for task_id in ended:
                pipe.zrem(OVERTIME, self._known.pop(task_id))
            for member in self._known.values():
                pipe.zadd(OVERTIME, {member: seconds + KEPT_SECONDS})
            pipe.zremrangebyscore(OVERTIME, "-inf", seconds)
            pipe.expire(OVERTIME, KEPT_SECONDS)
            pipe.execute()


def _over_limit(app: Any) -> list[tuple[Any, float, float]]:
    """What runs over its limit in this node: the request, its limit, and for how long it has run."""
    found = []
    for request in _running():
        hard, soft = time_limits.effective(Limits(*request.time_limits), request.task, app.time_limits)
        limit, ran = hard or soft, time() - (request.time_start or time())
        if limit and ran > limit:
            found.append((request, limit, ran))
    return found


def _running() -> list[Any]:
    while True:
        # Other threads begin and end tasks; that fails while one does.
        with suppress(RuntimeError):
            return list(worker_state.active_requests)


def read(client: Redis) -> list[dict[str, Any]]:
    """What runs over its limit in any node, the longest first: node, id, name, limit and seconds.

    `client` decodes its answers.
    """
    seconds, _ = client.time()
    kept: Any = client.zrangebyscore(OVERTIME, seconds, "+inf")
    found = map(json.loads, kept)
    told = [{name: task[name] for name in SHOWN} | {"seconds": seconds - task["since"]} for task in found]
    return sorted(told, key=lambda task: -task["seconds"])
