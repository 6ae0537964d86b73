"""Who may import whom, who may read the environment, and what images the stack takes from others."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from config.settings import StackSettings
from tests.support.documents import ROOT

MAP = ROOT / "docs" / "architecture.md"
# Whoever uses Stalk puts tasks there: as many modules and folders as they like.
TASKS = "services/tasks/"
# Of more in one folder nobody keeps an overview.
MOST_MODULES = 12
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


def reads_environment(source: str) -> bool:
    """Whether a module touches the process environment."""
    return any(
        (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {a.name for a in node.names} & ENVIRONMENT)
        for node in ast.walk(ast.parse(source))
    )


def is_within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- The module map of docs/architecture.md


def module_map(text: str) -> dict[str, list[str]]:
    """Every folder of the map with the folders that it may import; ["*"] is anything, [] nothing or no Python."""
    rows = re.findall(r"^\| `([^`]+/)` \|.*\|([^|]*)\|$", text, re.MULTILINE)
    return {folder: ["*"] if "anything" in cell else re.findall(r"`([^`]+)`", cell) for folder, cell in rows}


def map_faults(text: str, root: Path) -> list[str]:
    """Where the code below `root` is not as the map says, a sentence each."""
    allowed = module_map(text)
    whole = {folder for folder, others in allowed.items() if others == ["*"] or folder == TASKS}
    faults = [f"{folder} is in the map and does not exist" for folder in allowed if not (root / folder).is_dir()]
    for folder in allowed.keys() - whole:
        count = sum(path.name != "__init__.py" for path in (root / folder).glob("*.py"))
        if count == 1 or count > MOST_MODULES:
            faults.append(f"{folder} has {count} modules; it may have 2 to {MOST_MODULES}")
    packages = {path.parent for path in root.glob("[!.]*/__init__.py")} | {root / folder for folder in allowed}
    for path in sorted({path for package in packages for path in package.rglob("*.py")}):
        faults += module_faults(path, root, allowed, whole)
    return faults


def module_faults(path: Path, root: Path, allowed: dict[str, list[str]], whole: set[str]) -> Iterator[str]:
    """What is wrong with a module's place and imports; `whole` are folders that the map has with all in them."""
    module = path.relative_to(root)
    parent, *above = [f"{folder}/" for folder in module.parents]
    own = parent if parent in allowed else next((folder for folder in above if folder in whole), "")
    if not own:
        yield f"{module} is in no folder of the map"
        return
    for name in imports(path.read_text(encoding="utf-8"), ".".join(module.parent.parts)):
        found = (folder for folder in allowed if is_within(name, folder.rstrip("/").replace("/", ".")))
        other = max(found, key=len, default=own)
        if other != own and not any(fnmatch(other, pattern) for pattern in allowed[own]):
            yield f"{module}: {own} -> {other} ({name})"


def test_the_code_is_as_the_map_says() -> None:
    faults = "\n".join(map_faults(MAP.read_text(encoding="utf-8"), ROOT))
    assert not faults, f"change the code, or the table in docs/architecture.md:\n{faults}"


def test_the_map_lets_nobody_import_what_is_above() -> None:
    rooms = module_map(MAP.read_text(encoding="utf-8"))
    assert (rooms["config/"], rooms[TASKS]) == ([], ["config/"])
    allowed = {arrow for room, arrows in rooms.items() if room.startswith("services/") for arrow in arrows}
    assert {arrow.partition("/")[0] for arrow in allowed} == {"config", "services"}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"attic/__init__.py": ""}, "attic/__init__.py is in no folder of the map"),
        ({"low/deep/a.py": ""}, "low/deep/a.py is in no folder of the map"),
        ({"low/b.py": None}, "low/ has 1 modules; it may have 2 to 12"),
        ({f"low/c{number}.py": "" for number in range(11)}, "low/ has 13 modules; it may have 2 to 12"),
        ({"low/a.py": "from high import a"}, "low/a.py: low/ -> high/ (high.a)"),
        ({"low/a.py": "def f():\n    import high.a"}, "low/a.py: low/ -> high/ (high.a)"),
        ({"docker/Dockerfile": None}, "docker/ is in the map and does not exist"),
    ],
)
def test_every_fault_of_a_map_is_found(tmp_path: Path, change: dict[str, str | None], fault: str) -> None:
    text = "| `low/` | | nothing |\n| `high/` | | `low/` |\n| `docker/` | | |\n"
    files = {f"{room}/{name}.py": "" for room in ("low", "high") for name in ("__init__", "a", "b")}
    for name, content in (files | {"high/b.py": "import low.a", "docker/Dockerfile": ""} | change).items():
        if content is not None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
    assert map_faults(text, tmp_path) == ([fault] if fault else [])


# --- Links


def anchors(document: Path) -> set[str]:
    """The headings of a document, as GitHub names them in links."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_nowhere(link: str, document: Path) -> bool:
    name, _, anchor = link.partition("#")
    target = document.parent / name if name else document
    return not target.exists() or (anchor != "" and anchor not in anchors(target))


@pytest.mark.parametrize("document", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=relative)
def test_every_link_of_a_document_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if leads_nowhere(link, document)] == []


def test_every_page_that_the_code_names_is_there() -> None:
    texts = [path.read_text(encoding="utf-8") for path in sources("config", "services", "stack")]
    pages = {page for text in texts for page in re.findall(r"\bdocs/[\w-]+\.md(?:#[\w-]+)?", text)}
    assert "docs/operations.md#time-limits" in pages
    assert [page for page in sorted(pages) if leads_nowhere(page, ROOT / "README.md")] == []


# --- The environment


def test_only_one_module_of_config_reads_the_environment() -> None:
    paths = sources("config", "services", "stack")
    readers = [relative(path) for path in paths if reads_environment(path.read_text(encoding="utf-8"))]
    assert readers == ["config/environment.py"], "ask config/ for it"


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
    assert reads_environment(source)


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


def test_an_image_is_our_own_and_built_or_comes_through_a_variable_with_a_full_version() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
    own = {service["image"] for service in services if service.get("pull_policy") == "never"}
    assert len(own) == 1
    assert [service["image"] in own for service in services if "build" in service] == [True]
    others = {service["image"] for service in services} - own
    assert others
    for image in others:
        match = re.fullmatch(r"\$\{[A-Z_]+:-(.+)\}", image)
        assert match, f"{image} cannot be replaced from the environment"
        assert FULL_VERSION.fullmatch(match[1]), f"{image} has no full version"
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"${PYTHON_IMAGE}"}


def test_a_default_image_has_a_full_version_and_a_floating_tag_is_none() -> None:
    for attribute in ("python_image", "redis_image"):
        assert FULL_VERSION.fullmatch(StackSettings.model_fields[attribute].default)
    for image in ("redis", "redis:latest", "redis:8", "redis:8.8", "redis:8.8-trixie", "redis@sha256:ab"):
        assert not FULL_VERSION.fullmatch(image)
