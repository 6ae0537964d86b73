"""make dev: the containers run this checkout's source, nodes are restarted on a change of it, mistakes are refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack.containers.deployment import Stack, save
from tests.stack.deployment import MAKE_SECONDS
from tests.stack.dev import Dev

TASK = "services.tasks.edited.word"
MODULE = """\
from celery import shared_task


@shared_task
def word() -> str:
    return "{word}"
"""


@pytest.fixture
def module(with_long_grace: Stack) -> Iterator[Path]:
    """A task module that is edited; afterwards the containers run the image again."""
    path = with_long_grace.directory / "services" / "tasks" / "edited.py"
    yield path
    path.unlink(missing_ok=True)
    with_long_grace.make("up")


@pytest.mark.slow
def test_a_change_is_taken_up_warm_and_mistakes_are_refused(stack: Stack, module: Path) -> None:
    dev = Dev(stack)
    try:
        dev.says("Watching config/ and services/")
        worker = stack.ids("worker")
        marks = stack.send_marks([None])
        marks.wait_started()

        def edit() -> None:
            # As an editor under umask 077 saves it: the container's user must still be able to read it.
            save(module, MODULE.format(word="first"))
            dev.says("the new code runs")

        stack.stop_while_they_run(edit, marks)
        assert len(marks.all("started")) == 1
        marks.wait_finished()
        assert stack.call(TASK)[0]["result"] == "first"

        save(module, MODULE.format(word="broken") + "def (\n")
        dev.says("; the old code goes on")
        assert "services/tasks/edited.py line 7: SyntaxError" in dev.log.read_text()
        save(module, MODULE.format(word="broken") + "no_such_name\n")
        dev.says("; the old code goes on", times=2)
        assert "services/tasks/edited.py line 7: NameError" in dev.log.read_text()

        save(module, MODULE.format(word="second"))
        dev.says("the new code runs", times=2)
        assert stack.call(TASK)[0]["result"] == "second"
        assert stack.ids("worker") == worker, "the nodes are new, their container is not"

        # A worker that is added meanwhile runs the same.
        stack.make("scale", WORKERS="2")
        mounted = [mount["Destination"] for one in stack.ids("worker") for mount in stack.inspect(one)["Mounts"]]
        assert mounted.count("/app/services") == 2
    finally:
        dev.interrupt()
        dev.process.wait(MAKE_SECONDS)
    assert "Watching has ended; the stack goes on" in dev.log.read_text()
    assert len(stack.ids("worker")) == 2
    stack.make("scale", WORKERS="1")
    assert stack.call(TASK)[0]["result"] == "second"

    stack.make("up")
    assert not any(mount["Destination"] == "/app/services" for mount in stack.inspect(stack.ids("worker")[0])["Mounts"])
    assert stack.call(TASK)[0]["result"] == "second"
