"""The stack as plain processes under Supervisor, for a host without Docker.

The same launcher, the same definition of a node (docker/supervisor/worker.conf), the same redis.conf and the same
.env as in containers. Everything lives in .stalk/; nothing is installed or written elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import redis

from config import ConfigError, Settings
from stack import paths
from stack.errors import Failure
from stack.local import environment, fork, redis_server, session, supervisor_conf
from stack.paths import ROOT
from stack.settings import settings_or_defaults
from stack.terminal import attached
from stack.units import SHELL, Unit

# The kernel's limit on the path of a socket, less the byte that ends it.
LONGEST_SOCKET_PATH = 107
# Supervisor first makes its socket under a name with its process id, which has up to 7 digits.
SOCKET_SUFFIX = ".4194304"
# Redis' configuration has no way to write these.
UNWRITABLE = re.compile(r'["\\\x00-\x1f]')
# Supervisor reads its configuration and opens its socket within a second; a busy machine may keep it from that.
START_SECONDS = 60
# It answers within milliseconds; one that does not is frozen.
ANSWER_SECONDS = 10
# Once all programs have stopped, Supervisor itself leaves within a second.
LEAVE_SECONDS = 10
LOOK_SECONDS = 0.2
# As docker/healthcheck has it.
OLDEST_HEARTBEAT_SECONDS = 30
NOT_ALIVE = ("starting", "stuck", "")
LOG_LINES = 15
STATES = {"RUNNING": "running", "STARTING": "running", "BACKOFF": "restarting", "STOPPING": "stopping"}
LEFT_OVER = "left over"
RESTING = ("STOPPED", "EXITED", "FATAL")


class Processes:
    """The stack as processes of this host."""

    name = "local"
    where = "processes of this host, their state in .stalk/"

    def __init__(self) -> None:
        # Which processes each program has been since it was last started by us.
        self._lives: defaultdict[str, set[int]] = defaultdict(set)

    def require(self) -> None:
        """Raise Failure when this host cannot run the stack as processes."""
        if not session.BOOT_ID.exists():
            raise Failure("without Docker the stack runs on Linux only, which this is not: start or install Docker")
        longest = f"{paths.SUPERVISOR_SOCKET}{SOCKET_SUFFIX}"
        if (length := len(os.fsencode(longest))) > LONGEST_SOCKET_PATH:
            raise Failure(
                f"the path of the checkout, {ROOT}, is {length - LONGEST_SOCKET_PATH} bytes too long for the Unix "
                f"sockets in it, which may have {LONGEST_SOCKET_PATH}: move the checkout to a shorter path"
            )
        if UNWRITABLE.search(str(ROOT)):
            raise Failure(
                f"the path of the checkout, {str(ROOT)!r}, has a double quote, a backslash or a control character, "
                "which Redis cannot be told: rename it"
            )

    def prepare(self, settings: Settings) -> None:
        """Find Redis.

        Raises Failure when there is none.
        """
        if settings.stack.redis_replicas:
            print(f"Redis is {redis_server.find()[0]}.")

    def start(self, settings: Settings) -> None:
        """Start Supervisor, or tell the one that runs what has changed.

        Raises Failure.
        """
        self._lives.clear()
        for directory in (paths.RUN, paths.LOGS, paths.SCRATCH, paths.REDIS_DATA, paths.FLOWER_DATA):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment.write(settings)
        kind = supervisor_conf.kind(settings)
        if self.supervisor() and session.kind() != kind:
            print("What Supervisor itself runs on has changed; stopping everything for a moment …")
            self.stop()
        paths.SUPERVISOR_CONF.write_text(supervisor_conf.render(settings))
        if self.supervisor():
            with answers() as rpc:
                apply(rpc)
            return
        self._end_leftovers(settings)
        # What was killed has left its files there.
        for path in paths.SCRATCH.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        with open(paths.SUPERVISOR_LOG, "a") as log:
            started = subprocess.Popen(
                [sys.executable, "-m", "services.supervisor.supervise", "--configuration", str(paths.SUPERVISOR_CONF)],
                cwd=ROOT,
                env=environment.of_programs(settings)["all"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A session of its own: closing the terminal ends nothing.
                start_new_session=True,
            )
        session.record(started.pid, kind)
        session.wait(lambda: self.supervisor() or started.poll() is not None, START_SECONDS)
        if not self.supervisor():
            session.end(LEAVE_SECONDS)
            raise Failure(f"Supervisor did not start; its last lines are\n{tail(paths.SUPERVISOR_LOG)}")

    def _end_leftovers(self, settings: Settings) -> None:
        """End what a Supervisor that was killed, or told to stop by somebody else, has not yet ended."""
        if leader := session.leader():
            print("Waiting for a Supervisor that does not answer any more to stop everything …")
            # It may have been told already, or sit behind a socket that somebody has deleted.
            os.kill(leader.pid, signal.SIGTERM)
            session.wait(lambda: not session.leader(), settings.worker.stop_grace_period + session.REDIS_SECONDS)
        if left := session.members():
            print(f"Ending {len(left)} processes that no Supervisor looks after; running tasks finish first …")
            refuse_survivors(session.end(settings.worker.stop_grace_period))

    def use_source(self, asked: bool) -> None:
        """Nothing to do: there is no image, the source is what runs."""

    def check_source(self) -> subprocess.CompletedProcess[str]:
        """Look at the source as the programs that run it will see it, and return what was said of it."""
        paths.SCRATCH.mkdir(mode=0o700, parents=True, exist_ok=True)
        seen = environment.of_programs(settings_or_defaults())
        command = [sys.executable, "-m", "services.commands.check"]
        return subprocess.run(
            command, cwd=ROOT, env=seen["all"] | seen["own"], capture_output=True, text=True, check=False
        )

    def check_new(self, from_source: bool) -> subprocess.CompletedProcess[str]:
        """The same: there is no image, the source is what runs."""
        return self.check_source()

    def restart(self, settings: Settings) -> None:
        """Put changed source to work, warm."""
        self.start(settings)

    def scale(self, settings: Settings) -> None:
        """Run as many workers as the settings say, leaving the others as they are."""
        if not self.supervisor():
            self.start(settings)
            return
        environment.write(settings)
        paths.SUPERVISOR_CONF.write_text(supervisor_conf.render(settings))
        with answers() as rpc:
            apply(rpc, only_count=True)

    def units(self) -> list[Unit]:
        """Every process that Supervisor knows, or what is left of one that was killed."""
        if self.supervisor():
            with answers() as rpc:
                settings = settings_or_defaults()
                return [self._unit(process, settings) for process in rpc.getAllProcessInfo()]
        if left := session.members():
            why = "Supervisor is stopping them" if session.leader() else "Supervisor was killed: make up, or make stop"
            return [Unit(LEFT_OVER, LEFT_OVER, "running", "unhealthy", f"{len(left)} processes; {why}", id="")]
        return []

    def _unit(self, process: dict[str, Any], settings: Settings) -> Unit:
        """A process as Supervisor describes it."""
        name, pid = str(process["name"]), int(process["pid"])
        state = STATES.get(str(process["statename"]), "exited")
        running = state == "running"
        told = redis_health if name == "redis" else heartbeat_health
        if pid:
            self._lives[name].add(pid)
        ended = len(self._lives[name]) - running
        return Unit(
            name=name,
            service="worker" if name.startswith("worker") else name,
            state=state,
            health=told(process, settings) if running else "",
            # Supervisor describes a process only when it has run for `startsecs`.
            detail=str(process["description"]) or f"pid {pid}, uptime {seconds_since_start(pid):.0f} s",
            id=name,
            # Supervisor gives up what ends at once, and would start for ever what ends a little later.
            failed=process["statename"] == "FATAL" or ended > 1,
        )

    def last_lines(self, unit: Unit) -> str:
        """The end of a process's log."""
        return tail(paths.LOGS / f"{unit.name}.log")

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m services …` beside the stack, with its settings, and return what it printed."""
        return fork.answer(arguments, self._beside())

    def show(self, *arguments: str) -> int:
        """Run `python -m services …` on the terminal; its exit code."""
        return fork.show(arguments, self._beside())

    def shell(self) -> int:
        """Python with the app and its tasks, on the terminal; its exit code."""
        return attached([sys.executable, *SHELL], ROOT, self._beside())

    def _beside(self) -> dict[str, str]:
        if not self.supervisor():
            raise Failure("the stack is not running: start it with 'make up'")
        try:
            return environment.beside(settings_or_defaults())
        except ConfigError as error:
            raise Failure("; ".join(error.problems)) from None

    def logs(self, services: tuple[str, ...]) -> int:
        """Follow the logs, of all services or of some."""
        files = [
            str(file)
            for file in sorted(paths.LOGS.glob("*.log"))
            if not services or re.sub(r"\d+-node\d+$", "", file.stem) in services or file.stem in services
        ]
        if not files and services:
            raise Failure(f"SERVICE: found {', '.join(services)!r}; there are redis, worker, beat and flower")
        if not files:
            raise Failure(f"there is no log in {paths.LOGS}: run 'make up'")
        return attached(["tail", "-n", "100", "-F", *files], ROOT)

    def stop_application(self, settings: Settings) -> None:
        """Stop beat and all workers, at the same time; running tasks finish first."""
        if self.supervisor():
            with answers() as rpc:
                stop_groups(rpc, groups(rpc) - {"redis", "flower"})
        else:
            self._end_leftovers(settings)

    def stop(self) -> None:
        """Stop what still runs, Redis last, and Supervisor.

        Raises Failure when a process outlives it.
        """
        if self.supervisor():
            with answers() as rpc:
                stop_groups(rpc, groups(rpc) - {"redis"})
                stop_groups(rpc, {"redis"})
                rpc.shutdown()
            session.wait(lambda: not session.members(), LEAVE_SECONDS)
        # Supervisor may have been killed, and a task may have started something that goes on.
        self._end_leftovers(settings_or_defaults())
        paths.SESSION.unlink(missing_ok=True)

    def remove(self) -> None:
        """Stop everything and remove what is only there while it runs."""
        self.stop()
        for directory in (paths.RUN, paths.SCRATCH):
            shutil.rmtree(directory, ignore_errors=True)

    def delete_data(self) -> None:
        """Stop everything and delete the data."""
        self.remove()
        for directory in (paths.REDIS_DATA, paths.FLOWER_DATA, paths.LOGS):
            shutil.rmtree(directory, ignore_errors=True)

    def publishes(self, port: int) -> bool:
        """Whether our own Flower is what holds a port; one that is left over ends before the next starts."""
        holds = any(unit.service in ("flower", LEFT_OVER) and unit.state == "running" for unit in self.units())
        return holds and supervisor_conf.publishes(port)

    def supervisor(self) -> int:
        """The process id of the Supervisor that runs this checkout's stack; 0 when none does."""
        try:
            pid = int(supervisor_rpc().getPID())
        except (OSError, HTTPException, xmlrpc.client.Error):
            return 0
        if not session.leader():
            # Somebody has deleted the record, or killed the command that was about to write it.
            session.record(pid, "unknown")
        return pid


class _Connection(HTTPConnection):
    """HTTP over Supervisor's socket."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ANSWER_SECONDS)
        self.sock.connect(str(paths.SUPERVISOR_SOCKET))


class _Transport(xmlrpc.client.Transport):
    def make_connection(self, host: Any) -> HTTPConnection:
        # The login of the URL becomes a header here.
        _, self._extra_headers, _ = self.get_host_info(host)
        return _Connection("localhost")


def supervisor_rpc() -> Any:
    """Supervisor's own commands, http://supervisord.org/api.html."""
    return xmlrpc.client.ServerProxy("http://stalk:stalk@localhost", transport=_Transport()).supervisor


@contextmanager
def answers() -> Iterator[Any]:
    """Supervisor's commands; Failure when it does not answer, or refuses one."""
    try:
        yield supervisor_rpc()
    except (OSError, HTTPException, xmlrpc.client.Error) as error:
        why = error.faultString if isinstance(error, xmlrpc.client.Fault) else error
        raise Failure(f"Supervisor failed ({why}); {paths.SUPERVISOR_LOG} may say more") from None


def groups(rpc: Any) -> set[str]:
    """The programs that Supervisor knows: redis, beat, flower, and each worker with its nodes."""
    return {process["group"] for process in rpc.getAllProcessInfo()}


def apply(rpc: Any, only_count: bool = False) -> None:
    """Replace what has changed, warmly and at the same time; end what is gone, start what is new or does not run.

    With `only_count`, what has changed goes on as it is.
    """
    added, changed, removed = (set(names) for names in rpc.reloadConfig()[0])
    if only_count:
        changed = set()
    ending = changed | removed
    if "redis" in ending:
        # Workers hand back to Redis, so it goes last and comes first.
        stop_groups(rpc, ending - {"redis"})
        replace_groups(rpc, {"redis"}, changed)
    replace_groups(rpc, ending - {"redis"}, changed)
    for name in sorted(added, key=lambda name: name != "redis"):
        rpc.addProcessGroup(name)
    for process in rpc.getAllProcessInfo():
        if process["statename"] in RESTING:
            rpc.startProcess(f"{process['group']}:{process['name']}", False)


def replace_groups(rpc: Any, names: set[str], again: set[str]) -> None:
    """Stop groups at the same time; each that is to run again does so as soon as it has stopped."""
    tell_to_stop(rpc, names)
    left = set(names)
    while left:
        for name in left - working(rpc):
            rpc.removeProcessGroup(name)
            if name in again:
                rpc.addProcessGroup(name)
            left.remove(name)
        if left:
            time.sleep(LOOK_SECONDS)


def stop_groups(rpc: Any, names: set[str]) -> None:
    """Stop groups at the same time and wait for all; Supervisor kills what takes too long."""
    tell_to_stop(rpc, names)
    while names & working(rpc):
        time.sleep(LOOK_SECONDS)


def tell_to_stop(rpc: Any, names: set[str]) -> None:
    """Begin to stop groups."""
    for name in names & groups(rpc):
        rpc.stopProcessGroup(name, False)


def working(rpc: Any) -> set[str]:
    """Groups in which a process runs, or is about to."""
    return {process["group"] for process in rpc.getAllProcessInfo() if process["statename"] not in RESTING}


def heartbeat_health(process: dict[str, Any], _: Settings) -> str:
    """What docker/healthcheck says of a node, beat or Flower."""
    path = paths.RUN / f"{process['name']}.heartbeat"
    # In this order: whoever is kept from going on between two of them says "starting", and never takes the word of
    # its predecessor for its own.
    running = seconds_since_start(process["pid"])
    try:
        age, word = time.time() - path.stat().st_mtime, path.read_text().strip()
    except FileNotFoundError:
        return "starting"
    if age > running:
        # Its predecessor's.
        return "starting"
    if word in NOT_ALIVE:
        return "starting" if word == "starting" else "unhealthy"
    return "healthy" if age <= OLDEST_HEARTBEAT_SECONDS else "unhealthy"


def seconds_since_start(pid: int) -> float:
    """How long ago a process was started; 0 when it is gone."""
    process = session.look(pid)
    if not process:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - process.born / os.sysconf("SC_CLK_TCK")


def redis_health(_: dict[str, Any], settings: Settings) -> str:
    """What docker/redis/healthcheck says: does Redis take commands, and did its last write to its file succeed?"""
    password = settings.broker.password.get_secret_value()
    try:
        with redis.Redis(
            unix_socket_path=str(paths.REDIS_SOCKET), password=password, socket_timeout=ANSWER_SECONDS
        ) as client:
            told = client.info("persistence")
    except (redis.RedisError, OSError):
        return "starting"
    if told.get("loading"):
        return "starting"
    return "healthy" if told.get("aof_last_write_status") == "ok" else "unhealthy"


def refuse_survivors(left: list[session.Process]) -> None:
    """Raise Failure when a process of the stack cannot be ended."""
    if left:
        pids = ", ".join(str(process.pid) for process in left)
        raise Failure(f"processes {pids} of the stack cannot be ended: look at them with 'ps -p {pids}'")


def tail(path: Path) -> str:
    """The last lines of a file."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-LOG_LINES:])
    except FileNotFoundError:
        return f"({path} is not there)"
