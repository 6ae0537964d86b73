"""Plain Python: send a long task, show its progress, give up waiting after a while.

python plain.py [ROUNDS [SECONDS]]. Exit codes: 0 it succeeded, 1 it failed, 2 Redis is unavailable, 3 it still runs.
"""

from __future__ import annotations

import sys
from time import monotonic

from producer import Task, Unavailable, send, wait


def main(rounds: int = 10_000_000, seconds: int = 60) -> int:
    try:
        task = send("services.tasks.hashes.hash_chain", "seed", rounds)
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Sent {task.id}.", flush=True)
    deadline = monotonic() + seconds
    while not task.ended and monotonic() < deadline:
        # The task reports once a second.
        task = wait(task, 1)
        show(task)
    return 0 if task.state == "SUCCESS" else 1 if task.ended else 3


def show(task: Task) -> None:
    if task.state == "PROGRESS":
        print(f"{task.value['done'] / task.value['total']:.0%}", flush=True)
    else:
        print(f"{task.state}: {task.value}" if task.ended else task.state, flush=True)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
