"""Part of supervisord: kills a program whose heartbeat has stopped, and acts when one cannot be started.

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

# Words from services/worker/heartbeat.py, which is not imported: supervisord would carry all of Celery in memory.
STARTING = "starting"
STUCK = "stuck"
# As often as supervisord tries a program that ends within its startsecs.
ATTEMPTS = 3

failed_programs: list[str] = []


class Watchdog:
    """Watches the heartbeats of all running programs.

    `on_fatal` says what happens when a program could not be started: `exit` ends supervisord, so that the
    container ends; `retry` tries again each minute.
    """

    def __init__(self, supervisord: Any, directory: str, timeout: str, on_fatal: str) -> None:
        self._supervisord = supervisord
        self._directory = Path(directory)
        self._timeout = float(timeout)
        self._on_fatal = on_fatal
        self._cpu_ticks: dict[int, int] = {}
        self._false_starts: dict[str, int] = {}
        events.subscribe(events.Tick5Event, self.check)
        events.subscribe(events.Tick60Event, self.try_again)
        events.subscribe(events.ProcessStateExitedEvent, self.count_false_start)
        events.subscribe(events.ProcessStateFatalEvent, self.give_up)

    @property
    def _log(self) -> Any:
        return self._supervisord.options.logger

    def count_false_start(self, event: Any) -> None:
        """Give up on a program that ends again and again before it is ready, after its startsecs each time."""
        name = event.process.config.name
        word, _ = self._heartbeat(event.process)
        self._false_starts[name] = self._false_starts.get(name, 0) + 1 if word in ("", STARTING) else 0
        if self._false_starts[name] >= ATTEMPTS and self._on_fatal == "exit":
            self.give_up(event)

    def give_up(self, event: Any) -> None:
        """Say that a program could not be started, and end supervisord if that is what to do."""
        name = event.process.config.name
        if self._on_fatal == "retry":
            self._log.critical(f"watchdog: {name} could not be started; its log says why; trying again each minute")
            return
        failed_programs.append(name)
        self._log.critical(f"watchdog: {name} could not be started; its error is above; stopping the container")
        self._supervisord.options.mood = SupervisorStates.SHUTDOWN

    def try_again(self, event: Any) -> None:
        """Start what could not be started before."""
        if self._supervisord.options.mood < SupervisorStates.RUNNING:
            return
        for process in self._processes():
            if process.state == ProcessStates.FATAL:
                process.spawn()

    def _processes(self) -> list[Any]:
        groups = self._supervisord.process_groups.values()
        return [process for group in groups for process in group.processes.values()]

    def check(self, event: Any) -> None:
        """Kill every running program that is stuck or frozen; supervisord starts it again."""
        if self._supervisord.options.mood < SupervisorStates.RUNNING:
            return
        for process in self._processes():
            if process.state == ProcessStates.RUNNING and (reason := self._fault(process)):
                self._log.critical(f"watchdog: killing {process.config.name} (pid {process.pid}): {reason}")
                # The whole group: a prefork child must not go on beside its replacement.
                os.killpg(process.pid, signal.SIGKILL)

    def _heartbeat(self, process: Any) -> tuple[str, float]:
        """The last word of a program's heartbeat and its time; no word where it is its predecessor's."""
        path = self._directory / f"{process.config.name}.heartbeat"
        try:
            word, touched = path.read_text().strip(), path.stat().st_mtime
        except FileNotFoundError:
            return "", 0.0
        return (word, touched) if touched >= process.laststart else ("", 0.0)

    def _fault(self, process: Any) -> str:
        word, touched = self._heartbeat(process)
        if not word:
            return ""
        pid, age = process.pid, time() - touched
        if word == STUCK:
            return "its main loop stands still although Redis answers"
        before, now = self._cpu_ticks.get(pid), cpu_ticks(pid)
        self._cpu_ticks[pid] = now
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
