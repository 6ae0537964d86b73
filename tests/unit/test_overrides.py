"""docs/overrides.md has everything of other packages that this code replaces, sets or calls by a private name.

Whoever upgrades a package reads there what to look at; here it is compared with the code and with the packages.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import flower.urls
import pytest
from celery.worker import control as celery_control
from celery.worker.control import Panel
from tornado.web import URLSpec

from services.flower.pages import build_handlers
from tests.support.application import create_app  # noqa: F401 - registers Stalk's own methods
from tests.support.documents import ROOT

DOCUMENT = ROOT / "docs" / "overrides.md"
OURS = ("config", "services", "stack")
# Python's own, and pydantic, whose classes are meant to be filled in by those that derive from them.
NOT_LISTED = sys.stdlib_module_names | {"pydantic"}
# Private names of ours that another file uses; and os._exit, which Python documents.
NOT_THEIRS = {"_commands", "_exit"}
# Class of ours, class of theirs, name.
Row = tuple[str, str, str]


def rows(title: str) -> Iterator[list[list[str]]]:
    """What stands in backquotes in each cell of a section's tables."""
    _, found, rest = DOCUMENT.read_text().partition(f"\n## {title}\n")
    assert found, f"{DOCUMENT} has no section {title!r}"
    for line in rest.partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            yield [re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split(" | ")]


@cache
def modules() -> list[ModuleType]:
    found = []
    for name in OURS:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not module.name.endswith("__main__"):
                found.append(importlib.import_module(module.name))
    return found


@cache
def tree(module: ModuleType) -> ast.Module:
    return ast.parse(Path(str(module.__file__)).read_text())


def is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in OURS


def is_listed(kind: type) -> bool:
    return not is_ours(kind) and kind.__module__.partition(".")[0] not in NOT_LISTED


def full_name(kind: type) -> str:
    # Bootsteps have the module in their __qualname__ too.
    return f"{kind.__module__}.{kind.__name__}"


@cache
def defined(kind: type) -> frozenset[str]:
    """What a class has, and what its methods set on its instances."""
    module = sys.modules[kind.__module__]
    nodes = [node for node in ast.walk(tree(module)) if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
    found = {name for node in nodes for name in [*in_body(node), *on_self(node, ast.Store)]}
    return frozenset(found if is_ours(kind) else found | vars(kind).keys())


def in_body(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Assign) or (isinstance(statement, ast.AnnAssign) and statement.value):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def on_self(node: ast.AST, context: type[ast.expr_context]) -> Iterator[str]:
    """Attributes of self, or of super(), that are read or set in here."""
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, context) and _is_self(each.value):
            yield each.attr


