"""The processes of the local stack: those of the session that its Supervisor leads, or led before it was killed.

Whatever Supervisor starts stays in its session, and the kernel gives the session's number to nobody else while one
of them lives. So they are found after Supervisor has gone, and nobody else is taken for them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from stack import paths

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LOOK_SECONDS = 0.1
# Redis writes and closes its file when told to stop: 512 MB in a few seconds.
REDIS_SECONDS = 30
# The kernel ends what gets KILL within milliseconds, unless a disk does not answer.
KILL_SECONDS = 5


@dataclass(frozen=True)
class Process:
    """What the kernel tells of a process."""

    pid: int
    group: int
    session: int
    # In clock ticks since the machine was started: with the pid this names a process for ever.
    born: int


def look(pid: int) -> Process | None:
    """A process that runs; None when it has ended, also when nobody has asked for its exit code yet."""
    try:
        # The name before the state may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] in ("Z", "X"):
        return None
    return Process(pid, group=int(fields[2]), session=int(fields[3]), born=int(fields[19]))


def record(pid: int, kind: str) -> None:
    """Note who leads the session; `kind` tells one Supervisor's configuration from the next one's."""
    leader = look(pid)
    if leader:
        paths.SESSION.write_text(f"{leader.pid} {leader.born} {boot()} {kind} {paths.ROOT}\n")


def boot() -> str:
    """Which start of the machine this is: numbers of processes mean nothing beyond it."""
    return BOOT_ID.read_text().strip()


def kind() -> str:
    """What was recorded as the kind of the Supervisor that runs."""
    return _recorded()[2]


def members() -> list[Process]:
    """Every process of the stack that still runs, its Supervisor included."""
    number, born, _ = _recorded()
    leader = look(number)
    if not number or (leader and leader.born != born):
        return []
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [process for pid in pids if (process := look(pid)) and process.session == number]


def leader() -> Process | None:
    """The Supervisor, while it runs."""
    return next((process for process in members() if process.pid == process.session), None)


def _recorded() -> tuple[int, int, str]:
    try:
        pid, born, when, kind, where = paths.SESSION.read_text().rstrip("\n").split(" ", 4)
    except (FileNotFoundError, ValueError):
        return 0, 0, ""
    # A copied checkout brings the record along, and must not end the stack of the other.
    return (int(pid), int(born), kind) if (when, where) == (boot(), str(paths.ROOT)) else (0, 0, "")


def redis() -> int:
    """The process id of the Redis that was started last; 0 when there was none."""
    try:
        return int(paths.REDIS_LOCK.read_text())
    except (FileNotFoundError, ValueError):
        return 0


def end(patience: float) -> list[Process]:
    """End what is left of the stack as Supervisor would: running tasks finish, Redis goes last. Whoever resists."""
    server = redis()

    def but_redis() -> list[Process]:
        return [process for process in members() if process.group != server]

    _end(but_redis, patience)
    _end(members, REDIS_SECONDS)
    return members()


def _end(processes: Callable[[], list[Process]], patience: float) -> None:
    # Programs get TERM and their children do not: they finish their tasks. KILL ends them all.
    _signal((process.pid for process in processes() if process.pid == process.group), signal.SIGTERM)
    if not wait(lambda: not processes(), patience):
        _signal((process.pid for process in processes()), signal.SIGKILL)
        wait(lambda: not processes(), KILL_SECONDS)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def wait(condition: Callable[[], object], seconds: float) -> bool:
    """Whether `condition` became true within so many seconds."""
    deadline = monotonic() + seconds
    while not condition():
        if monotonic() > deadline:
            return False
        sleep(LOOK_SECONDS)
    return True
