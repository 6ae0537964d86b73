"""Processes under test: each with a log of its own, and killed with everything that it started."""

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from services.supervisor.proc_stat import read_stat
from tests.support.fork_server import ForkServer

SHOWN_LOG_LINES = 60
# Everything that a process under test starts inherits this variable, and is found by it when its parent is gone.
MARK = "STALK_TEST_PROCESS"
# A process that is killed is gone within milliseconds; one in the middle of a write to a slow disk, later.
GONE_SECONDS = 60
# Killing takes milliseconds, in which a process may have forked once more.
ROUNDS = 20


class Process:
    """A command that runs in the background and writes to a file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        directory: Path,
        log: Path,
        *,
        errors: Path | None = None,
        fork_server: ForkServer | None = None,
    ) -> None:
        self.name, self._log, self._mark = name, log, uuid4().hex
        own = {**environment, MARK: self._mark}
        # Appending, because supervisord opens its standard output once more for its programs.
        with log.open("ab") as output, (errors or log).open("ab") as errors_to:
            self._popen = (
                fork_server.fork(command, own, directory, output.fileno(), errors_to.fileno())
                if fork_server and fork_server.takes(command, own)
                else subprocess.Popen(
                    command,
                    env=own,
                    cwd=directory,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors_to,
                    start_new_session=True,
                )
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._popen.poll()

    @property
    def alive(self) -> bool:
        return self.code is None

    def log(self) -> str:
        """All that it and its children have written so far."""
        return self._log.read_text(errors="replace")

    def count(self, pattern: str) -> int:
        """How many lines of the log match."""
        return sum(1 for line in self.log().splitlines() if re.search(pattern, line))

    def matches(self, pattern: str) -> list[str]:
        """The pattern's first group in each line of the log that matches."""
        return [match[1] for line in self.log().splitlines() if (match := re.search(pattern, line))]

    def tail(self) -> str:
        """Its state and the last lines of its log, for the report of a failed test."""
        state = "running" if self.alive else f"exited with {self.code}"
        lines = self.log().splitlines()[-SHOWN_LOG_LINES:]
        return "\n".join([f"--- {self.name} (pid {self.pid}, {state})", *lines])

    def signal_family(self, number: signal.Signals) -> None:
        """Send a signal to the process and everything that it started."""
        send_signal(self.family(), number)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, as Docker and Supervisor do."""
        self._popen.send_signal(number)

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)

    def wait(self, timeout: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        return self._popen.wait(timeout)

    def family(self) -> list[int]:
        """The process and everything that it started and that still runs."""
        return families([self])

    def end(self) -> None:
        """Kill it and everything that it started."""
        end_all([self])


def end_all(processes: Sequence[Process]) -> None:
    """Kill these and everything that they started; together, because each search of /proc takes long."""
    for _ in range(ROUNDS):
        pids = families(processes)
        if not pids:
            break
        send_signal(pids, signal.SIGKILL)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
    for process in processes:
        process.wait(GONE_SECONDS)


def send_signal(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to those of these processes that still run."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def families(processes: Sequence[Process]) -> list[int]:
    """These processes and everything that they started, as far as it still runs."""
    wanted = {f"{MARK}={process._mark}".encode() for process in processes}
    # Themselves by their numbers: Redis writes its title over its environment.
    found = {process.pid for process in processes if process.alive}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if not wanted.isdisjoint(path.read_bytes().split(b"\0")):
                found.add(int(path.parent.name))
    return sorted(found)


def command_line(pid: int) -> str:
    """What `ps` shows of a process; empty when it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that still run."""
    stats = (read_stat(int(path.name)) for path in Path("/proc").glob("[0-9]*"))
    return sorted(stat.pid for stat in stats if stat and stat.parent == pid and not stat.ended)
