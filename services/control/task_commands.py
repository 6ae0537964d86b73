"""Remote control that knows what is in Redis: tasks that wait for their time, and what was revoked.

Celery's commands look into the worker, and write there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from celery import signals
from celery.utils.functional import maybe_list
from celery.utils.log import get_logger
from celery.utils.time import rate
from celery.worker import control as celery_control
from celery.worker import state as worker_state
from celery.worker.control import control_command, inspect_command
from redis import Redis
from redis.exceptions import RedisError

from services.broker import messages
from services.broker.client import UNREACHABLE, connect, format_error
from services.broker.keys import REVOKED_STAMPS, REVOKED_TASKS
from services.control import revoked
from services.delayed import rate_limits, scheduled
from services.delivery import registry
from services.delivery.unacked import UnackedDeliveries
from services.pool import child_guard, time_limits
from services.pool.time_limits import Limits

logger = get_logger(__name__)

# A round trip to Redis, and patience with one that is busy; meanwhile the worker takes no new task.
LEAVING_SECONDS = 1.0
# Ids that are looked for in the schedule at once: a millisecond in which Redis does nothing else.
LOOKED_FOR_AT_ONCE = 500


@inspect_command()  # type: ignore[untyped-decorator]
def held(state: Any, **_: Any) -> dict[str, int]:
    """What this node holds under a lease. Only Stalk's nodes know this command."""
    mine: list[UnackedDeliveries] = registry.all_deliveries()
    return {"held": sum(map(len, mine)), "lease": max((deliveries.rules.lease for deliveries in mine), default=0)}


@inspect_command(name="scheduled", alias="dump_schedule")  # type: ignore[untyped-decorator]
def list_scheduled(state: Any, **_: Any) -> list[dict[str, Any]]:
    """List of currently scheduled ETA/countdown tasks."""
    mine = celery_control.scheduled(state)
    # There is none while it connects.
    consumer = state.consumer.task_consumer
    with _redis(state) as client:
        waiting = scheduled.first(client, [queue.name for queue in consumer.queues] if consumer else [])
    return [*mine, *(_entry(state, one) for one in waiting)]


def _entry(state: Any, one: scheduled.Waiting) -> dict[str, Any]:
    """As Celery describes a request in its timer."""
    message = messages.parse(one.message, state.app.conf.accept_content)
    # Of its own, or later, if it waits for its turn or its rate.
    eta = datetime.fromtimestamp(one.due, UTC).isoformat()
    return {"eta": eta, "priority": 6, "request": _info(message, state.hostname)}


def _info(message: messages.TaskMessage, hostname: str) -> dict[str, Any]:
    """As Celery describes a request that has not been started."""
    unread = bool(message.problem)
    info = message.properties.get("delivery_info")
    return {
        "id": message.id,
        "name": message.fields.get("shadow") or message.task,
        "args": message.fields.get("argsrepr") if unread else message.args,
        "kwargs": message.fields.get("kwargsrepr") if unread else message.kwargs,
        "type": message.task,
        "hostname": hostname,
        "time_start": None,
        "acknowledged": False,
        "delivery_info": {
            **(info if isinstance(info, dict) else {}),
            "priority": message.properties.get("priority"),
            "redelivered": message.redelivered,
        },
        "worker_pid": None,
    }


@control_command(  # type: ignore[untyped-decorator]
    args=[("task_name", str), ("soft", float), ("hard", float)], signature="<task_name> <soft_secs> [hard_secs]"
)
def time_limit(state: Any, task_name: str = "", hard: float | None = None, soft: float | None = None, **_: Any) -> Any:
    """Tell worker(s) to modify the time limit for task by type."""
    if (task := state.app.tasks.get(task_name)) is None:
        return celery_control.nok(f"unknown task {task_name}")
    if not child_guard.forks(state.consumer.pool):
        return celery_control.nok("time limits are not enforced in this pool: only prefork enforces them")
    if problem := time_limits.problem_with(Limits(hard, soft)):
        return celery_control.nok(problem)
    time_limits.change(task, Limits(hard, soft))
    logger.info("New time limits for tasks of type %s: soft=%s hard=%s", task_name, soft, hard)
    return celery_control.ok("time limits set successfully")


@control_command(  # type: ignore[untyped-decorator]
    args=[("task_name", str), ("rate_limit", str)], signature="<task_name> <rate_limit (e.g., 5/s | 5/m | 5/h)>"
)
def rate_limit(state: Any, task_name: str, rate_limit: Any, **_: Any) -> Any:
    """Tell worker(s) to modify the rate limit for a task by type."""
    if not _is_rate(rate_limit):
        must = "must be a number, 0 for no limit, or one with /s, /m or /h behind it"
        return celery_control.nok(f"the rate limit is {rate_limit!r}, and {must}")
    answer = celery_control.rate_limit(state, task_name, rate_limit)
    if "ok" not in answer:
        return answer
    for deliveries in registry.all_deliveries():
        deliveries.wait_until_postponed(None, LEAVING_SECONDS)
    try:
        with _redis(state) as client:
            rate_limits.settle(client, {task_name: state.consumer.rate_of(task_name)})
    except (RedisError, OSError) as error:
        return celery_control.ok(f"{answer['ok']}, but what waits keeps its time: {format_error(error)}")
    return answer


def _is_rate(text: Any) -> bool:
    """Celery takes -1, with which no such task starts any more, and NaN, which Flower sends for an empty field."""
    try:
        return bool(0 <= rate(text) < math.inf)
    except (ValueError, LookupError, TypeError):
        return False


