"""Run docker and docker compose, and find out whether they are there and new enough."""

import re
import subprocess

from config.environment import read_env_file
from stack.errors import CommandError
from stack.paths import ROOT
from stack.terminal import find_last_line, require_success, run, run_attached

# compose.yaml's health checks have a `start_interval`, which came with Docker Engine 25, whose API is 1.44. Its own
# version is not compared, because Podman's differs.
LOWEST_API = (1, 44)
# `env_file` with `required: false` came with 2.24.
LOWEST_COMPOSE = (2, 24)
# An engine on this machine answers in milliseconds, a remote one in seconds; one that takes longer hangs.
ANSWER_SECONDS = 20
INSTALL = "'sudo .ci/docker-engine' installs it on Debian 12 and newer"


def run_compose(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `docker compose …` and return what it printed.

    Raises CommandError, as `run` does, and ConfigError where Compose cannot read .env or .env.tasks.
    """
    done = run("docker", "compose", *arguments, check=False)
    if done.returncode != 0:
        _require_readable()
    return require_success(done) if check else done


def _require_readable() -> None:
    """Raise ConfigError for a line of an env file that Compose cannot read: its own error shows the line's secrets."""
    if run("docker", "compose", "config", "--quiet", check=False).returncode != 0:
        for name in (".env", ".env.tasks"):
            read_env_file(ROOT / name)


def show_compose(*arguments: str) -> int:
    """Run `docker compose …` on the terminal; its exit code. ConfigError where it cannot read .env or .env.tasks."""
    _require_readable()
    return run_attached(["docker", "compose", *arguments], ROOT)


def read_engine_versions() -> tuple[str, str]:
    """The version of the Docker Engine, and that of its API; CommandError where none answers."""
    form = "{{.Server.Version}} {{.Server.APIVersion}}"
    try:
        engine = run("docker", "version", "--format", form, check=False, timeout=ANSWER_SECONDS)
    except CommandError as error:
        raise CommandError(f"Docker is needed and does not answer ({error}); {INSTALL}") from None
    if engine.returncode != 0:
        raise CommandError(f"no Docker Engine answers ({find_last_line(engine.stderr)}): start it; {INSTALL}")
    version, _, api = engine.stdout.strip().partition(" ")
    return version, api


def explain_missing_engine() -> str:
    """Why no Docker Engine answers; "" where one does."""
    try:
        read_engine_versions()
    except CommandError as error:
        return str(error)
    return ""


def require_engine() -> None:
    """Raise CommandError unless a Docker Engine answers, and it and its Compose are new enough."""
    version, api = read_engine_versions()
    if parse_version(api) < LOWEST_API:
        raise CommandError(f"Docker Engine is {version} (API {api}), and 25 or newer is needed: upgrade it")
    plugin = run("docker", "compose", "version", "--short", check=False)
    wanted = ".".join(map(str, LOWEST_COMPOSE))
    if plugin.returncode != 0:
        raise CommandError(f"Docker has no Compose plugin: install Docker Compose {wanted} or newer; {INSTALL}")
    if parse_version(plugin.stdout) < LOWEST_COMPOSE:
        raise CommandError(
            f"Docker Compose is {plugin.stdout.strip()}, and {wanted} or newer is needed: upgrade it; {INSTALL}"
        )


def parse_version(text: str) -> tuple[int, ...]:
    """(major, minor) of a version such as v2.26.1-4; () where the text is no version."""
    found = re.match(r"v?([0-9]+)\.([0-9]+)", text.strip())
    return (int(found[1]), int(found[2])) if found else ()


def count_cpus() -> int:
    """The CPUs of the machine that the Docker Engine runs on, which need not be this one."""
    return int(run("docker", "info", "--format", "{{.NCPU}}").stdout)
