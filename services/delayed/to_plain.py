"""The way back to workers that are not Stalk's: what only Stalk understands goes back to the plain queues."""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from services.broker.client import connect
from services.delayed import scheduled

# Nobody waits beyond the last answer, and a node that is overlooked takes in again what this brings. A busy solo node
# does not answer at all; but that one holds a lease.
ANSWER_SECONDS = 10.0


def to_plain(app: Celery) -> tuple[dict[str, Any], int]:
    """Bring everything back to plain queues: the object to print and the exit code.

    Refused while Stalk's workers live: they would take in again what has far to go, and run themselves what is due.
    """
    try:
        if nodes := _live(app):
            stop = "stop Stalk's workers first, with 'make scale WORKERS=0' for instance"
            return {"error": f"{', '.join(nodes)} would take it in again: {stop}"}, 1
        with connect(app.settings.broker_url, app.settings) as client:
            moved = scheduled.to_plain(client)
    except (RedisError, OperationalError, OSError) as error:
        return {"error": f"Redis does not answer: {error}"}, 1
    answer = {"scheduled": moved.scheduled, "restored": moved.requeued}
    if moved.leased:
        return answer | {"error": _leased(app, moved.leased)}, 1
    return answer, 0


def _leased(app: Celery, count: int) -> str:
    return (
        f"{count} tasks still belong to workers that do not answer: run this again {app.settings.worker.lease} s after "
        f"the last of Stalk's workers has stopped"
    )


def _live(app: Celery) -> list[str]:
    """Stalk's nodes that answer."""
    answers = app.control.broadcast("held", reply=True, timeout=ANSWER_SECONDS) or []
    return sorted(name for answer in answers for name, said in answer.items() if "lease" in said)
