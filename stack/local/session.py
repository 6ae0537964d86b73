"""The processes of the local stack: those of the session that its Supervisor leads, or led before it was killed.

Whatever Supervisor starts stays in its session, and the kernel gives the session's number to no other while one of
them lives. So they are found after Supervisor has gone, and no other process is taken for one of them.
"""

import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from services.supervisor.proc_stat import ProcessStat, read_stat
from stack import paths

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LOOK_SECONDS = 0.1
# Redis writes and closes its file when told to stop: 512 MB in a few seconds.
REDIS_SECONDS = 30
# The kernel ends what gets KILL within milliseconds, unless a disk does not answer.
KILL_SECONDS = 5


def record(pid: int, kind: str) -> None:
    """Write down which process leads the session; `kind` tells one Supervisor's configuration from the next one's."""
    if (leader := read_stat(pid)) and not leader.ended:
        paths.SESSION.write_text(f"{leader.pid} {leader.born} {read_boot_id()} {kind} {paths.ROOT}\n")


def read_boot_id() -> str:
    """The id of this start of the machine: the number of a process means nothing beyond it."""
    return BOOT_ID.read_text().strip()


def read_kind() -> str:
    """The recorded kind of the Supervisor that runs; "" where none is recorded."""
    return _read_record()[2]


def list_processes() -> list[ProcessStat]:
    """Every process of the stack that still runs, its Supervisor included."""
    number, born, _ = _read_record()
    leader = read_stat(number)
    if not number or (leader and leader.born != born):
        return []
    stats = (read_stat(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [stat for stat in stats if stat and stat.session == number and not stat.ended]


def find_leader() -> ProcessStat | None:
    """The Supervisor, while it runs."""
    return next((process for process in list_processes() if process.pid == process.session), None)


def _read_record() -> tuple[int, int, str]:
    """The leader's pid and its birth, and the kind; 0 and "" where there is no record of ours."""
    try:
        pid, born, boot, kind, root = paths.SESSION.read_text().rstrip("\n").split(" ", 4)
    except (FileNotFoundError, ValueError):
        return 0, 0, ""
    # A copied checkout has the record of the original, whose stack it must not end.
    return (int(pid), int(born), kind) if (boot, root) == (read_boot_id(), str(paths.ROOT)) else (0, 0, "")


def read_redis_pid() -> int:
    """The process id of the Redis that was started last; 0 when there was none."""
    try:
        return int(paths.REDIS_LOCK.read_text())
    except (FileNotFoundError, ValueError):
        return 0


def end_all(seconds: float) -> list[ProcessStat]:
    """End what is left of the stack as Supervisor would: running tasks finish, up to `seconds`; Redis goes last.

    Returns what could not be ended.
    """
    server = read_redis_pid()
    _end(lambda: [process for process in list_processes() if process.group != server], seconds)
    _end(list_processes, REDIS_SECONDS)
    return list_processes()


def _end(find: Callable[[], list[ProcessStat]], seconds: float) -> None:
    # Programs get TERM and their children do not: they finish their tasks. KILL ends them all.
    _send_signal((process.pid for process in find() if process.pid == process.group), signal.SIGTERM)
    if not wait_until(lambda: not find(), seconds):
        _send_signal((process.pid for process in find()), signal.SIGKILL)
        wait_until(lambda: not find(), KILL_SECONDS)


def _send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether `condition` became true within so many seconds."""
    deadline = monotonic() + seconds
    while not condition():
        if monotonic() > deadline:
            return False
        sleep(LOOK_SECONDS)
    return True
