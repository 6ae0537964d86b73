"""Overtime: tasks that run longer than their time limit in a pool of threads, or in a solo pool, are reported.

Only a pool of processes can end a task. In other pools a thread of the node logs such tasks, and keeps them in Redis
for `make status`: a solo pool that runs a task answers no remote control.
"""

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

# Limits are seconds at least; a check goes through the tasks that run, which takes microseconds.
CHECK_SECONDS = 5.0
# For three more checks, which may come late on a busy machine; what a dead node has reported goes after that.
KEEP_SECONDS = 20
FIELDS = ("node", "id", "name", "limit")


class OvertimeStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Bootstep that reports overtime in a node whose pool cannot end a task."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        # The tasks that were logged, by id, as they are in Redis.
        self._reported: dict[str, str] = {}
        super().__init__(worker, **options)

    def include_if(self, worker: Any) -> bool:
        return not issubclass(worker.pool_cls, PreforkPool)

    def start(self, worker: Any) -> None:
        threading.Thread(target=self._run, args=(worker,), name="overtime", daemon=True).start()

    def _run(self, worker: Any) -> None:
        client = connect(worker.app.settings.broker_url, worker.app.settings)
        while True:
            sleep(CHECK_SECONDS)
            # Redis may take it the next time; the log has it already.
            with suppress(RedisError, OSError):
                self._check(worker, client)

    def _check(self, worker: Any, client: Redis) -> None:
        found = _find_overtime(worker.app)
        if not found and not self._reported:
            return
        seconds, _ = client.time()
        for request, limit, ran in found:
            if request.id in self._reported:
                continue
            line = "%s[%s] has run for %.0f s and its limit is %g s: in this pool nothing ends it but the node's end"
            logger.warning(line, request.name, request.id, ran, limit)
            task = dict(zip(FIELDS, (worker.hostname, request.id, request.name, limit), strict=True))
            self._reported[request.id] = json.dumps({**task, "since": seconds - round(ran)})
        ended = self._reported.keys() - {request.id for request, *_ in found}
        with client.pipeline() as pipe:
            for task_id in ended:
                pipe.zrem(OVERTIME, self._reported.pop(task_id))
            for member in self._reported.values():
                pipe.zadd(OVERTIME, {member: seconds + KEEP_SECONDS})
            pipe.zremrangebyscore(OVERTIME, "-inf", seconds)
            pipe.expire(OVERTIME, KEEP_SECONDS)
            pipe.execute()


def _find_overtime(app: Any) -> list[tuple[Any, float, float]]:
    """The tasks of this node that run over their limit: the request, its limit, and for how long it has run."""
    found = []
    for request in _copy_active():
        hard, soft = time_limits.resolve(Limits(*request.time_limits), request.task, app.time_limits)
        limit, ran = hard or soft, time() - (request.time_start or time())
        if limit and ran > limit:
            found.append((request, limit, ran))
    return found


def _copy_active() -> list[Any]:
    while True:
        # Fails while another thread begins or ends a task.
        with suppress(RuntimeError):
            return list(worker_state.active_requests)


def read(client: Redis) -> list[dict[str, Any]]:
    """Read which tasks of any node run over their limit, the longest first: node, id, name, limit and seconds.

    `client` decodes replies.
    """
    seconds, _ = client.time()
    members: Any = client.zrangebyscore(OVERTIME, seconds, "+inf")
    tasks = map(json.loads, members)
    found = [{name: task[name] for name in FIELDS} | {"seconds": seconds - task["since"]} for task in tasks]
    return sorted(found, key=lambda task: -task["seconds"])
