"""python -m services.launch worker | beat | flower: the one way from settings to a running process.

Checks the configuration and Redis, then becomes Supervisor, Celery or Flower with exactly what each may see.
Exit codes: 2 the configuration has mistakes, 3 Redis was refused; otherwise what the process ends with.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from config import ConfigError, Settings, child_environment, load
from config.settings import GROUPS, HAND_BACK_SECONDS, fields
from services import preflight
from services.beat import TICK_SECONDS

CONFIGURATION_EXIT_CODE = 2
SUPERVISOR_CONF = Path(__file__).resolve().parent.parent / "docker" / "supervisor" / "worker.conf"
CELERY = (sys.executable, "-m", "celery", "--app=services.app")


def node_command(settings: Settings) -> list[str]:
    """The command line of a Celery node; Supervisor adds its name."""
    worker = settings.worker
    options = {
        "--pool": worker.pool,
        "--queues": ",".join(worker.queues),
        "--loglevel": settings.tasks.log_level,
        # "auto" is Celery's word for the CPUs that the cgroup allows (celery 5.7).
        "--concurrency": None if worker.autoscale else worker.concurrency or "auto",
        "--autoscale": ",".join(map(str, worker.autoscale)) if worker.autoscale else None,
        "--max-tasks-per-child": worker.max_tasks_per_child,
        "--max-memory-per-child": worker.max_memory_per_child,
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    return [*CELERY, "worker", "--task-events", "--without-gossip", *given]


def launch_worker(settings: Settings) -> None:
    """Become Supervisor, with WORKER_PROCESSES nodes under it."""
    preflight.check(settings)
    worker = settings.worker
    environment = child_environment(
        known("broker", "results", "tasks", "worker", "beat", "stack"),
        STALK_RUN_DIR=settings.stack.run_directory,
        STALK_NODES=str(worker.processes),
        STALK_NODE_COMMAND=shlex.join(node_command(settings)),
        STALK_HEARTBEAT_TIMEOUT=str(worker.heartbeat_timeout),
        STALK_KILL_AFTER=str(worker.soft_shutdown + HAND_BACK_SECONDS),
    )
    command = [sys.executable, "-m", "services.supervise", "--configuration", str(SUPERVISOR_CONF)]
    os.execve(command[0], command, environment)


def launch_beat(settings: Settings) -> None:
    """Become Celery's beat."""
    preflight.check(settings)
    environment = child_environment(known("broker", "results", "tasks", "beat", "stack"))
    options = [f"--loglevel={settings.tasks.log_level}", f"--max-interval={TICK_SECONDS:.0f}", "--pidfile="]
    command = [*CELERY, "beat", *options]
    os.execve(command[0], command, environment)


def launch_flower(settings: Settings) -> None:
    """Serve Flower in this process: its login never stands on a command line."""
    from services.app import create_app
    from services.flower import serve
    from services.heartbeat import READY, HeartbeatFile

    heartbeat = HeartbeatFile(settings.stack.run_directory, "flower")
    serve(create_app(settings), settings, heartbeat=lambda: heartbeat.touch(READY))


ROLES: dict[str, Callable[[Settings], None]] = {
    "worker": launch_worker,
    "beat": launch_beat,
    "flower": launch_flower,
}


def known(*groups: str) -> list[str]:
    """The variables of these groups."""
    return [variable for name in groups for _, variable, _ in fields(GROUPS[name])]


def main(arguments: list[str]) -> None:
    """Launch the role that `arguments` name."""
    if len(arguments) != 1 or arguments[0] not in ROLES:
        print(f"error: usage: python -m services.launch {' | '.join(ROLES)}", file=sys.stderr)
        sys.exit(CONFIGURATION_EXIT_CODE)
    try:
        settings = load()
        for warning in settings.warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        ROLES[arguments[0]](settings)
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(CONFIGURATION_EXIT_CODE)


if __name__ == "__main__":
    main(sys.argv[1:])
