"""Whether a message is a task that Celery can run; Celery believes whatever a header says (celery 5.7)."""

from __future__ import annotations

from typing import Any

from celery.utils.time import maybe_iso8601, maybe_make_aware

from services.delayed.rate_limits import NEVER

# What Celery raises at a header or an option that is not what it should be. Left to themselves, these errors end the
# worker, and then the next one.
UNUSABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


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
    # A pool of processes learns it when the task runs, and ends.
    if not _are_limits(fields.get("timelimit")):
        return f"its time limits are {fields['timelimit']!r}, not two numbers"
    # The first version of Celery's protocol has all of it in the body.
    return "" if fields is payload else _body_problem(payload)


def _body_problem(payload: Any) -> str:
    if isinstance(payload, dict):
        return ""
    shape = [type(part) for part in payload] if isinstance(payload, list | tuple) else []
    types = (list | tuple, dict, dict | None)
    if len(shape) != len(types) or not all(map(issubclass, shape, types)):
        return "its body is not a list of arguments, keywords and options"
    return ""


def _are_limits(found: Any) -> bool:
    """Whether Celery can take this for a hard and a soft time limit."""
    if not found:
        return True
    return isinstance(found, list) and len(found) == 2 and all(isinstance(limit, int | float | None) for limit in found)


def read_time(message: Any, name: str, app: Any) -> float:
    """A time that a task has, "eta" or "expires", as Unix time."""
    try:
        return float(maybe_make_aware(maybe_iso8601(message.headers.get(name)), app.timezone).timestamp())
    except (AttributeError, ValueError, TypeError, OverflowError):
        # There is none, or Celery will say what is wrong with it.
        return NEVER
