"""make new-task: a small, tested task module to start from."""

import keyword
import re

from stack.errors import CommandError
from stack.paths import ROOT

NAME = re.compile(r"[a-z][a-z0-9_]{0,49}")

MODULE = '''\
"""{title}: say here what these tasks are about."""

from celery import shared_task
from celery.utils.log import get_task_logger

logger = get_task_logger(__name__)


@shared_task
def process(item: str) -> str:
    """Return what became of an item; put your own work in place of this.

    Idempotent: a task whose worker dies runs again, so a second run must do no harm. Raises ValueError if there
    is no item.
    """
    if not item:
        raise ValueError("item must not be empty")
    logger.info("processing %s", item)
    return f"{{item}} is done"
'''

TEST = '''\
"""services.tasks.{name}"""

import pytest

from services.tasks.{name} import process


def test_process_tells_what_became_of_the_item() -> None:
    assert process("first") == "first is done"


def test_process_refuses_an_empty_item() -> None:
    with pytest.raises(ValueError, match="item must not be empty"):
        process("")


def test_process_is_named_after_its_place() -> None:
    assert process.name == "services.tasks.{name}.process"
'''


def new_task(name: str) -> None:
    """Write a task module and its test; CommandError for a name that a module cannot have, or that is taken."""
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise CommandError(
            f"NAME: found {name!r}; it must be a module's name, up to 50 small letters, digits and underscores that "
            "begin with a letter, and no keyword of Python, as in: make new-task NAME=invoices"
        )
    package = ROOT / "services" / "tasks"
    module, test = package / f"{name}.py", ROOT / "tests" / "unit" / "tasks" / f"test_{name}.py"
    for path in (module, package / name, test):
        if path.exists():
            raise CommandError(f"{path.relative_to(ROOT)} is there already: choose another NAME")
    module.write_text(MODULE.format(title=name.replace("_", " ").strip().capitalize()), encoding="utf-8")
    test.write_text(TEST.format(name=name), encoding="utf-8")
    print(f"Wrote {module.relative_to(ROOT)} and {test.relative_to(ROOT)}.")
    print(f"  Test it:  make test ARGS={test.relative_to(ROOT)}")
    print(f"  Run it:   make up && make call TASK=services.tasks.{name}.process ARGS='[\"first\"]'")
