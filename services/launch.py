"""python -m services.launch worker | node | beat | flower: start one part of the stack from its settings.

Checks the configuration and Redis, then becomes Supervisor, Celery or Flower with only the variables that each needs.
Exit codes: 0 stopped by TERM while waiting for Redis, 2 the configuration has mistakes, 3 Redis was refused; otherwise
that of Supervisor, Celery or Flower.
"""

import os
import shlex
import signal
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from config import Settings, child_environment, exit_on_mistakes, load
from config.loading import REQUEUE_SECONDS
from config.settings import VARIABLES
from services.broker import preflight

SUPERVISOR_CONF = Path(__file__).resolve().parent.parent / "docker" / "supervisor" / "worker.conf"
CELERY = (sys.executable, "-m", "celery", "--app=services.app")


def build_node_command(settings: Settings) -> list[str]:
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


def launch_worker(settings: Settings, _: Namespace) -> None:
    """Become Supervisor, with WORKER_PROCESSES nodes under it.

    Raises ConfigError when BEAT_SCHEDULE names an entry that does not exist, which would otherwise end each node
    after its start.
    """
    from services.schedule import beat_schedule

    beat_schedule(settings.beat.schedule)
    preflight.check(settings)
    environment = child_environment(NODE_VARIABLES, **supervisor_values(settings))
    become(
        [sys.executable, "-m", "services.supervisor.supervise", "--configuration", str(SUPERVISOR_CONF)], environment
    )


def supervisor_values(settings: Settings) -> dict[str, str]:
    """The values of the ENV_ placeholders in docker/supervisor/worker.conf."""
    worker = settings.worker
    return {
        "STALK_RUN_DIR": settings.stack.run_directory,
        "STALK_NODES": str(worker.processes),
        "STALK_NODE_COMMAND": shlex.join(build_node_command(settings)),
        "STALK_HEARTBEAT_TIMEOUT": str(worker.heartbeat_timeout),
        "STALK_ON_FATAL": "exit",
        "STALK_KILL_AFTER": str(worker.soft_shutdown + REQUEUE_SECONDS),
    }


def launch_node(settings: Settings, options: Namespace) -> None:
    """Become one Celery node, for a Supervisor that has not checked Redis."""
    preflight.check(settings)
    become([*build_node_command(settings), f"--hostname={options.hostname}"], child_environment(NODE_VARIABLES))


def launch_beat(settings: Settings, _: Namespace) -> None:
    """Become Celery's beat."""
    # Imported here, because only beat needs Celery before it becomes another program.
    from services.beat.scheduler import TICK_SECONDS
    from services.schedule import beat_schedule

    beat_schedule(settings.beat.schedule)
    preflight.check(settings)
    options = [f"--loglevel={settings.tasks.log_level}", f"--max-interval={TICK_SECONDS:.0f}", "--pidfile="]
    variables = list_variables("broker", "results", "tasks", "beat", "stack")
    become([*CELERY, "beat", *options], child_environment(variables))


def launch_flower(settings: Settings, options: Namespace) -> None:
    """Serve Flower in this process: its login never stands on a command line."""
    from services.app import create_app
    from services.flower.server import serve
    from services.supervisor.heartbeat_file import READY, HeartbeatFile

    heartbeat = HeartbeatFile(settings.stack.run_directory, "flower")
    serve(
        create_app(settings),
        settings,
        address=options.address,
        port=options.port,
        database=options.database,
        heartbeat=lambda: heartbeat.touch(READY),
    )


def become(command: list[str], environment: dict[str, str]) -> None:
    """Replace this process by another program."""
    os.execve(command[0], command, environment)


def list_variables(*groups: str) -> list[str]:
    """The variables of these groups of settings."""
    return [variable.name for variable in VARIABLES.values() if variable.group in groups]


NODE_VARIABLES = list_variables("broker", "results", "tasks", "worker", "beat", "stack")


def build_parser() -> ArgumentParser:
    """The command line; a mistake in it ends with exit code 2."""
    parser = ArgumentParser(prog="python -m services.launch", description="Start one part of the stack.")
    roles = parser.add_subparsers(metavar="ROLE", required=True)
    add = roles.add_parser
    add("worker", help="Supervisor with the nodes of a container").set_defaults(launch=launch_worker)
    add("beat", help="the scheduler").set_defaults(launch=launch_beat)
    node = add("node", help="one Celery node")
    node.add_argument("--hostname", required=True)
    node.set_defaults(launch=launch_node)
    flower = add("flower", help="the web interface")
    flower.add_argument("--address", default="0.0.0.0")  # noqa: S104 - the container's border is the border
    # The port inside the container; FLOWER_PORT is the one on the host.
    flower.add_argument("--port", type=int, default=8080)
    flower.add_argument("--database", default="/var/lib/flower/flower.db")
    flower.set_defaults(launch=launch_flower)
    return parser


def main(arguments: list[str]) -> None:
    """Launch the role that `arguments` name."""
    options = build_parser().parse_args(arguments)
    # Process 1 of a container ignores TERM without a handler, and TERM has to end a wait for Redis.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with exit_on_mistakes():
        settings = load()
        for warning in settings.warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        options.launch(settings, options)


if __name__ == "__main__":
    main(sys.argv[1:])
