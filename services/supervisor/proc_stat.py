"""What the kernel tells of a process in /proc/<pid>/stat, see proc(5). Only the standard library, for supervisord."""

from pathlib import Path
from typing import NamedTuple


class ProcessStat(NamedTuple):
    """One process at one moment; times are in clock ticks, `os.sysconf("SC_CLK_TCK")` a second."""

    pid: int
    # R, S, D, T …; Z has ended, and its parent has not yet asked for its exit code.
    state: str
    parent: int
    group: int
    session: int
    cpu: int
    # Of its children that have ended.
    children_cpu: int
    # Since the machine was started: with the pid this names a process for ever, whatever becomes of the clock.
    born: int

    @property
    def ended(self) -> bool:
        """Whether only its entry is left."""
        return self.state in ("Z", "X")


def read_stat(pid: int) -> ProcessStat | None:
    """A process; None when it is gone."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return None


def parse_stat(text: str) -> ProcessStat:
    """A line of /proc/<pid>/stat."""
    # The name before the state may hold spaces and brackets.
    pid, (state, *numbers) = text.partition(" ")[0], text.rpartition(")")[2].split()
    parent, group, session, *rest = map(int, numbers)
    # The state is the third field of the line; utime, stime, cutime and cstime are the fields 14 to 17, starttime 22.
    user, system, children_user, children_system = rest[7:11]
    return ProcessStat(
        int(pid), state, parent, group, session, user + system, children_user + children_system, rest[15]
    )
