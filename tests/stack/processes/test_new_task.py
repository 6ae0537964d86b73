"""make new-task: the module and its test are good as they are written, and found after `make up`."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.stack.processes.deployment import Local


def test_a_new_task_is_found_after_up_and_its_test_passes(local: Local) -> None:
    output = local.make("new-task", NAME="letters_of_ours").stdout
    assert "Wrote services/tasks/letters_of_ours.py and tests/unit/tasks/test_letters_of_ours.py." in output
    assert """make up && make call TASK=services.tasks.letters_of_ours.process ARGS='["first"]'""" in output
    local.make("up")
    assert local.run_task("services.tasks.letters_of_ours.process", "first") == "first is done"
    test = "tests/unit/tasks/test_letters_of_ours.py"
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


def test_make_passes_the_name_on_and_says_what_is_wrong(bare: Callable[..., Local]) -> None:
    done = bare().make("new-task", check=False, NAME="it's $HOME")
    assert done.returncode == 2
    assert """error: NAME: found "it's $HOME"; it must be a module's name""" in done.stderr
