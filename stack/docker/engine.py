"""Run docker and docker compose, and read what they print."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass

from config import ConfigError
from config.environment import process_environment, read_env_file
from stack.errors import CommandError
from stack.paths import ROOT
from stack.terminal import run_attached

# compose.yaml's health checks have a `start_interval`, which came with Docker Engine 25, whose API is 1.44. Its own
# version is not compared, because Podman's differs.
LOWEST_API = (1, 44)
# `env_file` with `required: false` came with 2.24.
LOWEST_COMPOSE = (2, 24)
# An engine on this machine answers in milliseconds, a remote one in seconds; one that takes longer hangs.
ANSWER_SECONDS = 20
INSTALL = "'sudo .ci/docker-engine' installs it on Debian 12 and newer"


def run(*command: str, check: bool = True, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout and return what it printed.

    Raises CommandError, with the command's last line, when it is missing, takes too long, or fails (with `check`).
    """
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)
    except FileNotFoundError:
        raise CommandError(f"{command[0]} is not on PATH: install it") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"'{' '.join(command[:3])}' did not answer within {timeout:g} s") from None
    if check:
        require_success(done)
    return done


def require_success(done: subprocess.CompletedProcess[str]) -> None:
    """Raise CommandError with the last line of a command that failed."""
    if done.returncode != 0:
        raise CommandError(f"'{' '.join(done.args)}' failed: {find_last_line(done.stderr or done.stdout)}")


def run_compose(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `docker compose …` and return what it printed.

    Raises CommandError, as `run` does, and ConfigError where Compose cannot read .env or .env.tasks.
    """
    done = run("docker", "compose", *arguments, check=False)
    if done.returncode != 0:
        _require_readable()
    if check:
        require_success(done)
    return done


def _require_readable() -> None:
    """Raise ConfigError for a line of an env file that Compose cannot read: its own error shows the line's secrets."""
    if run("docker", "compose", "config", "--quiet", check=False).returncode != 0:
        for name in (".env", ".env.tasks"):
            read_env_file(ROOT / name)


def show_compose(*arguments: str) -> int:
    """Run `docker compose …` on the terminal; its exit code.

    Raises ConfigError where Compose cannot read .env or .env.tasks.
    """
    _require_readable()
    return run_attached(["docker", "compose", *arguments], ROOT)


def find_last_line(text: str) -> str:
    """The last line that is not blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")


def read_engine_versions() -> tuple[str, str]:
    """The version of the Docker Engine, and that of its API.

    Raises CommandError where none answers.
    """
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
    """The CPUs of the machine that the Docker Engine runs on, which need not be this one.

    Raises CommandError.
    """
    return int(run("docker", "info", "--format", "{{.NCPU}}").stdout)


@dataclass(frozen=True)
class Container:
    """A container as `docker ps` and `docker compose ps` describe it."""

    id: str
    name: str
    service: str
    state: str
    status: str
    # healthy, starting, unhealthy, or "" where it has no health check.
    health: str
    # Those of the host.
    ports: tuple[int, ...]


def list_containers() -> list[Container]:
    """Every container of the project, stopped ones too.

    Raises CommandError.
    """
    # Compose takes 0.2 s longer; it is asked where there seems to be none, because it reads all Compose files.
    found = _list_by_label() or _list_with_compose()
    return sorted(found, key=lambda container: container.name)


def _list_by_label() -> list[Container]:
    """The containers that Compose has labelled with this project and this directory."""
    name = read_project_name()
    if not name:
        return []
    labels = {"project": name, "project.working_dir": str(ROOT), "oneoff": "False"}
    filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
    fields = ("ID", "Names", "State", "Status", "Ports", 'Label "com.docker.compose.service"')
    form = "\t".join(f"{{{{.{field}}}}}" for field in fields)
    try:
        listed = run("docker", "ps", "--all", *filters, "--format", form, timeout=ANSWER_SECONDS)
    except CommandError as error:
        raise CommandError(explain_missing_engine() or str(error)) from None
    found = []
    for line in listed.stdout.splitlines():
        identifier, name, state, status, ports, service = line.split("\t")
        health = re.search(r"\((?:health: )?(starting|healthy|unhealthy)\)", status)
        published = tuple(map(int, re.findall(r":([0-9]+)->", ports)))
        found.append(Container(identifier, name, service, state, status, health[1] if health else "", published))
    return found


def _list_with_compose() -> list[Container]:
    """The containers that Compose lists."""
    printed = run_compose("ps", "--all", "--format", "json").stdout
    # One object a line.
    found = map(json.loads, printed.splitlines())
    return [
        Container(
            one["ID"],
            one["Name"],
            one["Service"],
            one["State"],
            one["Status"],
            one.get("Health") or "",
            tuple(publisher.get("PublishedPort", 0) for publisher in one.get("Publishers") or ()),
        )
        for one in found
    ]


def read_project_name() -> str:
    """The project's name, as .env, the shell and compose.yaml have it; "" where .env has mistakes.

    A Compose file of the user may give it another one.
    """
    try:
        chosen = (read_env_file(ROOT / ".env") | process_environment()).get("COMPOSE_PROJECT_NAME", "")
    except ConfigError:
        return ""
    return chosen or re.findall(r"(?m)^name: (\S+)", (ROOT / "compose.yaml").read_text())[0]
