"""The runtime of plain processes under Supervisor, for a host without Docker.

The same launcher, the same definition of a node (docker/supervisor/worker.conf), the same redis.conf and the same
.env as in containers. Everything lives in .stalk/; nothing is installed or written elsewhere.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from config import ConfigError, Settings
from config.environment import replace_environment
from stack import paths
from stack.env_file import load_or_defaults, replace_file
from stack.errors import CommandError
from stack.local import environment, redis_server, session, supervisor_conf
from stack.local.health import ask_redis_health, measure_age, read_heartbeat_health
from stack.local.supervisor import apply_configuration, find_supervisor, list_groups, open_rpc, stop_groups
from stack.paths import ROOT
from stack.runtime import SERVICES, SHELL, Runtime, Unit
from stack.terminal import run, run_attached

# The kernel's limit on the path of a socket, less the byte that ends it.
LONGEST_SOCKET_PATH = 107
# Supervisor first makes its socket under a name with its process id, which has up to 7 digits.
SOCKET_SUFFIX = ".4194304"
# Redis' configuration has no way to write these.
UNWRITABLE = re.compile(r'["\\\x00-\x1f]')
# Supervisor reads its configuration and opens its socket within a second; a busy machine may keep it from that.
START_SECONDS = 60
# Once all programs have stopped, Supervisor itself leaves within a second.
LEAVE_SECONDS = 10
LOG_LINES = 15
STATES = {"RUNNING": "running", "STARTING": "running", "BACKOFF": "restarting", "STOPPING": "stopping"}
LEFT_OVER = "left over"


class Processes(Runtime):
    """The stack as processes of this host."""

    name = "local"
    where = "processes of this host, their state in .stalk/"

    def __init__(self) -> None:
        # Program → the process ids that it has had since we last started it.
        self._pids: defaultdict[str, set[int]] = defaultdict(set)

    def require(self) -> None:
        if not session.BOOT_ID.exists():
            raise CommandError(
                "without Docker the stack runs on Linux only, which this is not: start or install Docker"
            )
        longest = f"{paths.SUPERVISOR_SOCKET}{SOCKET_SUFFIX}"
        if (length := len(os.fsencode(longest))) > LONGEST_SOCKET_PATH:
            raise CommandError(
                f"the path of the checkout, {ROOT}, is {length - LONGEST_SOCKET_PATH} bytes too long for the Unix "
                f"sockets in it, which may have {LONGEST_SOCKET_PATH}: move the checkout to a shorter path"
            )
        if UNWRITABLE.search(str(ROOT)):
            raise CommandError(
                f"the path of the checkout, {str(ROOT)!r}, has a double quote, a backslash or a control character, "
                "which redis.conf cannot have: rename it"
            )

    def count_cpus(self) -> int:
        return os.cpu_count() or 1

    def prepare(self, settings: Settings) -> None:
        """Find a Redis server."""
        if settings.stack.redis_replicas:
            print(f"Redis is {redis_server.find()[0]}.")

    def start(self, settings: Settings, from_source: bool = False) -> None:
        """Start Supervisor, or have the one that runs read its configuration anew."""
        self._pids.clear()
        for directory in (paths.RUN, paths.LOGS, paths.SCRATCH, paths.REDIS_DATA, paths.FLOWER_DATA):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        kind = supervisor_conf.hash_own_parts(settings)
        if find_supervisor() and session.read_kind() != kind:
            print("What Supervisor itself runs on has changed; stopping everything for a moment …")
            self.stop()
        _write_configuration(settings)
        if find_supervisor():
            with open_rpc() as supervisor:
                apply_configuration(supervisor)
            return
        _end_leftovers(settings)
        # Killed processes leave their files there.
        for path in paths.SCRATCH.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        _start_supervisor(settings, kind)

    def serves_flower_at(self, port: int) -> bool:
        # What is left over of a killed Supervisor ends before the next one starts.
        running = any(unit.service in ("flower", LEFT_OVER) and unit.state == "running" for unit in self.list_units())
        return running and supervisor_conf.has_flower_port(port)

    def check_source(self) -> subprocess.CompletedProcess[str]:
        paths.SCRATCH.mkdir(mode=0o700, parents=True, exist_ok=True)
        variables = environment.collect_for_programs(load_or_defaults())
        given = variables["all"] | variables["own"]
        return run(sys.executable, "-m", "services.commands.check", check=False, environment=given)

    def scale(self, settings: Settings) -> None:
        if find_supervisor():
            _write_configuration(settings)
            with open_rpc() as supervisor:
                apply_configuration(supervisor, only_count=True)
        else:
            self.start(settings)

    def list_units(self) -> list[Unit]:
        """Every process that Supervisor knows; where it was killed, one unit for all that it has left."""
        if find_supervisor():
            with open_rpc() as supervisor:
                settings = load_or_defaults()
                return [self._make_unit(process, settings) for process in supervisor.getAllProcessInfo()]
        if left := session.list_processes():
            leader = session.find_leader()
            why = "Supervisor is stopping them" if leader else "Supervisor was killed: make up, or make stop"
            return [Unit(LEFT_OVER, LEFT_OVER, "running", "unhealthy", f"{len(left)} processes; {why}")]
        return []

    def _make_unit(self, process: dict[str, Any], settings: Settings) -> Unit:
        """The unit of a process that Supervisor describes."""
        name, pid = str(process["name"]), int(process["pid"])
        state = STATES.get(str(process["statename"]), "exited")
        running = state == "running"
        if pid:
            self._pids[name].add(pid)
        ended = len(self._pids[name]) - running
        if running:
            health = ask_redis_health(settings) if name == "redis" else read_heartbeat_health(name, pid)
        return Unit(
            name=name,
            service="worker" if name.startswith("worker") else name,
            state=state,
            health=health if running else "",
            # Supervisor describes a process only when it has run for `startsecs`.
            detail=str(process["description"]) or f"pid {pid}, uptime {measure_age(pid):.0f} s",
            # Supervisor gives up a program that ends at once, and restarts for ever one that ends a little later.
            failed=process["statename"] == "FATAL" or ended > 1,
        )

    def read_last_lines(self, unit: Unit) -> str:
        return _read_end(paths.LOGS / f"{unit.name}.log")

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(sys.executable, *SERVICES, *arguments, check=False, environment=_collect_variables())

    def show(self, *arguments: str) -> int:
        """In this process: a new interpreter would need 0.3 s to import what this one has imported already."""
        variables = _collect_variables()
        if environment.needs_new_interpreter(variables):
            return run_attached([sys.executable, *SERVICES, *arguments], ROOT, variables)
        replace_environment(variables)
        from services.__main__ import main

        sys.exit(main(arguments, prog_name="python -m services"))

    def run_shell(self) -> int:
        return run_attached([sys.executable, *SHELL], ROOT, _collect_variables())

    def follow_logs(self, services: tuple[str, ...]) -> int:
        files = [
            str(file)
            for file in sorted(paths.LOGS.glob("*.log"))
            if not services or re.sub(r"\d+-node\d+$", "", file.stem) in services or file.stem in services
        ]
        if not files and services:
            raise CommandError(f"SERVICE: found {', '.join(services)!r}; there are redis, worker, beat and flower")
        if not files:
            raise CommandError(f"there is no log in {paths.LOGS}: run 'make up'")
        return run_attached(["tail", "-n", "100", "-F", *files], ROOT)

    def stop_application(self, settings: Settings) -> None:
        if find_supervisor():
            with open_rpc() as supervisor:
                stop_groups(supervisor, list_groups(supervisor) - {"redis", "flower"})
        else:
            _end_leftovers(settings)

    def stop(self) -> None:
        """Stop everything, Redis last, and Supervisor."""
        if find_supervisor():
            with open_rpc() as supervisor:
                stop_groups(supervisor, list_groups(supervisor) - {"redis"})
                stop_groups(supervisor, {"redis"})
                supervisor.shutdown()
            session.wait_until(lambda: not session.list_processes(), LEAVE_SECONDS)
        # Supervisor may have been killed, and a task may have started a process that goes on.
        _end_leftovers(load_or_defaults())
        paths.SESSION.unlink(missing_ok=True)

    def remove(self, with_data: bool) -> None:
        self.stop()
        data = (paths.REDIS_DATA, paths.FLOWER_DATA, paths.LOGS) if with_data else ()
        for directory in (paths.RUN, paths.SCRATCH, *data):
            shutil.rmtree(directory, ignore_errors=True)


def _write_configuration(settings: Settings) -> None:
    """Write what Supervisor and its programs read: their environment variables and their commands."""
    replace_file(paths.ENVIRONMENT, json.dumps(environment.collect_for_programs(settings)))
    paths.SUPERVISOR_CONF.write_text(supervisor_conf.render(settings))


def _start_supervisor(settings: Settings, kind: str) -> None:
    """Start Supervisor, which starts the rest; CommandError where it ends, or does not answer in time."""
    with open(paths.SUPERVISOR_LOG, "a") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", "services.supervisor.supervise", "--configuration", str(paths.SUPERVISOR_CONF)],
            cwd=ROOT,
            env=environment.collect_for_programs(settings)["all"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # A session of its own: closing the terminal ends nothing.
            start_new_session=True,
        )
    session.record(started.pid, kind)
    session.wait_until(lambda: find_supervisor() or started.poll() is not None, START_SECONDS)
    if not find_supervisor():
        session.end_all(LEAVE_SECONDS)
        raise CommandError(f"Supervisor did not start; its last lines are\n{_read_end(paths.SUPERVISOR_LOG)}")


def _end_leftovers(settings: Settings) -> None:
    """End what is left of a Supervisor that was killed or is stopping; CommandError for what cannot be ended."""
    if leader := session.find_leader():
        print("Waiting for a Supervisor that does not answer any more to stop everything …")
        # Perhaps it is stopping already, perhaps somebody has deleted its socket.
        os.kill(leader.pid, signal.SIGTERM)
        session.wait_until(lambda: not session.find_leader(), settings.worker.stop_grace_period + session.REDIS_SECONDS)
    if left := session.list_processes():
        print(f"Ending {len(left)} processes that no Supervisor looks after; running tasks finish first …")
        if survivors := session.end_all(settings.worker.stop_grace_period):
            pids = ", ".join(str(process.pid) for process in survivors)
            raise CommandError(f"processes {pids} of the stack cannot be ended: look at them with 'ps -p {pids}'")


def _collect_variables() -> dict[str, str]:
    """The environment variables of a command beside the stack; CommandError where the stack does not run."""
    if not find_supervisor():
        raise CommandError("the stack is not running: start it with 'make up'")
    try:
        return environment.collect_for_commands(load_or_defaults())
    except ConfigError as error:
        raise CommandError("; ".join(error.problems)) from None


def _read_end(path: Path) -> str:
    """The last lines of a file."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-LOG_LINES:])
    except FileNotFoundError:
        return f"({path} is not there)"
