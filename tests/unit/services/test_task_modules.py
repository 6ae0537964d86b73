"""services.task_modules"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import services.tasks
from services.task_modules import find_task_modules

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
    assert set(find_task_modules(())) == {f"services.tasks.{name}" for name in files}
    assert "services.tasks.arithmetic" in find_task_modules(())


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["invoices.py"], ["invoices"]),
        (["shop/__init__.py", "shop/orders.py"], ["shop", "shop.orders"]),
        (["monthly_invoices.py"], ["monthly_invoices"]),
        (["README.md", "data/table.csv"], []),
        *(
            ([hidden, "invoices.py", "shop/__init__.py", "_private/__init__.py"], ["invoices", "shop"])
            for hidden in ("_helpers.py", "__main__.py", "shop/_helpers.py", "_private/orders.py")
        ),
    ],
)
def test_modules_and_sub_packages_are_found_whose_names_begin_with_no_underscore(
    added: Callable[[str], None], files: list[str], found: list[str]
) -> None:
    for file in files:
        added(file)
    assert find_task_modules(()) == [f"services.tasks.{name}" for name in found]


def test_imports_come_after_what_is_found(added: Callable[[str], None]) -> None:
    added("invoices.py")
    assert find_task_modules(("shop.tasks", "shop.reports")) == [
        "services.tasks.invoices",
        "shop.tasks",
        "shop.reports",
    ]
