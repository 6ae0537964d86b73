"""stack.commands.new_task: which names it takes, and that it overwrites nothing."""

from pathlib import Path

import pytest

from stack.commands import new_task
from stack.errors import CommandError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The services/tasks/ of a checkout with nothing else in it."""
    monkeypatch.setattr(new_task, "ROOT", tmp_path)
    (tmp_path / "tests" / "unit" / "tasks").mkdir(parents=True)
    (tmp_path / "services" / "tasks").mkdir(parents=True)
    return tmp_path / "services" / "tasks"


@pytest.mark.parametrize(
    "name", ["", "Invoices", "_hidden", "1st", "two words", "in-voices", "../escape", "class", "a" * 51, "a\n"]
)
def test_a_name_that_is_no_modules_is_refused(package: Path, name: str) -> None:
    with pytest.raises(CommandError) as failure:
        new_task.new_task(name)
    assert str(failure.value).startswith(f"NAME: found {name!r}; it must be a module's name")
    assert list(package.iterdir()) == []


@pytest.mark.parametrize("there", ["services/tasks/taken.py", "services/tasks/taken", "tests/unit/tasks/test_taken.py"])
def test_what_is_there_is_not_overwritten(package: Path, there: str) -> None:
    path = package.parents[1] / there
    path.write_text("mine\n")
    with pytest.raises(CommandError, match=f"^{there} is there already: choose another NAME$"):
        new_task.new_task("taken")
    assert path.read_text() == "mine\n"
    assert len([found for found in package.parents[1].rglob("*") if found.is_file()]) == 1
