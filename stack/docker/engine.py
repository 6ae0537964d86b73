"""Docker and Compose as the stack uses them."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

from config import ConfigError
from config.environment import process_environment, read_env_file
from stack.errors import Failure
from stack.paths import ROOT
from stack.terminal import attached

# compose.yaml's health checks have a `start_interval`, which Docker Engine 25 knows: its API is 1.44. Not asked for by
# the engine's own version, because Podman counts otherwise.
LOWEST_API = (1, 44)
# `env_file` with `required: false` came with 2.24.
LOWEST_COMPOSE = (2, 24)
# An engine on this machine answers in milliseconds, a remote one in seconds; after that it hangs.
ANSWER_SECONDS = 20
INSTALL = "'sudo .ci/docker-engine' installs it on Debian 12 and newer"


def run(*command: str, check: bool = True, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout and return what it printed.

    Raises Failure, with the command's last line, when it is missing, takes too long, or fails (with `check`).
    """
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)
    except FileNotFoundError:
        raise Failure(f"{command[0]} is not on PATH: install it") from None
    except subprocess.TimeoutExpired:
        raise Failure(f"'{' '.join(command[:3])}' did not answer within {timeout:g} s") from None
    if check:
        require_success(done)
    return done


def require_success(done: subprocess.CompletedProcess[str]) -> None:
    """Raise Failure with the last line of a command that failed."""
    if done.returncode != 0:
        raise Failure(f"'{' '.join(done.args)}' failed: {last_line(done.stderr or done.stdout)}")


def compose(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `docker compose …` and return what it printed.

    Raises Failure, as `run` does, and ConfigError where Compose cannot read .env or .env.tasks.
    """
    done = run("docker", "compose", *arguments, check=False)
    if done.returncode != 0:
        _require_readable()
    if check:
        require_success(done)
    return done


def _require_readable() -> None:
    """Raise ConfigError where Compose fails at a line of an env file: it says that line back, and a secret with it."""
    if run("docker", "compose", "config", "--quiet", check=False).returncode != 0:
        for name in (".env", ".env.tasks"):
            read_env_file(ROOT / name)


def compose_shown(*arguments: str) -> int:
    """Run `docker compose …` on the terminal, input and output included; its exit code.

    Raises ConfigError where Compose cannot read .env or .env.tasks.
    """
    _require_readable()
    return attached(["docker", "compose", *arguments], ROOT)


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def ask_engine() -> tuple[str, str]:
    """The Docker Engine's version, and that of its API.

    Raises Failure where none answers.
    """
    form = "{{.Server.Version}} {{.Server.APIVersion}}"
    try:
        engine = run("docker", "version", "--format", form, check=False, timeout=ANSWER_SECONDS)
    except Failure as failure:
        raise Failure(f"Docker is needed and does not answer ({failure}); {INSTALL}") from None
    if engine.returncode != 0:
        raise Failure(f"no Docker Engine answers ({last_line(engine.stderr)}): start it; {INSTALL}")
    version, _, api = engine.stdout.strip().partition(" ")
    return version, api


def why_no_engine() -> str:
    """Why no Docker Engine answers; "" where one does."""
    try:
        ask_engine()
    except Failure as failure:
        return str(failure)
    return ""


def require_engine() -> None:
    """Raise Failure unless a Docker Engine answers, and it and its Compose are new enough."""
    version, api = ask_engine()
    if major_minor(api) < LOWEST_API:
        raise Failure(f"Docker Engine is {version} (API {api}), and 25 or newer is needed: upgrade it")
    plugin = run("docker", "compose", "version", "--short", check=False)
    wanted = ".".join(map(str, LOWEST_COMPOSE))
    if plugin.returncode != 0:
        raise Failure(f"Docker has no Compose plugin: install Docker Compose {wanted} or newer; {INSTALL}")
    if major_minor(plugin.stdout) < LOWEST_COMPOSE:
        raise Failure(
            f"Docker Compose is {plugin.stdout.strip()}, and {wanted} or newer is needed: upgrade it; {INSTALL}"
        )


def major_minor(text: str) -> tuple[int, ...]:
    """(major, minor) of a version such as v2.26.1-4; () where the text tells neither."""
    found = re.match(r"v?([0-9]+)\.([0-9]+)", text.strip())
    return (int(found[1]), int(found[2])) if found else ()


def cpus() -> int:
    """The CPUs of the machine that the Docker Engine runs on, which need not be this one.

    Raises Failure.
    """
    return int(run("docker", "info", "--format", "{{.NCPU}}").stdout)


def containers() -> list[dict[str, Any]]:
    """Every container of the project, stopped ones too, as `docker compose ps` describes it.

    Raises Failure.
    """
    # Compose takes 0.2 s to say the same, and is asked only where its word is needed: when there is none.
    found = _labelled() or _composed()
    return sorted(found, key=lambda container: str(container["Name"]))


def _labelled() -> list[dict[str, Any]]:
    """The project's containers as the engine knows them by Compose's labels."""
    # The directory as well, because a Compose file can give the project another name.
    name = project()
    if not name:
        return []
    labels = {"project": name, "project.working_dir": str(ROOT), "oneoff": "False"}
    filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
    fields = ("ID", "Names", "State", "Status", "Ports", 'Label "com.docker.compose.service"')
    form = "\t".join(f"{{{{.{field}}}}}" for field in fields)
    try:
        listed = run("docker", "ps", "--all", *filters, "--format", form, timeout=ANSWER_SECONDS)
    except Failure as failure:
        raise Failure(why_no_engine() or str(failure)) from None
    found = []
    for line in listed.stdout.splitlines():
        identifier, name, state, status, ports, service = line.split("\t")
        health = re.search(r"\((?:health: )?(starting|healthy|unhealthy)\)", status)
        published = [{"PublishedPort": int(port)} for port in re.findall(r":([0-9]+)->", ports)]
        found.append(
            {"ID": identifier, "Name": name, "Service": service, "State": state, "Status": status}
            | {"Health": health[1] if health else "", "Publishers": published}
        )
    return found


def _composed() -> list[dict[str, Any]]:
    """The same in Compose's own words."""
    printed = compose("ps", "--all", "--format", "json").stdout.strip()
    # Compose prints one object a line; before 2.21 it printed one list.
    return list(json.loads(printed)) if printed.startswith("[") else [json.loads(line) for line in printed.splitlines()]


def project() -> str:
    """The project's name, unless a Compose file of somebody's own gives it another one; "" where .env has mistakes."""
    try:
        chosen = (read_env_file(ROOT / ".env") | process_environment()).get("COMPOSE_PROJECT_NAME", "")
    except ConfigError:
        return ""
    return chosen or re.findall(r"(?m)^name: (\S+)", (ROOT / "compose.yaml").read_text())[0]
