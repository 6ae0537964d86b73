"""The stack as plain processes under Supervisor, for a host without Docker.

The same launcher, the same definition of a node (docker/supervisor/worker.conf), the same redis.conf and the same
.env as in containers. Everything lives in .stalk/; nothing is installed or written elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import redis
from supervisor.xmlrpc import SupervisorTransport

import config
from config import Settings, child_environment
from config.environment import read_env_file
from config.settings import BrokerSettings, ResultSettings, variables
from services.connections import connect
from services.launch import supervisor_values
from stack import places, redis_server
from stack.docker import ROOT
from stack.failure import Failure
from stack.units import Unit

TEMPLATES = ROOT / "docker" / "supervisor"
NODES = "[program:node]"
CONTAINER_LOG = "stdout_logfile=/dev/stdout\nstdout_logfile_maxbytes=0\n"
# Three files of 10 MB each, as compose.yaml has it.
PROCESS_LOG = "stdout_logfile={log}\nstdout_logfile_maxbytes=10MB\nstdout_logfile_backups=2\n"
# The kernel's limit on the path of a socket, less the byte that ends it.
LONGEST_SOCKET_PATH = 107
# Supervisor reads its configuration and opens its socket within a second.
START_SECONDS = 15
# Once all programs have stopped, Supervisor itself leaves within a second.
LEAVE_SECONDS = 10
LOOK_SECONDS = 0.2
# As docker/healthcheck has it.
OLDEST_HEARTBEAT_SECONDS = 30
NOT_ALIVE = ("starting", "stuck", "")
LOG_LINES = 15
STATES = {"RUNNING": "running", "STARTING": "running", "BACKOFF": "restarting", "STOPPING": "stopping"}


class Processes:
    """The stack as processes of this host."""

    name = "local"
    where = "processes of this host, their state in .stalk/"

    def require(self) -> None:
        """Raise Failure when this host cannot run the stack as processes."""
        if len(os.fsencode(places.SUPERVISOR_SOCKET)) > LONGEST_SOCKET_PATH:
            raise Failure(
                f"{places.SUPERVISOR_SOCKET} is longer than the {LONGEST_SOCKET_PATH} bytes that a Unix socket may "
                "have: move the checkout to a shorter path"
            )

    def prepare(self, settings: Settings) -> None:
        """Find Redis and make the directories.

        Raises Failure when there is no Redis.
        """
        if settings.stack.redis_replicas:
            print(f"Redis is {redis_server.find()}.")
        for directory in (places.STATE, places.RUN, places.LOGS, places.REDIS_DATA, places.FLOWER_DATA):
            directory.mkdir(mode=0o700, exist_ok=True)

    def start(self, settings: Settings) -> None:
        """Start Supervisor, or tell the one that runs what has changed.

        Raises Failure.
        """
        places.SUPERVISOR_CONF.write_text(render(settings))
        if self.supervisor():
            apply(self._rpc())
            return
        for stale in places.RUN.glob("*.heartbeat"):
            stale.unlink()
        with open(places.LOGS / "supervisord.log", "a") as log:
            started = subprocess.Popen(
                [sys.executable, "-m", "services.supervise", "--configuration", str(places.SUPERVISOR_CONF)],
                cwd=ROOT,
                env=environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A session of its own: closing the terminal ends nothing.
                start_new_session=True,
            )
        wait(lambda: self.supervisor() or started.poll() is not None, START_SECONDS)
        if not self.supervisor():
            raise Failure(f"Supervisor did not start; its last lines are\n{tail(places.LOGS / 'supervisord.log')}")

    def scale(self, settings: Settings) -> None:
        """Run as many workers as the settings say."""
        self.start(settings)

    def units(self) -> list[Unit]:
        """Every process that Supervisor knows."""
        if not self.supervisor():
            return []
        return [self._unit(process) for process in self._rpc().supervisor.getAllProcessInfo()]

    def _unit(self, process: dict[str, Any]) -> Unit:
        name, state = str(process["name"]), str(process["statename"])
        shown = STATES.get(state, "exited")
        health = self._health(name) if shown == "running" else ""
        service = "worker" if name.startswith("worker") else name
        detail = str(process["description"])
        return Unit(name, service, shown, health, detail, id=name, failed=state == "FATAL")

    def _health(self, name: str) -> str:
        if name == "redis":
            return "healthy" if redis_answers() else "starting"
        path = places.RUN / f"{name}.heartbeat"
        try:
            word, age = path.read_text().strip(), time() - path.stat().st_mtime
        except FileNotFoundError:
            return "starting"
        if word in NOT_ALIVE:
            return "starting" if word == "starting" else "unhealthy"
        return "healthy" if age <= OLDEST_HEARTBEAT_SECONDS else "unhealthy"

    def last_lines(self, unit: Unit) -> str:
        """The end of a process's log."""
        return tail(places.LOGS / f"{unit.name}.log")

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a Python program beside the stack, with its settings, and return what it printed."""
        return subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=self._beside(), capture_output=True, text=True, check=False
        )

    def execute_shown(self, *command: str, terminal: bool = False) -> int:
        """The same on the terminal; its exit code."""
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=self._beside(), check=False).returncode

    def _beside(self) -> dict[str, str]:
        if not self.supervisor():
            raise Failure("the stack is not running: start it with 'make up'")
        return environment(config.load())

    def logs(self, services: tuple[str, ...]) -> int:
        """Follow the logs, of all services or of some."""
        chosen = services or ("",)
        files = sorted(str(file) for name in chosen for file in places.LOGS.glob(f"{name}*.log"))
        if not files:
            raise Failure(f"there is no log in {places.LOGS} for {', '.join(services) or 'anything'}: run 'make up'")
        return subprocess.run(["tail", "-n", "100", "-F", *files], check=False).returncode

    def stop_application(self, settings: Settings) -> None:
        """Stop beat and all workers, at the same time; running tasks finish first."""
        rpc = self._rpc()
        groups = {process["group"] for process in rpc.supervisor.getAllProcessInfo()} - {"redis", "flower"}
        stop_groups(rpc, groups)

    def stop(self) -> None:
        """Stop what still runs, Redis last, and Supervisor.

        Raises Failure when a process outlives it.
        """
        pid = self.supervisor()
        if not pid:
            return
        session = members(pid)
        os.kill(pid, signal.SIGTERM)
        # Supervisor bounds each program's stop by itself, the longest being a worker's grace period.
        limit = config.load().worker.stop_grace_period + LEAVE_SECONDS
        if not wait(lambda: not any(alive(member) for member in session), limit):
            left = [member for member in session if alive(member)]
            raise Failure(f"processes {', '.join(map(str, left))} did not end within {limit} s: look at them with ps")

    def remove(self) -> None:
        """Stop everything and remove what is only there while it runs."""
        self.stop()
        shutil.rmtree(places.RUN, ignore_errors=True)

    def delete_data(self) -> None:
        """Stop everything and delete the data."""
        self.remove()
        for directory in (places.REDIS_DATA, places.FLOWER_DATA, places.LOGS):
            shutil.rmtree(directory, ignore_errors=True)

    def publishes(self, port: int) -> bool:
        """Whether our own Flower may be what holds a port."""
        return any(unit.service == "flower" and unit.state == "running" for unit in self.units())

    def supervisor(self) -> int:
        """The process id of the Supervisor that runs this checkout's stack; 0 when none does."""
        try:
            return int(self._rpc().supervisor.getPID())
        except (OSError, HTTPException, Fault):
            return 0

    def _rpc(self) -> Any:
        return ServerProxy(
            "http://127.0.0.1", transport=SupervisorTransport("stalk", "stalk", f"unix://{places.SUPERVISOR_SOCKET}")
        )


