"""`to-plain`: put back into plain queues what only Stalk's workers understand, before stock workers take over."""

from typing import Any

from celery import Celery

from services.broker.client import connect
from services.delayed import scheduled

# Nobody waits beyond the last answer, and a node that is overlooked takes in again what this puts back. A busy solo
# node does not answer at all; but that one holds a lease.
ANSWER_SECONDS = 10.0


def to_plain(app: Celery) -> dict[str, Any]:
    """Put everything back into plain queues; refused with an "error" while Stalk's workers live.

    They would take in again what has far to go, and run themselves what is due. Raises RedisError, OperationalError or
    OSError when Redis does not answer.
    """
    if nodes := _live_nodes(app):
        stop = "stop Stalk's workers first, with 'make scale WORKERS=0' for instance"
        return {"error": f"{', '.join(nodes)} would take it in again: {stop}"}
    with connect(app.settings.broker_url, app.settings) as client:
        moved = scheduled.to_plain(client)
    found: dict[str, Any] = {"scheduled": moved.scheduled, "restored": moved.requeued}
    if moved.leased:
        found["error"] = (
            f"{moved.leased} tasks still belong to workers that do not answer: run this again "
            f"{app.settings.worker.lease} s after the last of Stalk's workers has stopped"
        )
    return found


def print_moved(found: dict[str, Any]) -> None:
    """Print how much is back in the queues."""
    print(
        f"Back in the queues: {found['scheduled']} tasks that waited for their time, {found['restored']} of workers "
        "that are gone. Dead letters stay: see 'make dead-letters'."
    )


def _live_nodes(app: Celery) -> list[str]:
    """Stalk's nodes that answer."""
    answers = app.control.broadcast("held", reply=True, timeout=ANSWER_SECONDS) or []
    return sorted(name for answer in answers for name, reply in answer.items() if "lease" in reply)
