"""config.reference: what is documented, what is read and what Compose passes on are the same."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from config import load
from config.environment import read_env_file
from config.reference import GENERATED, format_value, render_example, render_reference
from config.settings import SECRETS, VARIABLES, Variable
from services.schedule import beat_schedule
from tests.support.checkout import ROOT, Checkout

COMPOSE_FILE = ROOT / "compose.yaml"
COMPOSE = yaml.safe_load(COMPOSE_FILE.read_text(encoding="utf-8"))
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


def write_example(directory: Path, changes: dict[str, str]) -> Path:
    """Write the example as an env file, with other beginnings of some lines."""
    text = render_example()
    for old, new in changes.items():
        assert text.count(f"\n{old}") == 1
        text = text.replace(f"\n{old}", f"\n{new}")
    (directory / ".env").write_text(text, encoding="utf-8")
    return directory / ".env"


DOCUMENTED = {name for variable in VARIABLES for name in with_files(variable)}


# --- The documents


@pytest.mark.parametrize(("path", "command"), [("docs/configuration.md", "reference"), (".env.example", "example")])
def test_a_document_is_what_its_command_prints_whatever_the_configuration(
    checkout: Checkout, path: str, command: str
) -> None:
    done = checkout.run("-m", "config", command, LOG_LEVEL="loud")
    assert (done.returncode, done.stderr) == (0, "")
    document = (ROOT / path).read_text(encoding="utf-8")
    # The text before the tables stands in the document alone, and the copy has no docs/.
    text = document.partition("## ")[0] if command == "reference" else ""
    assert document == text + done.stdout, "run: make docs"


def test_the_reference_has_a_row_for_every_variable() -> None:
    rows = [line.split(" | ") for line in render_reference().splitlines() if line.startswith("| `")]
    assert [re.findall(r"`(\w+)`", row[0]) for row in rows] == [with_files(variable) for variable in VARIABLES]
    assert {len(row) for row in rows} == {4}


def test_the_example_has_every_variable_once() -> None:
    assert re.findall(r"^#?([A-Z_]+)=", render_example(), re.MULTILINE) == list(VARIABLES)


def test_the_example_sets_nothing_but_the_generated_secrets(tmp_path: Path) -> None:
    assert read_env_file(write_example(tmp_path, {})) == dict.fromkeys(GENERATED, "")


def test_the_example_with_secrets_is_a_configuration(tmp_path: Path) -> None:
    secrets = {"REDIS_PASSWORD": "'pa$$w#rd'", "FLOWER_BASIC_AUTH": "admin:a-password"}
    lines = {f"{name}=\n": f"{name}={secret}\n" for name, secret in secrets.items()}
    settings = load({}, write_example(tmp_path, lines))
    assert settings.warnings == ()
    assert settings.broker_url.password == "pa$$w#rd"
    assert settings.flower.basic_auth.get_secret_value() == "admin:a-password"


@pytest.mark.parametrize("variable", [name for name in VARIABLES if name not in GENERATED])
def test_a_line_of_the_example_works_when_it_is_uncommented(tmp_path: Path, variable: str) -> None:
    names = TOGETHER if variable in TOGETHER else (variable,)
    settings = load({}, write_example(tmp_path, {f"#{name}=": f"{name}=" for name in names}))
    assert settings.warnings == ()
    beat_schedule(settings.beat.schedule)


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


NAMES_EXPANDED = set().union(*map(expanded, [COMPOSE_FILE, *scripts("docker")]))


@pytest.mark.parametrize("variable", VARIABLES.values(), ids=VARIABLES)
def test_a_documented_variable_is_read_by_something(variable: Variable) -> None:
    assert (variable.group, variable.attribute) in attributes_read() or variable.name in NAMES_EXPANDED


# --- What Compose passes on


@pytest.mark.parametrize("service", ["worker", "beat", "flower"])
def test_compose_passes_on_every_variable_that_a_container_reads_and_none_that_does_not_exist(service: str) -> None:
    passed = COMPOSE["services"][service]["environment"]
    groups = [*COMMON_GROUPS, *(group for group, reader in OWN_GROUPS.items() if reader == service)]
    needed = {name for variable in VARIABLES.values() if variable.group in groups for name in with_files(variable.name)}
    assert needed - HOST_ONLY - passed.keys() == set()
    assert passed.keys() - DOCUMENTED == set()
    assert passed.keys() & HOST_ONLY == set()
    # A value in the file would beat .env and the shell.
    assert {name: value for name, value in passed.items() if value is not None} == {}


def test_compose_passes_on_every_variable_that_the_scripts_of_redis_read() -> None:
    read = set().union(*map(expanded, scripts("docker/redis")))
    assert (read & DOCUMENTED) - COMPOSE["services"]["redis"]["environment"].keys() == set()


def defaults_written_outside() -> list[tuple[str, str, str]]:
    """(file, variable, default) of every ${NAME:-default} and ARG NAME=default."""
    found = []
    for path in [COMPOSE_FILE, *scripts("docker")]:
        text = path.read_text(encoding="utf-8")
        pairs = re.findall(r"\$\{(\w+):?-([^}]*)\}", text) + re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE)
        found += [(str(path.relative_to(ROOT)), name, default) for name, default in pairs if name in VARIABLES]
    return found


def test_what_is_read_and_the_defaults_outside_config_are_found() -> None:
    assert ("worker", "no_such_setting") not in attributes_read()
    assert "WORKER_QUEUES" not in NAMES_EXPANDED
    assert "WORKER_MEMORY" in NAMES_EXPANDED
    defaults = {("compose.yaml", "WORKER_MEMORY", "1g"), ("compose.yaml", "FLOWER_BIND", "127.0.0.1")}
    assert defaults <= set(defaults_written_outside())


@pytest.mark.parametrize(("file", "variable", "default"), defaults_written_outside())
def test_a_default_outside_config_is_the_default(file: str, variable: str, default: str) -> None:
    assert default == format_value(VARIABLES[variable].default), (
        f"{file} has another default of {variable} than config/settings.py"
    )
