"""make up: from a fresh clone to a working stack."""

import subprocess
from time import monotonic

import config
from config import ConfigError, Settings
from stack import env_file, ports, terminal
from stack.checkout_lock import lock_checkout
from stack.readiness import wait_until_healthy
from stack.runtime import Runtime, choose_runtime, write_record
from stack.terminal import find_last_line

PREFIX = "error: "
FIRST_TASK = "make call TASK=services.tasks.arithmetic.add ARGS='[4, 3]'"


def up(from_source: bool = False) -> Runtime:
    """Build and start the stack and wait until it works; `from_source`: run this checkout's files, not the image's.

    Raises CommandError or ConfigError.
    """
    started = monotonic()
    with lock_checkout():
        # The choice needs no more than defaults, and a host that cannot run the stack gets no .env.
        runtime = choose_runtime(config.load())
        if env_file.create(WORKER_CPUS=str(runtime.count_cpus())):
            print("Wrote .env, with random passwords (mode 0600).")
        settings = load_settings()
        ports.require_flower_port(runtime, settings)
        runtime.prepare(settings)
        # Preparing may have written the names of images into .env.
        settings = config.load()
        require_importable(runtime.check_new(from_source), "nothing was started or replaced")
        write_record(runtime)
        print("Starting …")
        runtime.start(settings, from_source)
    wait_until_healthy(runtime)
    print(f"\nThe stack works ({monotonic() - started:.0f} s).")
    print_next_steps(settings)
    return runtime


def load_settings() -> Settings:
    """The settings, after printing their warnings; ConfigError also for what only the stack requires."""
    settings = config.load()
    problems = []
    if not settings.flower.basic_auth.get_secret_value():
        problems.append("FLOWER_BASIC_AUTH is not set, and no page is without login: set it in .env to user:password")
    if settings.stack.redis_replicas and not settings.broker.password.get_secret_value():
        problems.append("REDIS_PASSWORD is not set, and the redis service needs one: set it in .env")
    if problems:
        raise ConfigError(problems)
    for warning in settings.warnings:
        terminal.print_warning(warning)
    return settings


def require_importable(check: subprocess.CompletedProcess[str], consequence: str) -> None:
    """Raise ConfigError with the errors that `python -m services.commands.check` printed, and their consequence."""
    if check.returncode != 0:
        lines = [line.removeprefix(PREFIX) for line in check.stderr.splitlines() if line.startswith(PREFIX)]
        raise ConfigError(f"{line}; {consequence}" for line in lines or [find_last_line(check.stderr)])


def print_next_steps(settings: Settings) -> None:
    """Print where Flower is and what to do first."""
    flower = settings.flower
    host = "127.0.0.1" if flower.bind == "0.0.0.0" else flower.bind  # noqa: S104 - compared, not bound
    path = f"/{flower.url_prefix}/" if flower.url_prefix else ""
    user = flower.basic_auth.get_secret_value().partition(":")[0]
    print(f"  Flower:       http://{host}:{flower.port}{path} (user {user}, password in .env at FLOWER_BASIC_AUTH)")
    print(f"  A first task: {FIRST_TASK}")
    print("  The stack:    make status")
