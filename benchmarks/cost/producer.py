"""python -m benchmarks.cost.producer APP fill|single COUNT FILE: send tasks that do nothing, and write down when.

`fill` sends one after another, `single` waits for the start of each and lets the node become idle again. FILE gets
a JSON list of monotonic times in seconds: of `fill` after each publish, of `single` before each. A process of its
own, because an app belongs to its process's environment.
"""

import json
import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from benchmarks.cost import starts
from tests.support.waiting import wait_until

# Twice as long as an acknowledgement may wait in a node: what is published then finds it with nothing to do.
IDLE_SECONDS = 0.02
# A start takes milliseconds; a machine that is busy with something else, longer.
START_SECONDS = 20
# Short beside the milliseconds that a start takes: the next publish must not wait for a look.
LOOK_SECONDS = 0.002


def fill(task: Any, count: int) -> list[float]:
    """Send `count` tasks at once; when each was sent."""
    sent = []
    for _ in range(count):
        task.apply_async()
        sent.append(monotonic())
    return sent


def single(task: Any, count: int) -> list[float]:
    """Send `count` tasks, each to an idle node; when each was about to be sent."""
    directory, sent = Path(os.environ["COST_STARTS"]), []
    for _ in range(count):
        before = starts.count(directory)
        sleep(IDLE_SECONDS)
        sent.append(monotonic())
        task.apply_async()
        wait_until(partial(another, directory, before), START_SECONDS, "it starts", look=LOOK_SECONDS)
    return sent


def another(directory: Path, before: int) -> bool:
    """Whether more tasks than that have started."""
    return starts.count(directory) > before


def main(module: str, way: str, count: str, path: str) -> None:
    """Send through the `app` of a module."""
    app = import_module(module).app
    app.loader.import_default_modules()
    send = {"fill": fill, "single": single}[way]
    Path(path).write_text(json.dumps(send(app.tasks["cost.nothing"], int(count))))


if __name__ == "__main__":
    main(*sys.argv[1:])
