"""Remote control commands about tasks, which also find those that wait in Redis, and keep revocations there.

Celery's own commands know only the worker that runs them.
"""

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
from services.control import revocations
from services.delayed import rate_limits, scheduled
from services.delivery import registry
from services.pool import child_guard, time_limits
from services.pool.time_limits import Limits

logger = get_logger(__name__)

# For tasks on their way into the schedule: a round trip to a busy Redis; meanwhile the worker takes no new task.
POSTPONE_SECONDS = 1.0
# Ids that are looked for in the schedule at once: a millisecond in which Redis does nothing else.
BATCH_SIZE = 500


@inspect_command()  # type: ignore[untyped-decorator]
def held(state: Any, **_: Any) -> dict[str, int]:
    """How many unacknowledged messages this node has, and its lease. Only Stalk's nodes know this command."""
    mine = registry.all_deliveries()
    return {"held": sum(map(len, mine)), "lease": max((deliveries.rules.lease for deliveries in mine), default=0)}


@inspect_command(name="scheduled", alias="dump_schedule")  # type: ignore[untyped-decorator]
def list_scheduled(state: Any, **_: Any) -> list[dict[str, Any]]:
    """List of currently scheduled ETA/countdown tasks."""
    mine = celery_control.scheduled(state)
    # None while the node connects.
    consumer = state.consumer.task_consumer
    with _connect(state) as client:
        waiting = scheduled.list_next(client, [queue.name for queue in consumer.queues] if consumer else [])
    return [*mine, *(_describe_scheduled(state, one) for one in waiting)]


def _describe_scheduled(state: Any, waiting: scheduled.ScheduledMessage) -> dict[str, Any]:
    """As Celery describes a request in its timer."""
    # Its ETA, or later, if it waits for its turn or for a token of its rate.
    due = datetime.fromtimestamp(waiting.due, UTC).isoformat()
    return {"eta": due, "priority": 6, "request": _describe_request(state, _parse(state, waiting.message))}


def _parse(state: Any, raw: bytes) -> messages.TaskMessage:
    return messages.parse(raw, state.app.conf.accept_content)


