"""make up: from a fresh clone to a working stack."""

from __future__ import annotations

import os
import socket
from time import monotonic
from typing import TYPE_CHECKING

import config
from config import ConfigError, Settings
from stack import env_file, readiness, runtime, terminal
from stack.checkout_lock import own_turn
from stack.commands import source_check
from stack.docker import engine
from stack.errors import Failure

if TYPE_CHECKING:
    from stack.runtime import Runtime

FIRST_TASK = "make call TASK=services.tasks.arithmetic.add ARGS='[4, 3]'"


def up(from_source: bool = False) -> Runtime:
    """Build and start the stack and wait until it works; `from_source` runs this checkout's files, not the image's.

    Raises Failure or ConfigError.
    """
    started = monotonic()
    with own_turn():
        # The choice needs no more than defaults, and a host that cannot run the stack gets no .env.
        chosen = runtime.choose(config.load())
        if env_file.write_first(WORKER_CPUS=cpus(chosen)):
            print("Wrote .env, with random passwords (mode 0600).")
        settings = checked_settings()
        require_port(chosen, settings)
        chosen.prepare(settings)
        # Preparing may have written image names into .env.
        settings = config.load()
        source_check.refuse(chosen.check_new(from_source), "nothing was started or replaced")
        runtime.record(chosen)
        chosen.use_source(from_source)
        print("Starting …")
        chosen.start(settings)
    readiness.until_healthy(chosen)
    print(f"\nThe stack works ({monotonic() - started:.0f} s).")
    say_where(settings)
    return chosen


def cpus(chosen: Runtime) -> str:
    """The CPUs of the machine that runs the stack, which with Docker need not be this one."""
    if chosen.name == "docker":
        return str(engine.cpus())
    return str(os.cpu_count() or 1)


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
        terminal.warning(warning)
    return settings


def require_port(chosen: Runtime, settings: Settings) -> None:
    """Raise Failure when something else has Flower's port."""
    address, port = settings.flower.bind.strip("[]"), settings.flower.port
    if chosen.publishes(port):
        return
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise Failure(
                f"port {port} on {address} cannot be had for Flower ({error.strerror}): stop what uses it, or set "
                "FLOWER_PORT (and FLOWER_BIND) in .env"
            ) from None


def say_where(settings: Settings) -> None:
    """Where to look and what to do first."""
    flower = settings.flower
    host = "127.0.0.1" if flower.bind == "0.0.0.0" else flower.bind  # noqa: S104 - compared, not bound
    path = f"/{flower.url_prefix}/" if flower.url_prefix else ""
    user = flower.basic_auth.get_secret_value().partition(":")[0]
    print(f"  Flower:       http://{host}:{flower.port}{path} (user {user}, password in .env at FLOWER_BASIC_AUTH)")
    print(f"  A first task: {FIRST_TASK}")
    print("  The stack:    make status")
