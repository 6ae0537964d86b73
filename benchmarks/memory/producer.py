"""python -m benchmarks.memory.producer: send tasks through Stalk's app, as fast as they are taken and no faster.

A process of its own, because an app belongs to its process's environment.
"""

import click

from benchmarks.memory.tasks import NOOP
from services.broker.client import connect
from services.broker.keys import DEFAULT_QUEUE
from tests.support.waiting import wait_until

# A node on two cores takes a thousand in half a second, ten times as long as a look at the queue takes to come.
LOW = 1000
# Small beside what is measured: five thousand messages take 5 MiB of Redis.
HIGH = 5000
# A node that has taken nothing for so long takes nothing any more; its lease has run out by then.
TIMEOUT_SECONDS = 120


def produce(count: int, batch: int, countdown: float) -> None:
    """Send `count` tasks that are due in `countdown` seconds, `batch` of them whenever the queue has become short.

    Raises tests.support.waiting.GaveUp when nobody takes them.
    """
    # Not above: whoever takes the numbers from here has another environment.
    from services.app import app

    app.loader.import_default_modules()
    client, task = connect(app.settings.broker_url, app.settings), app.tasks[NOOP]

    def is_short() -> bool:
        return int(client.llen(DEFAULT_QUEUE)) <= LOW

    for number in range(count):
        if number % batch == 0:
            wait_until(is_short, TIMEOUT_SECONDS, f"a node takes tasks from {DEFAULT_QUEUE}")
        task.apply_async(countdown=countdown or None)


@click.command
@click.option("--count", required=True, type=int)
@click.option("--batch", required=True, type=int)
@click.option("--countdown", default=0.0)
def main(*, count: int, batch: int, countdown: float) -> None:
    """Send tasks, then end."""
    produce(count, batch, countdown)


if __name__ == "__main__":
    main()
