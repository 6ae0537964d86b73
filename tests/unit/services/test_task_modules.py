"""services.task_modules"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import services.tasks
from services.task_modules import task_modules

SHIPPED = Path(services.tasks.__file__).parent


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Adds an empty module to services.tasks, as a user adds a file to its directory."""
    monkeypatch.setattr(services.tasks, "__path__", [str(tmp_path)])
    before = set(sys.modules)

    def add(file: str) -> None:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    yield add
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_every_module_that_ships_is_found() -> None:
    files = {path.stem for path in SHIPPED.glob("*.py")} - {"__init__"}
    assert set(task_modules(())) == {f"services.tasks.{name}" for name in files}
    assert "services.tasks.arithmetic" in task_modules(())


def test_a_module_that_is_added_is_found(added: Callable[[str], None]) -> None:
    added("invoices.py")
    assert task_modules(()) == ["services.tasks.invoices"]


def test_modules_of_a_sub_package_are_found(added: Callable[[str], None]) -> None:
    added("shop/__init__.py")
    added("shop/orders.py")
    assert task_modules(()) == ["services.tasks.shop", "services.tasks.shop.orders"]


@pytest.mark.parametrize("file", ["_helpers.py", "__main__.py", "shop/_helpers.py", "_private/orders.py"])
def test_what_begins_with_an_underscore_is_left_out(added: Callable[[str], None], file: str) -> None:
    added("invoices.py")
    added("shop/__init__.py")
    added("_private/__init__.py")
    added(file)
    assert task_modules(()) == ["services.tasks.invoices", "services.tasks.shop"]


def test_an_underscore_inside_a_name_is_no_reason(added: Callable[[str], None]) -> None:
    added("monthly_invoices.py")
    assert task_modules(()) == ["services.tasks.monthly_invoices"]


def test_what_is_no_module_is_left_out(added: Callable[[str], None]) -> None:
    added("README.md")
    added("data/table.csv")
    assert task_modules(()) == []


def test_imports_come_after_what_is_found(added: Callable[[str], None]) -> None:
    added("invoices.py")
    assert task_modules(("shop.tasks", "shop.reports")) == ["services.tasks.invoices", "shop.tasks", "shop.reports"]
