"""Who may import whom, who may read the environment, and what images the stack takes from others."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from config.settings import StackSettings

ROOT = Path(__file__).resolve().parents[2]
OURS = ("config", "services", "stack")
# What reads the environment, under whatever name it was imported.
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
# redis:8.8.2-trixie, python:3.13.15-slim, registry:5000/redis:8.8.2, each with or without a digest.
FULL_VERSION = re.compile(r"[a-z0-9][\w./-]*(?::\d+[\w./-]*/[\w./-]*)?:\d+\.\d+\.\d+[\w.-]*(?:@sha256:[0-9a-f]{64})?")


def sources(*packages: str) -> list[Path]:
    found = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert found
    return found


def imports(source: str, package: str = "") -> Iterator[str]:
    """Full names of all that a module imports, at its top or inside a function; `package` is the one it is in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*outer, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            yield from (word.value for word in node.args[:1] if isinstance(word, ast.Constant))  # type: ignore[misc]


def imports_of(path: Path) -> Iterator[str]:
    return imports(path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parent.parts))


def environment_uses(source: str) -> list[str]:
    """Where a module touches the process environment."""
    return [
        f"line {getattr(node, 'lineno', 0)}"
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {a.name for a in node.names} & ENVIRONMENT)
    ]


def is_within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources("config"), ids=relative)
def test_config_imports_nothing_of_the_rest(path: Path) -> None:
    assert [name for name in imports_of(path) if is_within(name, "services") or is_within(name, "stack")] == []


@pytest.mark.parametrize("path", sources("services"), ids=relative)
def test_services_know_nothing_of_what_make_runs(path: Path) -> None:
    assert [name for name in imports_of(path) if is_within(name, "stack") or is_within(name, "tests")] == []


def test_services_are_configured_by_config() -> None:
    assert any(is_within(name, "config") for path in sources("services") for name in imports_of(path))


@pytest.mark.parametrize("path", sources("services/tasks"), ids=relative)
def test_tasks_know_nothing_of_delivery(path: Path) -> None:
    assert [name for name in imports_of(path) if is_within(name, "services.delivery")] == []


@pytest.mark.parametrize("path", sources("services", "stack"), ids=relative)
def test_only_config_reads_the_environment(path: Path) -> None:
    assert environment_uses(path.read_text(encoding="utf-8")) == [], f"{relative(path)}: ask config/ for it"


def test_only_one_module_of_config_reads_the_environment() -> None:
    readers = [path.name for path in sources("config") if environment_uses(path.read_text(encoding="utf-8"))]
    assert readers == ["environment.py"]


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A']",
        "import os as system\nsystem.getenv('A')",
        "from os import environ",
        "from os import getenv as read",
        "def f():\n    import os\n    return dict(os.environ)",
    ],
)
def test_every_way_to_the_environment_is_seen(source: str) -> None:
    assert environment_uses(source)


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("import services.app", "config"),
        ("from services import app", "config"),
        ("from services.app import create_app", "config"),
        ("def f():\n    import services", "config"),
        ("from . import app", "services"),
        ("from .. import app", "services.tasks"),
        ("from ..app import create_app", "services.tasks"),
        ("import importlib\nimportlib.import_module('services.app')", "config"),
    ],
)
def test_every_way_to_import_is_seen(source: str, package: str) -> None:
    assert any(is_within(name, "services") for name in imports(source, package))
    assert not any(is_within(name, "service") for name in imports(source, package))


# --- Packages


@pytest.mark.parametrize(("packages", "groups"), [(("config", "services"), ()), (("stack",), ("dev",))])
def test_every_package_that_is_imported_is_declared(packages: tuple[str, ...], groups: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = [
        *project["project"]["dependencies"],
        *(line for group in groups for line in project["dependency-groups"][group]),
    ]
    declared = {re.split(r"[^\w.-]", line)[0].lower() for line in lines}
    names = {name.partition(".")[0] for path in sources(*packages) for name in imports(path.read_text("utf-8"))}
    installed = packages_distributions()
    foreign = names - sys.stdlib_module_names - {"config", "services", "stack"}
    assert {name for name in foreign if not {known.lower() for known in installed[name]} & declared} == set()


# --- Images


def images() -> list[str]:
    """Images that compose.yaml takes from others, as it writes them."""
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    own = {service["image"] for service in services.values() if service.get("pull_policy") == "never"}
    return sorted({service["image"] for service in services.values()} - own)


def test_an_image_of_others_comes_through_a_variable_with_a_full_version() -> None:
    assert images()
    for image in images():
        match = re.fullmatch(r"\$\{[A-Z_]+:-(.+)\}", image)
        assert match, f"{image} cannot be replaced from the environment"
        assert FULL_VERSION.fullmatch(match[1]), f"{image} has no full version"


def test_our_own_image_is_built_and_never_fetched() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    own = [service for service in services.values() if service["image"] not in images()]
    assert len({service["image"] for service in own}) == 1
    assert sum("build" in service for service in own) == 1


def test_the_application_image_is_built_on_a_variable_alone() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${PYTHON_IMAGE}"}


@pytest.mark.parametrize("attribute", ["python_image", "redis_image"])
def test_a_default_image_has_a_full_version(attribute: str) -> None:
    assert FULL_VERSION.fullmatch(StackSettings.model_fields[attribute].default)


@pytest.mark.parametrize(
    "image", ["redis", "redis:latest", "redis:8", "redis:8.8", "redis:8.8-trixie", "redis@sha256:ab"]
)
def test_a_floating_tag_is_no_full_version(image: str) -> None:
    assert not FULL_VERSION.fullmatch(image)
