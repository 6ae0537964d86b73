"""Send tasks to Stalk by name, and look up their state. Copy this file into your project.

It needs `celery[redis]` and two variables: the database that carries the tasks, and the one that keeps the results.

    CELERY_BROKER_URL=redis://:secret@127.0.0.1:6379/0
    CELERY_RESULT_BACKEND=redis://:secret@127.0.0.1:6379/1
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from celery import Celery
from celery.states import EXCEPTION_STATES, READY_STATES, SUCCESS
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

# The queues that your workers take from. A misspelt one is an error, and not a queue that nobody serves.
QUEUES = ("celery",)
# Redis answers within milliseconds. At worst a request waits three times that long: to send, to connect, to send again.
SOCKET_SECONDS = 2
# Nobody notices a tenth of a second, and Redis answers ten questions a second for each request with ease.
LOOK_UP_SECONDS = 0.1

# Neither of the two apps becomes the current one: your project may have a Celery app of its own.
sender = Celery("sender", set_as_current=False)
sender.conf.update(
    broker_url=os.environ["CELERY_BROKER_URL"],
    # More than your server has threads: a thread that finds no free connection waits for one without a limit.
    broker_pool_limit=100,
    task_serializer="json",
    task_create_missing_queues=False,
    # Each with its exchange: a bare Queue(name) would share the default one, and get copies of its tasks (celery 5.7).
    task_queues=[Queue(name, Exchange(name), routing_key=name) for name in QUEUES],
    # One retry, because an idle connection may have died; Celery's default is three. If only the answer was lost, the
    # task is queued twice: tasks have to be idempotent anyhow.
    task_publish_retry_policy={"max_retries": 1, "interval_start": 0},
    broker_transport_options={
        # Without a limit, a Redis that hangs holds every request for ever.
        "socket_timeout": SOCKET_SECONDS,
        "socket_connect_timeout": SOCKET_SECONDS,
        # No further attempts to connect beyond the retry above.
        "max_retries": 0,
    },
)
# With a backend this app would subscribe to the result of each task, keep the subscriptions of tasks that could not be
# sent, and raise RuntimeError when Redis is unavailable (celery 5.7). `look_up` asks instead.
sender.backend_cls = "disabled"

reader = Celery("reader", set_as_current=False)
reader.conf.update(
    result_backend=os.environ["CELERY_RESULT_BACKEND"],
    # JSON only: unpickling a result runs whatever its sender wrote.
    accept_content=["json"],
    redis_socket_timeout=SOCKET_SECONDS,
    redis_socket_connect_timeout=SOCKET_SECONDS,
    # One pool of connections for all threads of a web server, not one for each (celery 5.7).
    result_backend_thread_safe=True,
)


class Unavailable(Exception):
    """Redis does not answer, or accepts nothing: try again later. The task may have been queued all the same."""


@dataclass(frozen=True)
class Task:
    """The state of a task."""

    id: str
    # PENDING (it waits, or was never sent), STARTED, RETRY, PROGRESS, SUCCESS, FAILURE or REVOKED.
    state: str = "PENDING"
    # Its progress, its result, or what went wrong.
    value: Any = None

    @property
    def ended(self) -> bool:
        return self.state in READY_STATES

    @property
    def http_status(self) -> int:
        """The status of a response: 200 with a result, 202 while there is none yet, 500 if there will be none."""
        return (200 if self.state == SUCCESS else 500) if self.ended else 202


def send(name: str, *args: Any, keep_result: bool = True, **options: Any) -> Task:
    """Queue a task. `options` are those of Celery's apply_async: queue, countdown, expires, priority
    (from 0, the most urgent on Redis and the default, to 9) …

    With keep_result=False no result is stored, for tasks whose result nobody reads. Raises Unavailable.
    """
    try:
        return Task(sender.send_task(name, args, ignore_result=not keep_result, **options).id)
    except OperationalError as error:
        raise Unavailable(f"the task could not be sent: {error}") from error


def look_up(task_id: str) -> Task:
    """Look up the state of a task. Raises Unavailable."""
    try:
        found = reader.backend.get_task_meta(task_id, cache=False)
    except RedisError as error:
        raise Unavailable(f"the result could not be read: {error}") from error
    state, value = found["status"], found["result"]
    return Task(task_id, state, f"{type(value).__name__}: {value}" if state in EXCEPTION_STATES else value)


def wait(task: Task, seconds: float) -> Task:
    """Wait for the end of a task, for `seconds` at most; return its state then."""
    deadline = monotonic() + seconds
    while not task.ended and monotonic() < deadline:
        sleep(LOOK_UP_SECONDS)
        try:
            task = look_up(task.id)
        except Unavailable:
            # The task was sent: the caller must not send it again because its result cannot be read for a moment.
            continue
    return task
