"""Which tasks become dead letters in a worker: what is no task that Celery can run, and what has failed for good.

The consumer asks the first, because Celery does not check headers (celery 5.7), and the request the second. A task
that has killed too many workers is one by lua/crash.lua and lua/sweep.lua, one that has asked too often to be requeued
by lua/requeue_later.lua.
"""

from typing import Any

from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, Retry, WorkerLostError

from services.broker.messages import NOT_A_BODY

# What Celery raises at an invalid header or option. Not caught, such an error ends the worker, and then the next one
# that receives the message.
INVALID_TASK_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def find_problem(message: Any) -> str:
    """Say why a message is no task; "" when it is one."""
    headers = message.headers
    try:
        payload = message.payload
    except Exception as error:  # whatever a decoder raises at what somebody has sent
        return f"its body cannot be decoded: {error!r}"
    if not isinstance(headers, dict):
        return f"its headers are {type(headers).__name__}, not an object"
    fields = headers if "task" in headers else payload
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), str) for name in ("task", "id")):
        return "it has no task and id"
    # With others a pool of processes ends when the task runs.
    if not _are_limits(fields.get("timelimit")):
        return f"its time limits are {fields['timelimit']!r}, not two numbers"
    # The first version of Celery's protocol has the fields in the body.
    return "" if fields is payload or _is_body(payload) else NOT_A_BODY


def _is_body(payload: Any) -> bool:
    """Whether it is a list of arguments, keywords and options."""
    if isinstance(payload, dict):
        return True
    types = (list | tuple, dict, dict | None)
    return isinstance(payload, list | tuple) and len(payload) == len(types) and all(map(isinstance, payload, types))


def _are_limits(found: Any) -> bool:
    """Whether Celery can take this for a hard and a soft time limit."""
    if not found:
        return True
    return isinstance(found, list) and len(found) == 2 and all(isinstance(limit, int | float | None) for limit in found)


def is_last_retry(error: BaseException, retries: int | None, limit: int | None) -> bool:
    """Whether a task has failed with `error` after so many retries, and its max_retries allows no further one."""
    if isinstance(error, Retry | Reject | Ignore | WorkerLostError):
        return False
    return isinstance(error, MaxRetriesExceededError) or (limit is not None and 0 < (retries or 0) >= limit)
