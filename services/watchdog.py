"""Part of supervisord: kills a node whose heartbeat has stopped, and ends the container when a node cannot start.

Loaded by docker/supervisor/worker.conf as an RPC interface, supervisord's extension point: it costs no process.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from time import time
from typing import Any

from supervisor import events
from supervisor.states import ProcessStates, SupervisorStates

# Words from services/heartbeat.py, which is not imported: supervisord would carry all of Celery in memory.
STUCK = "stuck"

failed_programs: list[str] = []


class Watchdog:
    """Watches the heartbeats of all running programs."""

    def __init__(self, supervisord: Any, directory: str, timeout: str) -> None:
        self._supervisord = supervisord
        self._directory = Path(directory)
        self._timeout = float(timeout)
        self._cpu_seconds: dict[int, int] = {}
        events.subscribe(events.Tick5Event, self.check)
        events.subscribe(events.ProcessStateFatalEvent, self.give_up)

    @property
    def _log(self) -> Any:
        return self._supervisord.options.logger

    def give_up(self, event: Any) -> None:
        """End the container because a program could not be started."""
        name = event.process.config.name
        failed_programs.append(name)
        self._log.critical(f"watchdog: {name} could not be started; its error is above; stopping the container")
        self._supervisord.options.mood = SupervisorStates.SHUTDOWN

    def check(self, event: Any) -> None:
        """Kill every running program that is stuck or frozen; supervisord starts it again."""
        if self._supervisord.options.mood < SupervisorStates.RUNNING:
            return
        for group in self._supervisord.process_groups.values():
            for name, process in group.processes.items():
                if process.state == ProcessStates.RUNNING and (reason := self._fault(name, process.pid)):
                    self._log.critical(f"watchdog: killing {name} (pid {process.pid}): {reason}")
                    # The whole group: a prefork child must not go on beside its replacement.
                    os.killpg(process.pid, signal.SIGKILL)

    def _fault(self, name: str, pid: int) -> str:
        path = self._directory / f"{name}.heartbeat"
        try:
            word, age = path.read_text().strip(), time() - path.stat().st_mtime
        except FileNotFoundError:
            return ""
        if word == STUCK:
            return "its main loop stands still although Redis answers"
        before, now = self._cpu_seconds.get(pid), cpu_ticks(pid)
        self._cpu_seconds[pid] = now
        if age <= self._timeout:
            return ""
        # A task inside a C function can keep every thread of a solo node waiting; it burns CPU, a frozen
        # process does not.
        if before is None or now != before:
            return ""
        return f"no heartbeat for {age:.0f} s and no CPU used"


def cpu_ticks(pid: int) -> int:
    """CPU time that a process has used, in clock ticks; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(fields[11]) + int(fields[12])


def make_watchdog(supervisord: Any, **options: str) -> Watchdog:
    """supervisord's factory: `options` are those of the [rpcinterface:watchdog] section."""
    return Watchdog(supervisord, **options)
