"""python -m tests.chaos.workload.producer WORKLOAD: send tasks through an app, as its users do.

WORKLOAD is the JSON of tests.chaos.testbeds.base.Workload. A task whose publish returned is recorded as `sent`, any
other one as `refused`. A process of its own, because an app belongs to its process's environment.
"""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.chaos.workload.tasks import record

# Between checks for the file that pauses it.
LOOK_SECONDS = 0.05
# After a refusal, so that an outage of a second does not eat a thousand tasks.
PAUSE_SECONDS = 0.2
# Whoever started it may have died without creating that file.
LONGEST_SECONDS = 3600


def send(app: Any, workload: dict[str, Any], number: int) -> list[str]:
    """Send one task or chord; the ids of all that has to run. Raises whatever the app raises."""
    name = f"chaos-{workload['label']}-{number:06d}"
    if workload["chord_each"] and number % workload["chord_each"] == 0:
        return send_chord(app, workload, name)
    argument = workload["argument"]
    app.tasks[workload["task"]].apply_async((argument,), task_id=name, countdown=workload["countdown"] or None)
    return [name]


def send_chord(app: Any, workload: dict[str, Any], name: str) -> list[str]:
    """Send a header of tasks and the body that gathers them."""
    from celery import chord

    ids = [f"{name}-{part:02d}" for part in range(workload["header"])]
    header = [app.tasks["chaos.work"].s(workload["argument"]).set(task_id=each) for each in ids]
    chord(header)(app.tasks["chaos.gather"].s().set(task_id=f"{name}-body"))
    return [*ids, f"{name}-body"]


def produce(app: Any, workload: dict[str, Any]) -> None:
    """Send at least `count` tasks, and, where `until` names a file, until that is there.

    While there is a file `pause` beside it nothing is sent.
    """
    sent, number, due, latest = 0, 0, time.monotonic(), time.monotonic() + LONGEST_SECONDS
    until = Path(workload["until"]) if workload["until"] else None
    while sent < workload["count"] or (until and not until.exists()):
        if until and until.with_name("pause").exists() and not until.exists():
            time.sleep(LOOK_SECONDS)
            continue
        if time.monotonic() > latest:
            sys.exit("the file that ends it never came")
        number += 1
        try:
            ids = send(app, workload, number)
        except Exception as error:  # of kombu, redis-py or Redis: the user of delay() sees an error
            record("refused", f"chaos-{workload['label']}-{number:06d}")
            print(f"refused {number}: {error!r}", file=sys.stderr, flush=True)
            time.sleep(PAUSE_SECONDS)
            continue
        sent += 1
        for name in ids:
            record("sent", name, number=workload["planned"])
        if workload["rate"]:
            # What a busy machine or an outage has kept from being sent in time is not sent all at once later.
            due = max(due + 1 / workload["rate"], now := time.monotonic())
            time.sleep(due - now)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    application = import_module(given["app"]).app
    application.loader.import_default_modules()
    produce(application, given)
