"""A plug-in of supervisord that kills a program whose heartbeat has stopped, and acts when one cannot be started.

docker/supervisor/worker.conf loads it as an RPC interface, which is supervisord's extension point: it needs no process
of its own. It imports nothing of Celery, which supervisord would carry in memory.
"""

import os
import signal
from pathlib import Path
from time import time
from typing import Any

from supervisor import events
from supervisor.states import ProcessStates, SupervisorStates

from services.supervisor.heartbeat_file import STARTING, STUCK, HeartbeatFile
from services.supervisor.proc_stat import read_stat

# As many as supervisord makes for a program that ends within its startsecs: 1 and startretries.
ATTEMPTS = 3

failed_programs: list[str] = []


class Watchdog:
    """Watches the heartbeats of all running programs; supervisord makes it from the section [rpcinterface:watchdog].

    `timeout`: seconds without a heartbeat. `on_fatal`: what happens when a program could not be started; `exit` ends
    supervisord, and the container with it, `retry` tries again each minute.
    """

    def __init__(self, supervisord: Any, directory: str, timeout: str, on_fatal: str) -> None:
        self._supervisord = supervisord
        self._directory = Path(directory)
        self._timeout = float(timeout)
        self._on_fatal = on_fatal
        self._cpu_ticks: dict[int, int] = {}
        self._false_starts: dict[str, int] = {}
        events.subscribe(events.Tick5Event, self.kill_hung)
        events.subscribe(events.Tick60Event, self.retry_fatal)
        events.subscribe(events.ProcessStateExitedEvent, self.count_false_start)
        events.subscribe(events.ProcessStateFatalEvent, self.give_up)

    @property
    def _log(self) -> Any:
        return self._supervisord.options.logger

    def count_false_start(self, event: Any) -> None:
        """Give up on a program that ends before it is ready for the third time, although after its startsecs."""
        name = event.process.config.name
        word, _ = self._read_heartbeat(event.process)
        self._false_starts[name] = self._false_starts.get(name, 0) + 1 if word in ("", STARTING) else 0
        if self._false_starts[name] >= ATTEMPTS and self._on_fatal == "exit":
            self.give_up(event)

    def give_up(self, event: Any) -> None:
        """Log that a program could not be started; with `on_fatal` exit, end supervisord."""
        name = event.process.config.name
        if self._on_fatal == "retry":
            self._log.critical(f"watchdog: {name} could not be started; its log says why; trying again each minute")
            return
        failed_programs.append(name)
        self._log.critical(f"watchdog: {name} could not be started; its error is above; stopping the container")
        self._supervisord.options.mood = SupervisorStates.SHUTDOWN

    def retry_fatal(self, event: Any) -> None:
        """Start the programs again that could not be started before."""
        if self._supervisord.options.mood < SupervisorStates.RUNNING:
            return
        for process in self._list_processes():
            if process.state == ProcessStates.FATAL:
                process.spawn()

    def _list_processes(self) -> list[Any]:
        groups = self._supervisord.process_groups.values()
        return [process for group in groups for process in group.processes.values()]

    def kill_hung(self, event: Any) -> None:
        """Kill every running program that is stuck or frozen; supervisord starts it again."""
        if self._supervisord.options.mood < SupervisorStates.RUNNING:
            return
        for process in self._list_processes():
            if process.state == ProcessStates.RUNNING and (reason := self._find_fault(process)):
                self._log.critical(f"watchdog: killing {process.config.name} (pid {process.pid}): {reason}")
                # The whole group: a prefork child must not go on beside its replacement.
                os.killpg(process.pid, signal.SIGKILL)

    def _read_heartbeat(self, process: Any) -> tuple[str, float]:
        """The word and the time of a program's heartbeat; ("", 0.0) where the process before has written it."""
        word, touched = HeartbeatFile(self._directory, process.config.name).read()
        return (word, touched) if touched >= process.laststart else ("", 0.0)

    def _find_fault(self, process: Any) -> str:
        """Why a program has to be killed; "" when it works."""
        word, touched = self._read_heartbeat(process)
        if not word:
            return ""
        pid, age = process.pid, time() - touched
        if word == STUCK:
            return "its main loop stands still although Redis answers"
        stat = read_stat(pid)
        before, now = self._cpu_ticks.get(pid), stat.cpu if stat else 0
        self._cpu_ticks[pid] = now
        if age <= self._timeout:
            return ""
        # A task inside a C function can keep every thread of a solo node waiting; it uses CPU, which a frozen process
        # does not.
        if before is None or now != before:
            return ""
        return f"no heartbeat for {age:.0f} s and no CPU used"
