"""config.reference: what is documented, what is read and what Compose passes on are the same."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from config import load
from config.environment import read_env_file
from config.reference import GENERATED, format_value, render_example, render_reference, render_settings
from config.settings import SECRETS, VARIABLES, Variable
from services.schedule import beat_schedule

ROOT = Path(__file__).resolve().parents[3]
COMPOSE_FILE = ROOT / "compose.yaml"
# Read in services/app.py, config/celery.py and services/broker/client.py, which every container of ours runs.
COMMON_GROUPS = ("broker", "results", "tasks", "beat")
# Group and the one service that reads it as well.
OWN_GROUPS = {"worker": "worker", "flower": "flower"}
# Where Flower is found on the host: Compose's business, and not to be seen by Flower itself.
HOST_ONLY = {"FLOWER_PORT", "FLOWER_BIND"}
# Refused one without the other.
TOGETHER = ("FLOWER_TRUSTED_HEADER", "FLOWER_TRUSTED_PROXIES")


def with_files(variable: str) -> list[str]:
    return [variable, f"{variable}_FILE"] if variable in SECRETS else [variable]


# --- The documents


@pytest.mark.parametrize(
    ("path", "text"), [("docs/configuration.md", render_reference), (".env.example", render_example)]
)
def test_a_document_is_what_its_command_prints(path: str, text: Any) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == text(), "run: make docs"


def test_the_reference_has_a_row_for_every_variable() -> None:
    rows = [line.split(" | ") for line in render_reference().splitlines() if line.startswith("| `")]
    assert [re.findall(r"`(\w+)`", row[0]) for row in rows] == [with_files(variable) for variable in VARIABLES]
    assert {len(row) for row in rows} == {4}


def test_the_example_has_every_variable_once() -> None:
    assert re.findall(r"^#?([A-Z_]+)=", render_example(), re.MULTILINE) == list(VARIABLES)


def test_the_example_sets_nothing_but_the_generated_secrets(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(render_example(), encoding="utf-8")
    assert read_env_file(path) == dict.fromkeys(GENERATED, "")


def test_the_example_with_secrets_is_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    text = render_example()
    for name, value in (("REDIS_PASSWORD", "'pa$$w#rd'"), ("FLOWER_BASIC_AUTH", "admin:a-password")):
        assert text.count(f"\n{name}=\n") == 1
        text = text.replace(f"\n{name}=\n", f"\n{name}={value}\n")
    path.write_text(text, encoding="utf-8")
    settings = load({}, path)
    assert settings.warnings == ()
    assert settings.broker_url.password == "pa$$w#rd"
    assert settings.flower.basic_auth.get_secret_value() == "admin:a-password"


@pytest.mark.parametrize("variable", [name for name in VARIABLES if name not in GENERATED])
def test_a_line_of_the_example_works_when_it_is_uncommented(tmp_path: Path, variable: str) -> None:
    path = tmp_path / ".env"
    text = render_example()
    for name in TOGETHER if variable in TOGETHER else (variable,):
        assert text.count(f"\n#{name}=") == 1
        text = text.replace(f"\n#{name}=", f"\n{name}=")
    path.write_text(text, encoding="utf-8")
    settings = load({}, path)
    assert settings.warnings == ()
    beat_schedule(settings.beat.schedule)


def test_what_is_in_force_is_said_of_every_variable_with_the_password_that_is_in_force() -> None:
    settings = load({"LOG_LEVEL": "debug", "REDIS_PASSWORD": "s3cret"})
    lines = [line for line in render_settings(settings).splitlines() if line and not line.startswith("#")]
    assert [line.partition("=")[0] for line in lines] == list(VARIABLES)
    assert "LOG_LEVEL=debug" in lines
    assert "WORKER_QUEUES=celery" in lines
    assert "CELERY_BROKER_URL=redis://:***@redis:6379/0" in lines
    assert "CELERY_RESULT_BACKEND=redis://:***@redis:6379/1" in lines
    assert "REDIS_PASSWORD=***" in lines
    assert "CELERY_SENTINEL_PASSWORD=" in lines


# --- Who reads it


def scripts(directory: str) -> list[Path]:
    return sorted(path for path in (ROOT / directory).rglob("*") if path.is_file())


def expanded(path: Path) -> set[str]:
    """Variables that a shell script or compose.yaml uses: $NAME and ${NAME…}; to pass one on is not to use it."""
    return set(re.findall(r"\$\{?([A-Z][A-Z0-9_]*)", path.read_text(encoding="utf-8")))


@cache
def attributes_read() -> set[tuple[str, str]]:
    """(group, attribute) of every `….group.attribute` and `group.attribute` in our code."""
    found = set()
    for path in [*ROOT.glob("config/*.py"), *ROOT.glob("services/**/*.py"), *ROOT.glob("stack/**/*.py")]:
        # Defined, checked and documented there; that is not yet reading.
        if path.name == "reference.py":
            continue
        body = ast.parse(path.read_text(encoding="utf-8")).body
        if path == ROOT / "config" / "settings.py":
            body = [node for node in body if isinstance(node, ast.ClassDef) and node.name == "Settings"]
        for node in (inner for outer in body for inner in ast.walk(outer)):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                found.add((name, node.attr))
    return found


@cache
def names_expanded() -> set[str]:
    return set().union(*map(expanded, [COMPOSE_FILE, *scripts("docker")]))


@pytest.mark.parametrize("variable", VARIABLES.values(), ids=VARIABLES)
def test_a_documented_variable_is_read_by_something(variable: Variable) -> None:
    assert (variable.group, variable.attribute) in attributes_read() or variable.name in names_expanded()


def test_reading_is_told_from_documenting() -> None:
    assert ("worker", "no_such_setting") not in attributes_read()
    assert "WORKER_QUEUES" not in names_expanded()
    assert "WORKER_MEMORY" in names_expanded()


# --- What Compose passes on


def compose_services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE_FILE.read_text(encoding="utf-8"))["services"]
    return services


@pytest.mark.parametrize("service", ["worker", "beat", "flower"])
def test_compose_passes_on_every_variable_that_a_container_reads(service: str) -> None:
    passed = compose_services()[service]["environment"]
    groups = [*COMMON_GROUPS, *(group for group, reader in OWN_GROUPS.items() if reader == service)]
    needed = {
        name
        for variable in VARIABLES.values()
        if variable.group in groups and variable.name not in HOST_ONLY
        for name in with_files(variable.name)
    }
    assert needed - passed.keys() == set()
    # A value in the file would beat .env and the shell.
    assert {name: value for name, value in passed.items() if value is not None} == {}


@pytest.mark.parametrize("service", ["worker", "beat", "flower"])
def test_compose_passes_on_no_variable_that_does_not_exist(service: str) -> None:
    existing = {name for variable in VARIABLES for name in with_files(variable)}
    assert compose_services()[service]["environment"].keys() - existing == set()


def test_flower_never_sees_where_the_host_publishes_it() -> None:
    assert not compose_services()["flower"]["environment"].keys() & HOST_ONLY


def test_compose_passes_on_every_variable_that_the_scripts_of_redis_read() -> None:
    documented = {name for variable in VARIABLES for name in with_files(variable)}
    read = set().union(*map(expanded, scripts("docker/redis")))
    assert (read & documented) - compose_services()["redis"]["environment"].keys() == set()


def defaults_written_outside() -> list[tuple[str, str, str]]:
    """(file, variable, default) of every ${NAME:-default} and ARG NAME=default."""
    found = []
    for path in [COMPOSE_FILE, *scripts("docker")]:
        text = path.read_text(encoding="utf-8")
        pairs = re.findall(r"\$\{(\w+):?-([^}]*)\}", text) + re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE)
        found += [(str(path.relative_to(ROOT)), name, default) for name, default in pairs if name in VARIABLES]
    return found


@pytest.mark.parametrize(("file", "variable", "default"), defaults_written_outside())
def test_a_default_outside_config_is_the_default(file: str, variable: str, default: str) -> None:
    assert default == format_value(VARIABLES[variable].default), (
        f"{file} has another default of {variable} than config/settings.py"
    )


def test_defaults_outside_config_are_found() -> None:
    assert {("compose.yaml", "WORKER_MEMORY", "1g"), ("compose.yaml", "FLOWER_BIND", "127.0.0.1")} <= set(
        defaults_written_outside()
    )
