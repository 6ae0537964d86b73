"""services.task_modules"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import services.tasks
from services.task_modules import find_task_modules

SHIPPED = Path(services.tasks.__file__).parent


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of services.tasks, empty."""
    monkeypatch.setattr(services.tasks, "__path__", [str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_every_module_that_ships_is_found() -> None:
    files = {path.stem for path in SHIPPED.glob("*.py")} - {"__init__"}
    assert set(find_task_modules(())) == {f"services.tasks.{name}" for name in files}
    assert "services.tasks.arithmetic" in find_task_modules(())


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["monthly_invoices.py"], ["monthly_invoices"]),
        (["shop/__init__.py", "shop/orders.py"], ["shop", "shop.orders"]),
        (["README.md", "data/table.csv"], []),
        *(
            ([hidden, "invoices.py", "shop/__init__.py", "_private/__init__.py"], ["invoices", "shop"])
            for hidden in ("_helpers.py", "__main__.py", "shop/_helpers.py", "_private/orders.py")
        ),
    ],
)
def test_modules_and_sub_packages_are_found_whose_names_begin_with_no_underscore_and_then_the_imports(
    directory: Path, files: list[str], found: list[str]
) -> None:
    for file in files:
        (directory / file).parent.mkdir(exist_ok=True)
        (directory / file).touch()
    imports = ("shop.tasks", "shop.reports")
    assert find_task_modules(imports) == [*(f"services.tasks.{name}" for name in found), *imports]