def environment(settings: Settings) -> dict[str, str]:
    """What every process of the stack sees: this shell's environment and where the stack's own Redis is."""
    values = {"STALK_RUN_DIR": str(places.RUN), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if settings.stack.redis_replicas:
        urls = (
            ("CELERY_BROKER_URL", settings.broker, BrokerSettings),
            ("CELERY_RESULT_BACKEND", settings.results, ResultSettings),
        )
        for name, group, kind in urls:
            # The default names the redis container; here it is a socket.
            if group.url == kind.model_fields["url"].default:
                values[name] = f"redis+socket://{places.REDIS_SOCKET}?virtual_host={group.url.database}"
    return child_environment(variables(), **values)


def render(settings: Settings) -> str:
    """Supervisor's configuration: the nodes of worker.conf once for each worker, and local.conf."""
    head, nodes = (TEMPLATES / "worker.conf").read_text().split(NODES)
    programs = (TEMPLATES / "local.conf").read_text()
    if not settings.stack.redis_replicas:
        programs = re.sub(r"\[program:redis\].*?(?=\n\[|\Z)", "", programs, flags=re.DOTALL)
    workers = [worker_section(nodes, number) for number in range(1, settings.stack.workers + 1)]
    text = "\n".join([head, *workers, programs])
    return with_fingerprints(bind(text, places_and_settings(settings)), settings)


def worker_section(nodes: str, number: int) -> str:
    """worker.conf's nodes as those of worker `number`."""
    name = f"worker{number}"
    renamed = nodes.replace("node%(process_num)d", f"{name}-node%(process_num)d")
    logged = renamed.replace(
        CONTAINER_LOG, PROCESS_LOG.format(log=f"%(ENV_STALK_LOG_DIR)s/{name}-node%(process_num)d.log")
    )
    return f"[program:{name}]\ndirectory=%(ENV_STALK_ROOT)s\n{logged.lstrip()}"


def places_and_settings(settings: Settings) -> dict[str, str]:
    """What stands in the ENV_ places of both files."""
    return supervisor_values(settings) | {
        "STALK_RUN_DIR": str(places.RUN),
        "STALK_LOG_DIR": str(places.LOGS),
        "STALK_ROOT": str(ROOT),
        "STALK_PYTHON": sys.executable,
        "STALK_NODE_COMMAND": f"{sys.executable} -m services.launch node",
        # A container ends and is started again by Docker; here nobody would do that.
        "STALK_ON_FATAL": "retry",
        "STALK_FLOWER_ADDRESS": settings.flower.bind.strip("[]"),
        "STALK_FLOWER_PORT": str(settings.flower.port),
        "STALK_FLOWER_DATABASE": str(places.FLOWER_DATA / "flower.db"),
    }


def bind(text: str, values: dict[str, str]) -> str:
    """`text` with every %(ENV_NAME)s replaced; Supervisor sees values, so that it notices when one changes."""
    return re.sub(r"%\(ENV_(\w+)\)s", lambda match: values[match[1]].replace("%", "%%"), text)


def with_fingerprints(text: str, settings: Settings) -> str:
    """Every program with a hash of what it runs on, so that a change of code or .env restarts it."""
    # How many workers there are is no reason to restart those that run.
    chosen = {name: value for name, value in read_env_file(ROOT / ".env").items() if name != "WORKERS"}
    parts = (ROOT / "config", ROOT / "services", ROOT / "requirements", ROOT / ".env.tasks")
    code = fingerprint(*parts, extra=repr(sorted(chosen.items())))
    own = fingerprint(ROOT / "docker" / "redis", extra=settings.stack.redis_maxmemory + secret_hash(settings))

    def add(match: re.Match[str]) -> str:
        return f'{match[0]}\nenvironment=STALK_FINGERPRINT="{own if match[1] == "redis" else code}"'

    return re.sub(r"^\[program:(\w+)\]$", add, text, flags=re.MULTILINE)


def secret_hash(settings: Settings) -> str:
    """Changes with the password and does not tell it."""
    return hashlib.sha256(settings.broker.password.get_secret_value().encode()).hexdigest()


def fingerprint(*paths: Path, extra: str = "") -> str:
    """A hash of the content of files and directories."""
    digest = hashlib.sha256(extra.encode())
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def apply(rpc: Any) -> None:
    """Stop what has changed or is gone, warmly and at the same time, and start what is new."""
    added, changed, removed = rpc.supervisor.reloadConfig()[0]
    ending = set(changed) | set(removed)
    # Workers hand back to Redis, so it goes last and comes first.
    stop_groups(rpc, ending - {"redis"})
    stop_groups(rpc, ending & {"redis"})
    for name in ending:
        rpc.supervisor.removeProcessGroup(name)
    for name in sorted({*changed, *added}, key=lambda name: name != "redis"):
        rpc.supervisor.addProcessGroup(name)


def stop_groups(rpc: Any, groups: set[str]) -> None:
    """Stop groups of processes at the same time and wait for all; Supervisor kills what takes too long."""
    for name in groups:
        rpc.supervisor.stopProcessGroup(name, False)
    while any(
        process["group"] in groups and process["statename"] not in ("STOPPED", "EXITED", "FATAL")
        for process in rpc.supervisor.getAllProcessInfo()
    ):
        sleep(LOOK_SECONDS)


def redis_answers() -> bool:
    """Whether the stack's own Redis takes commands."""
    settings = config.load(environment(config.load()), ROOT / ".env")
    try:
        with connect(settings.broker_url, settings) as client:
            return bool(client.ping())
    except (redis.RedisError, OSError):
        return False


def members(session: int) -> list[int]:
    """Every process of a session: what Supervisor started, and what that started."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if session_of(pid) == session]


def session_of(pid: int) -> int:
    """The session of a process; 0 when it is gone or nobody waits for it any more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] == "Z" else int(fields[3])


def alive(pid: int) -> bool:
    """Whether a process runs."""
    return session_of(pid) != 0


def wait(condition: Callable[[], object], seconds: float) -> bool:
    """Whether `condition` became true within so many seconds."""
    deadline = monotonic() + seconds
    while not condition():
        if monotonic() > deadline:
            return False
        sleep(LOOK_SECONDS)
    return True


def tail(path: Path) -> str:
    """The last lines of a file."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-LOG_LINES:])
    except FileNotFoundError:
        return f"({path} is not there)"
