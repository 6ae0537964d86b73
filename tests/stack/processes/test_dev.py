"""make dev: a change of the source is taken up, warm; a mistake is refused, and the old code goes on."""

import re
from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.stack.containers.deployment import save
from tests.stack.deployment import MAKE_SECONDS
from tests.stack.dev import Dev
from tests.stack.processes.deployment import Local

MODULE = "services/tasks/own_module.py"
WORD = "services.tasks.own_module.word"


@pytest.fixture
def dev(local: Local) -> Iterator[Dev]:
    dev = Dev(local)
    try:
        yield dev
    finally:
        dev.interrupt()
        dev.process.wait(MAKE_SECONDS)


@pytest.mark.slow
def test_a_change_is_taken_up_warm_and_mistakes_are_refused(local: Local, dev: Dev) -> None:
    dev.says("Watching config/ and services/")
    before = local.pids()
    old = local.run_task(WORD)
    module = local.directory / MODULE
    good = module.read_text()

    save(module, good + "def broken(:\n")
    dev.says("; the old code goes on")
    save(module, good + "no_such_name\n")
    dev.says("; the old code goes on", times=2)
    line = len(good.splitlines()) + 1
    output = dev.log.read_text()
    assert f"error: {MODULE} line {line}: SyntaxError: " in output
    assert f"error: {MODULE} line {line}: NameError: name 'no_such_name' is not defined; the old code" in output
    assert local.pids() == before
    assert local.run_task(WORD) == old

    label, word = f"edited-{uuid4().hex}", uuid4().hex
    running = local.start(label)

    def edit() -> None:
        save(module, good.replace(f'WORD = "{old}"', f'WORD = "{word}"'))
        dev.says("the new code runs")

    local.end_while(edit, label)
    assert running.get()
    assert local.run_task(WORD) == word
    assert local.pids()["redis"] == before["redis"]

    running_programs = local.pids()
    dev.interrupt()
    dev.process.wait(MAKE_SECONDS)
    assert "Watching has ended; the stack goes on" in dev.log.read_text()
    assert "Traceback" not in dev.log.read_text()
    assert local.pids() == running_programs
    assert local.make("up").returncode == 0
    assert local.pids() == running_programs, "what make dev has put to work is what make up would"


@pytest.mark.slow
def test_what_changes_while_the_stack_starts_is_taken_up(local: Local, dev: Dev) -> None:
    module, word = local.directory / MODULE, uuid4().hex
    dev.says("Starting …")
    save(module, re.sub(r'WORD = ".*"', f'WORD = "{word}"', module.read_text()))
    dev.says("the new code runs")
    assert f" {MODULE} …" in dev.log.read_text()
    assert local.run_task(WORD) == word