def _describe_request(state: Any, message: messages.TaskMessage) -> dict[str, Any]:
    """As Celery describes a request that has not been started."""
    unread = bool(message.problem)
    info = message.properties.get("delivery_info")
    return {
        "id": message.id,
        "name": message.fields.get("shadow") or message.task,
        "args": message.fields.get("argsrepr") if unread else message.args,
        "kwargs": message.fields.get("kwargsrepr") if unread else message.kwargs,
        "type": message.task,
        "hostname": state.hostname,
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
    if problem := time_limits.find_problem(Limits(hard, soft)):
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
        deliveries.wait_until_postponed(None, POSTPONE_SECONDS)
    try:
        with _connect(state) as client:
            rate_limits.requeue_outdated(client, {task_name: state.consumer.get_rate(task_name)})
    except (RedisError, OSError) as error:
        return celery_control.ok(f"{answer['ok']}, but waiting tasks keep their times: {format_error(error)}")
    return answer


def _is_rate(text: Any) -> bool:
    """Whether it is a rate. Celery takes -1 too, which stops a task, and NaN, which Flower sends for an empty field."""
    try:
        return bool(0 <= rate(text) < math.inf)
    except (ValueError, LookupError, TypeError):
        return False


@inspect_command(variadic="ids", signature="[id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def query_task(state: Any, ids: Any, **_: Any) -> dict[str, Any]:
    """Query for task information by id."""
    found: dict[str, Any] = celery_control.query_task(state, ids)
    others = [task_id for task_id in maybe_list(ids) if task_id not in found]
    with _connect(state) as client:
        for message in _find_scheduled(state, client, others).values():
            found[str(message.id)] = ("scheduled", _describe_request(state, message))
    return found


def _find_scheduled(state: Any, client: Redis, ids: Sequence[str]) -> dict[bytes, messages.TaskMessage]:
    """The messages of these tasks that wait in Redis, by field."""
    records = scheduled.find_records(client, ids)
    return {field: _parse(state, messages.extract_message(record)) for field, record in records.items()}


@control_command(variadic="task_id", signature="[id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **keywords: Any) -> Any:
    """Revoke task by task id (or list of ids).

    Keyword Arguments:
        terminate (bool): Also terminate the process if the task is active.
        signal (str): Name of signal to use for terminate (e.g., ``KILL``).
    """
    ids = revocations.parse_ids(task_id)
    refusal = _store(state, REVOKED_TASKS, ids)
    # Before the schedule is searched, so that a task which is received from now on is revoked as well.
    answer = celery_control.revoke(state, ids, terminate, signal, **keywords)
    _revoke_scheduled(state, ids)
    return _add_refusal(answer, refusal)


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
    named = revocations.parse_headers(headers)
    stamps = revocations.format_stamps(named)
    refusal = _store(state, REVOKED_STAMPS, stamps)
    answer = celery_control.revoke_by_stamped_headers(state, named, terminate, signal, **keywords)
    revocations.remember_stamps(stamps)
    return _add_refusal(answer, refusal)


@control_command(args=[("signal", str)], variadic="task_id", signature="<signal> [id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def terminate(state: Any, signal: Any, task_id: Any, **_: Any) -> Any:
    """Terminate task by task id (or list of ids)."""
    return revoke(state, task_id, terminate=True, signal=signal)


def load_revocations(state: Any, client: Redis) -> None:
    """Read the revocations that were broadcast while this node did not hear them.

    Raises one of UNREACHABLE; a refusal is logged.
    """
    try:
        found = revocations.load(client)
    except UNREACHABLE:
        raise
    except RedisError as error:
        logger.error("What was revoked before cannot be read from Redis, and may run here: %s", format_error(error))
        return
    try:
        # Before they are remembered: where this fails, because Redis is away again, it is done the next time.
        _revoke_scheduled(state, [task_id for task_id in found.ids if task_id not in worker_state.revoked])
    except UNREACHABLE:
        raise
    except Exception:  # whatever a result backend raises at somebody's message, which is discarded when it is due
        logger.exception("What was revoked before could not be taken out of the schedule")
    revocations.remember(found)


def _store(state: Any, key: str, members: Sequence[str]) -> str:
    """Keep revocations in Redis. Returns why that was refused, or ""."""
    try:
        with _connect(state) as client:
            revocations.store(client, key, members)
    except (RedisError, OSError) as error:
        logger.warning("Revoked in this node only, and not kept in Redis: %s", format_error(error))
        return format_error(error)
    return ""


def _add_refusal(answer: Any, refusal: str) -> Any:
    """Celery's answer, and that Redis does not keep the revocation."""
    if not refusal:
        return answer
    return {"ok": f"{answer['ok']}, but in this node only, and not kept in Redis: {refusal}"}


def _revoke_scheduled(state: Any, ids: Sequence[str]) -> None:
    """Delete revoked tasks that wait in Redis for their time, so that no worker that is started later finds them."""
    if not ids:
        return
    for deliveries in registry.all_deliveries():
        deliveries.wait_until_postponed(set(ids), POSTPONE_SECONDS)
    with _connect(state) as client:
        for start in range(0, len(ids), BATCH_SIZE):
            found = _find_scheduled(state, client, ids[start : start + BATCH_SIZE])
            # Before they are deleted, so that after a crash in between they are found again; storing it twice does no
            # harm.
            for message in found.values():
                task = state.app.tasks.get(message.task)
                backend = task.backend if task else state.app.backend
                backend.mark_as_revoked(message.id, "revoked", request=messages.build_context(message))
            # All nodes are told to; the one that has deleted it sends the event.
            for field in scheduled.delete(client, list(found)):
                _send_revoked(state, found[field])


def _send_revoked(state: Any, message: messages.TaskMessage) -> None:
    """Log that a task is revoked, and send Celery's event and signal."""
    logger.info("Discarding revoked task: %s[%s]", message.task, message.id)
    dispatcher = state.consumer.event_dispatcher
    how = {"terminated": False, "signum": None, "expired": False}
    if dispatcher and dispatcher.enabled:
        dispatcher.send("task-revoked", uuid=message.id, **how)
    if task := state.app.tasks.get(message.task):
        signals.task_revoked.send(sender=task, request=messages.build_context(message), **how)


def _connect(state: Any) -> Redis:
    return connect(state.app.settings.broker_url, state.app.settings)
