"""make up: from a fresh clone to a working stack."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from time import monotonic
from typing import Any

import config
from config import ConfigError, Settings
from stack import docker, env_file, images, waiting
from stack.failure import Failure

FIRST_TASK = "make call TASK=services.tasks.arithmetic.add ARGS='[4, 3]'"


def up() -> None:
    """Build and start the stack and wait until it works.

    Raises Failure or ConfigError.
    """
    started = monotonic()
    docker.require_engine()
    if env_file.write_first(WORKER_CPUS=engine_cpus()):
        print("Wrote .env, with random passwords (mode 0600).")
    settings = checked_settings()
    require_port(settings)
    make_readable(docker.ROOT / "docker" / "redis")
    images.prepare(settings)
    print("Building the application image …", flush=True)
    build()
    print("Starting …", flush=True)
    start()
    waiting.until_healthy()
    print(f"\nThe stack works ({monotonic() - started:.0f} s).")
    say_where(settings)


def engine_cpus() -> str:
    """The CPUs of the engine's machine, which need not be this one."""
    return docker.run("docker", "info", "--format", "{{.NCPU}}").stdout.strip()


def checked_settings() -> Settings:
    """The settings, with their warnings said and what only the stack requires checked."""
    settings = config.load()
    problems = []
    if not settings.flower.basic_auth.get_secret_value():
        problems.append("FLOWER_BASIC_AUTH is not set, and no page is without login: set it in .env to user:password")
    if settings.stack.redis_replicas and not settings.broker.password.get_secret_value():
        problems.append("REDIS_PASSWORD is not set, and the redis service needs one: set it in .env")
    if problems:
        raise ConfigError(problems)
    for warning in settings.warnings:
        print(f"warning: {warning}")
    return settings


def require_port(settings: Settings) -> None:
    """Raise Failure when something else has Flower's port."""
    address, port = settings.flower.bind, settings.flower.port
    if any(container["Service"] == "flower" and publishes(container, port) for container in docker.containers()):
        return
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.strip("[]"), port))
        except OSError as error:
            raise Failure(
                f"port {port} on {address} cannot be had for Flower ({error.strerror}): stop what uses it, or set "
                "FLOWER_PORT (and FLOWER_BIND) in .env"
            ) from None


def publishes(container: dict[str, Any], port: int) -> bool:
    """Whether a running container holds a port of the host."""
    return any(publisher.get("PublishedPort") == port for publisher in container.get("Publishers") or [])


def make_readable(directory: Path) -> None:
    """Let the container's user read what is mounted from a checkout made with umask 077."""
    directory.chmod(directory.stat().st_mode | 0o055)
    for file in directory.iterdir():
        file.chmod(file.stat().st_mode | 0o044)


def build() -> None:
    """Build the application image.

    Raises Failure with the builder's last lines.
    """
    built = docker.compose("build", "worker", check=False)
    if built.returncode != 0:
        lines = "\n".join((built.stdout + built.stderr).rstrip().splitlines()[-25:])
        raise Failure(f"the application image could not be built; the builder's last lines are\n{lines}")


def start() -> None:
    """Create and start what is missing or changed.

    Raises Failure.
    """
    if redis_files_changed():
        docker.compose("up", "--detach", "--force-recreate", "--no-deps", "redis")
    started = docker.compose("up", "--detach", check=False)
    if started.returncode != 0:
        # Redis that does not get healthy is reported by its own log lines.
        unhealthy = [container for container in docker.containers() if container.get("Health") == "unhealthy"]
        why = waiting.report(unhealthy[0]) if unhealthy else docker.last_line(started.stderr)
        raise Failure(f"the stack could not be started: {without_colour(why)}")


def redis_files_changed() -> bool:
    """Whether docker/redis/ is newer than the running Redis, which Compose does not look at."""
    redis = [container for container in docker.containers() if container["Service"] == "redis"]
    if not redis:
        return False
    created = docker.run("docker", "inspect", "--format", "{{.Created}}", str(redis[0]["ID"])).stdout.strip()
    newest = max(file.stat().st_mtime for file in (docker.ROOT / "docker" / "redis").iterdir())
    return newest > timestamp(created)


def timestamp(text: str) -> float:
    """Seconds since 1970 of a time as Docker prints it, with nanoseconds."""
    from datetime import datetime

    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", text)).timestamp()


def without_colour(text: str) -> str:
    """`text` without terminal escapes."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def say_where(settings: Settings) -> None:
    """Where to look and what to do first."""
    flower = settings.flower
    host = "127.0.0.1" if flower.bind == "0.0.0.0" else flower.bind  # noqa: S104 - compared, not bound
    path = f"/{flower.url_prefix}/" if flower.url_prefix else ""
    user = flower.basic_auth.get_secret_value().partition(":")[0]
    print(f"  Flower:       http://{host}:{flower.port}{path} (user {user}, password in .env at FLOWER_BASIC_AUTH)")
    print(f"  A first task: {FIRST_TASK}")
    print("  The stack:    make status")
