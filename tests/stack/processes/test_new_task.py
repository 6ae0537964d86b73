"""make new-task: the module and its test are good as they are written, and found after `make up`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stack.commands import new_task
from stack.errors import CommandError
from tests.stack.processes.handle import Local


def test_a_new_task_is_found_after_up_and_its_test_passes(local: Local) -> None:
    said = local.make("new-task", NAME="letters_of_ours").stdout
    assert "Wrote services/tasks/letters_of_ours.py and tests/unit/test_tasks_letters_of_ours.py." in said
    assert """make up && make call TASK=services.tasks.letters_of_ours.process ARGS='["first"]'""" in said
    local.make("up")
    assert local.run_task("services.tasks.letters_of_ours.process", "first") == "first is done"
    test = "tests/unit/test_tasks_letters_of_ours.py"
    tried = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        cwd=local.directory,
        env=local.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "3 passed" in tried.stdout, tried.stdout + tried.stderr


@pytest.mark.parametrize(
    "linter",
    [
        pytest.param("ruff check", id="ruff"),
        pytest.param("ruff format --check", id="format"),
        # It reads the types of all that Python brings along first.
        pytest.param("mypy --follow-imports=silent", id="mypy", marks=pytest.mark.slow),
    ],
)
def test_what_is_written_passes_the_linters(bare: Callable[..., Local], linter: str) -> None:
    local = bare()
    local.make("new-task", NAME="a_name_that_has_almost_as_many_letters_as_it_may")
    files = [str(path) for path in local.directory.rglob("*almost_as_many*")]
    assert len(files) == 2
    tried = subprocess.run(
        [sys.executable, "-m", *linter.split(), *files],
        cwd=local.directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tried.returncode == 0, tried.stdout + tried.stderr


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The services/tasks/ of a checkout with nothing else in it."""
    monkeypatch.setattr(new_task, "ROOT", tmp_path)
    (tmp_path / "tests" / "unit").mkdir(parents=True)
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


@pytest.mark.parametrize("there", ["services/tasks/taken.py", "services/tasks/taken", "tests/unit/test_tasks_taken.py"])
def test_what_is_there_is_not_overwritten(package: Path, there: str) -> None:
    path = package.parents[1] / there
    path.write_text("mine\n")
    with pytest.raises(CommandError, match=f"^{there} is there already: choose another NAME$"):
        new_task.new_task("taken")
    assert path.read_text() == "mine\n"
    assert len([found for found in package.parents[1].rglob("*") if found.is_file()]) == 1


def test_make_passes_the_name_on_and_says_what_is_wrong(bare: Callable[..., Local]) -> None:
    done = bare().make("new-task", check=False, NAME="it's $HOME")
    assert done.returncode == 2
    assert """error: NAME: found "it's $HOME"; it must be a module's name""" in done.stderr