def _is_self(value: ast.expr) -> bool:
    called = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"
    return called or (isinstance(value, ast.Name) and value.id in ("self", "cls"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def our_classes() -> dict[type, ast.ClassDef]:
    """Those at the top of a module."""
    found = {}
    for module in modules():
        for node in tree(module).body:
            if isinstance(node, ast.ClassDef):
                found[vars(module)[node.name]] = node
    return found


def names_of(kind: type) -> set[str]:
    """What a class of ours has in its body, sets on itself, and reads of itself by a private name."""
    read = set(on_self(our_classes()[kind], ast.Load))
    names = defined(kind) | {name for name in read if is_private(name)}
    return {name for name in names if not name.startswith("__") or name in ("__init__", "__call__")}


def find_overrides() -> set[Row]:
    """Every name of one of our classes that a class of theirs has, which comes after it in some class of ours."""
    found = set()
    for kind in (*our_classes(), *(handler for _, handler in build_handlers(""))):
        for place, mine in enumerate(kind.__mro__):
            theirs = [base for base in kind.__mro__[place + 1 :] if is_listed(base)]
            for name in names_of(mine) if mine in our_classes() else ():
                if base := next((base for base in theirs if name in defined(base)), None):
                    found.add((full_name(mine), full_name(base), name))
    return found


def find_touched() -> set[tuple[str, str]]:
    """File and name of what is reached or set from outside: private names, and attributes of what is imported."""
    found = set()
    for module in modules():
        file = str(Path(str(module.__file__)).relative_to(ROOT))
        own = _own(tree(module))
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] not in OURS:
                found |= {(file, alias.name) for alias in node.names if is_private(alias.name)}
            elif isinstance(node, ast.Attribute) and not _is_self(node.value):
                private = is_private(node.attr) and node.attr not in own | NOT_THEIRS
                if private or (isinstance(node.ctx, ast.Store) and _is_theirs(node.value, module)):
                    found.add((file, node.attr))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
                texts = [str(each.value) for each in node.args if isinstance(each, ast.Constant)]
                found |= {(file, text) for text in texts if is_private(text)}
    return found


def _own(of: ast.Module) -> set[str]:
    """Names that a file defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = list(ast.walk(of))
    variables = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {*variables, *on_self(of, ast.Store), *(node.name for node in nodes if isinstance(node, kinds))}


def _is_theirs(value: ast.expr, module: ModuleType) -> bool:
    """Whether an expression begins with a module, class or object that was imported from another package."""
    while isinstance(value, ast.Attribute):
        value = value.value
    found = vars(module).get(value.id) if isinstance(value, ast.Name) else None
    package = getattr(found, "__module__", None) or getattr(found, "__name__", None) or type(found).__module__
    return found is not None and package.partition(".")[0] not in (*OURS, *NOT_LISTED)


def has(owner: Any, name: str) -> bool:
    """Whether a module, object or class of theirs has a name, or its instances do."""
    classes = owner.__mro__ if inspect.isclass(owner) else ()
    return hasattr(owner, name) or any(name in defined(base) for base in classes if is_listed(base))


def complaint(missing: set[Any], excess: set[Any]) -> str:
    lines = [f"missing in {DOCUMENT.name}: {' | '.join(row)}" for row in sorted(missing)]
    gone = f"in {DOCUMENT.name}, but not in the code, or not in the package"
    lines += [f"{gone}: {' | '.join(row)}" for row in sorted(excess)]
    return "\n".join(lines)


def test_every_override_is_listed_and_still_overrides_something() -> None:
    listed = {
        (ours, theirs, name)
        for [ours], [theirs], names, *_ in rows("Classes that derive from theirs")
        for name in names
    }
    found = find_overrides()
    assert listed == found, complaint(found - listed, listed - found)


def test_everything_reached_from_outside_is_listed_and_still_there() -> None:
    listed, gone = set(), set()
    for [file], [owner], names, *_ in rows("What is reached or set from outside"):
        listed |= {(file, name) for name in names}
        gone |= {(file, f"{owner} has no {name}") for name in names if not has(pkgutil.resolve_name(owner), name)}
    missing = find_touched() - listed
    used = {(file, name) for file, name in listed if re.search(rf"\b{name}\b", (ROOT / file).read_text())}
    assert not (missing or gone or listed - used), complaint(missing, gone | (listed - used))


def test_every_command_of_a_node_that_is_replaced_is_listed_and_is_one_of_celery() -> None:
    listed = {name for [_], names, *_ in rows("Commands of a node") for name in names}
    mine = {name for name, handler in Panel.data.items() if handler.__module__.partition(".")[0] in OURS}
    # Their second names are replaced with them.
    found = {name for name in mine & vars(celery_control).keys() if name in Panel.meta}
    assert listed == found, complaint({(name,) for name in found - listed}, {(name,) for name in listed - found})


def test_every_page_that_takes_the_place_of_flowers_has_its_address() -> None:
    specs = (each if isinstance(each, URLSpec) else URLSpec(*each) for each in flower.urls.handlers)
    theirs = {spec.regex.pattern.removesuffix("$"): full_name(spec.handler_class) for spec in specs}
    listed = {(address, ours, theirs) for [address], [ours], [theirs], *_ in rows("Pages of Flower")}
    # The others are Flower's own, with ControlMixin.
    mine = {(address, handler) for address, handler in build_handlers("") if handler in our_classes()}
    found = {(address, full_name(handler), theirs.get(address, "nothing")) for address, handler in mine}
    assert listed == found, complaint(found - listed, listed - found)


def test_what_is_restyled_in_flowers_pages_is_there() -> None:
    directory = Path(flower.urls.settings["template_path"])
    page = (directory / "worker.html").read_text()
    names = {"worker-pool-restart", "worker-limits-table", "tab-tasks", "tab-config"}
    assert {name for name in names if name in page} == names
    assert "</head>" in (directory / "base.html").read_text()
    assert "task-uuid-short" in (Path(flower.urls.settings["static_path"]) / "js" / "flower.js").read_text()


@pytest.mark.parametrize("package", [name for [name], *_ in rows("Versions")])
def test_the_versions_are_those_of_the_lock(package: str) -> None:
    [listed] = [found for [name], [found], *_ in rows("Versions") if name == package]
    lock = (ROOT / "requirements" / "image.lock").read_text()
    [locked] = re.findall(rf"^{re.escape(package)}(?:\[[^\]]*\])?==([^\s;\\]+)", lock, re.MULTILINE)
    assert (listed, version(package)) == (locked, locked), f"look through {DOCUMENT.name} before you change its version"


def test_every_package_that_is_overridden_has_a_version() -> None:
    distributions = {"redbeat": "celery-redbeat"}
    packages = {theirs.partition(".")[0] for _, theirs, _ in find_overrides()}
    listed = {name for [name], *_ in rows("Versions")}
    assert {distributions.get(name, name) for name in packages} <= listed