@inspect_command(variadic="ids", signature="[id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def query_task(state: Any, ids: Any, **_: Any) -> dict[str, Any]:
    """Query for task information by id."""
    found: dict[str, Any] = celery_control.query_task(state, ids)
    others = [task_id for task_id in maybe_list(ids) if task_id not in found]
    with _redis(state) as client:
        records = scheduled.of_tasks(client, others)
    for record in records.values():
        message = messages.parse(messages.extract_message(record), state.app.conf.accept_content)
        found[str(message.id)] = ("scheduled", _info(message, state.hostname))
    return found


@control_command(variadic="task_id", signature="[id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **keywords: Any) -> Any:
    """Revoke task by task id (or list of ids).

    Keyword Arguments:
        terminate (bool): Also terminate the process if the task is active.
        signal (str): Name of signal to use for terminate (e.g., ``KILL``).
    """
    ids = revoked.as_ids(task_id)
    refused = _keep(state, REVOKED_TASKS, ids)
    # Before it is looked for, so that whoever gets one of them from now on knows.
    answer = celery_control.revoke(state, ids, terminate, signal, **keywords)
    _take_out(state, ids)
    return _but(answer, refused)


@control_command(variadic="headers", signature="[key1=value1 [key2=value2 [... [keyN=valueN]]]]")  # type: ignore[untyped-decorator]
def revoke_by_stamped_headers(
    state: Any, headers: Any, terminate: bool = False, signal: Any = None, **keywords: Any
) -> Any:
    """Revoke task by header (or list of headers).

    Keyword Arguments:
        headers(dictionary): Dictionary that contains stamping scheme name as keys and stamps as values.
                             If headers is a list, it will be converted to a dictionary.
        terminate (bool): Also terminate the process if the task is active.
        signal (str): Name of signal to use for terminate (e.g., ``KILL``).
    """
    named = revoked.as_headers(headers)
    stamps = revoked.as_stamps(named)
    refused = _keep(state, REVOKED_STAMPS, stamps)
    answer = celery_control.revoke_by_stamped_headers(state, named, terminate, signal, **keywords)
    revoked.learn_stamps(stamps)
    return _but(answer, refused)


@control_command(args=[("signal", str)], variadic="task_id", signature="<signal> [id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def terminate(state: Any, signal: Any, task_id: Any, **_: Any) -> Any:
    """Terminate task by task id (or list of ids)."""
    return revoke(state, task_id, terminate=True, signal=signal)


def learn_revoked(state: Any, client: Redis) -> None:
    """Read what was revoked while this node did not hear it.

    Raises redis.exceptions.ConnectionError and the like; a refusal is logged.
    """
    try:
        found = revoked.load(client)
    except UNREACHABLE:
        raise
    except RedisError as error:
        logger.error("What was revoked before cannot be read from Redis, and may run here: %s", format_error(error))
        return
    try:
        # First: what this cannot do, because Redis is away again, has to be news the next time.
        _take_out(state, [task_id for task_id in found.ids if task_id not in worker_state.revoked])
    except UNREACHABLE:
        raise
    except Exception:  # whatever a result backend makes of a message that somebody has sent; it is discarded when due
        logger.exception("What was revoked before could not be taken out of the schedule")
    revoked.learn(found)


def _keep(state: Any, key: str, members: Sequence[str]) -> str:
    """Keep in Redis what is revoked. Returns why that was not possible, or ""."""
    try:
        with _redis(state) as client:
            revoked.keep(client, key, members)
    except (RedisError, OSError) as error:
        logger.warning("Revoked in this node only, and not kept in Redis: %s", format_error(error))
        return format_error(error)
    return ""


def _but(answer: Any, refused: str) -> Any:
    """Celery's answer, with what it does not know."""
    if not refused:
        return answer
    return {"ok": f"{answer['ok']}, but in this node only, and not kept in Redis: {refused}"}


def _take_out(state: Any, ids: Sequence[str]) -> None:
    """Take revoked tasks out of Redis that wait there for their time."""
    if not ids:
        return
    for deliveries in registry.all_deliveries():
        deliveries.wait_until_postponed(set(ids), LEAVING_SECONDS)
    with _redis(state) as client:
        for start in range(0, len(ids), LOOKED_FOR_AT_ONCE):
            _revoke_scheduled(state, client, ids[start : start + LOOKED_FOR_AT_ONCE])


def _revoke_scheduled(state: Any, client: Redis, ids: Sequence[str]) -> None:
    """Take out of Redis what waits there, so that no worker that is started later finds it."""
    records = scheduled.of_tasks(client, ids)
    found = {
        field: messages.parse(messages.extract_message(record), state.app.conf.accept_content)
        for field, record in records.items()
    }
    # Before it is taken out, so that a crash in between leaves nobody waiting; twice is like once.
    for message in found.values():
        _backend(state, message).mark_as_revoked(message.id, "revoked", request=messages.build_context(message))
    # Several workers are told to; the one that has taken it out tells the world.
    for field in scheduled.remove(client, list(found)):
        _announce(state, found[field])


def _backend(state: Any, message: messages.TaskMessage) -> Any:
    task = state.app.tasks.get(message.task)
    return task.backend if task else state.app.backend


def _announce(state: Any, message: messages.TaskMessage) -> None:
    logger.info("Discarding revoked task: %s[%s]", message.task, message.id)
    dispatcher = state.consumer.event_dispatcher
    how = {"terminated": False, "signum": None, "expired": False}
    if dispatcher and dispatcher.enabled:
        dispatcher.send("task-revoked", uuid=message.id, **how)
    if task := state.app.tasks.get(message.task):
        signals.task_revoked.send(sender=task, request=messages.build_context(message), **how)


def _redis(state: Any) -> Redis:
    return connect(state.app.settings.broker_url, state.app.settings)
