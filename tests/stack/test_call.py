"""make call and the program behind it."""

from __future__ import annotations

import json
import os
import pty
import subprocess

import pytest

from tests.stack.handle import Stack

ADD = "services.tasks.arithmetic.add"


def test_make_call_prints_one_json_object_and_nothing_else(stack: Stack) -> None:
    done = stack.make("call", TASK=ADD, ARGS="[4, 3]")
    assert done.stdout.count("\n") == 1
    answer = json.loads(done.stdout)
    assert answer.pop("id")
    assert answer == {"state": "SUCCESS", "result": 7}


def test_arguments_reach_the_task_as_they_were_typed(stack: Stack) -> None:
    arguments = ["it's $HOME $(id) `id` # \"", " \\ ; $$ %"]
    done = stack.make("call", TASK=ADD, ARGS="[]", KWARGS=json.dumps(dict(zip("xy", arguments, strict=True))))
    assert json.loads(done.stdout)["result"] == "".join(arguments)


@pytest.mark.parametrize(
    ("task", "arguments", "code", "says"),
    [
        (ADD, [4, 3], 0, "SUCCESS"),
        (ADD, [4, "three"], 1, "TypeError"),
        ("services.tasks.arithmetic.ad", [4, 3], 2, "did you mean services.tasks.arithmetic.add?"),
        (ADD, [4], 2, "missing 1 required positional argument"),
        ("services.tasks.own_tasks.mark", ["slow", [3]], 3, "no result after 1 s"),
    ],
    ids=["success", "a task that fails", "a task that nobody defines", "arguments that do not fit", "no result in time"],
)
def test_the_exit_code_of_a_call_tells_how_it_ended(
    stack: Stack, task: str, arguments: list[object], code: int, says: str
) -> None:
    answer, found = stack.call(task, *arguments, wait=1 if code == 3 else 60)
    assert (found, says in json.dumps(answer)) == (code, True), answer


def test_arguments_that_are_no_json_are_named_and_make_fails(stack: Stack) -> None:
    done = stack.make("call", check=False, TASK=ADD, ARGS="[4, three]")
    assert done.returncode == 2
    assert "ARGS: found '[4, three]', which is not JSON" in json.loads(done.stdout)["error"]


def test_make_status_shows_containers_nodes_queues_and_beat_on_one_screen(stack: Stack) -> None:
    stack.send("services.tasks.arithmetic.add", [1, 2], [3, 4], queue="one")
    shown = stack.make("status").stdout
    for service in ("redis", "worker", "beat", "flower"):
        assert f"{stack.project}-{service}-1" in shown
    for word in ("node0@", "prefork", "held by workers (unacked)", "Beat: last tick"):
        assert word in shown
    assert ["one", "2"] in [line.split() for line in shown.splitlines()]
    assert len(shown.splitlines()) <= 24


def test_make_logs_follows_one_service(stack: Stack) -> None:
    command = ["make", "--old-file=.venv/ready", "logs", "SERVICE=beat"]
    reader = subprocess.Popen(
        command, cwd=stack.directory, env=stack.environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert reader.stdout
        assert "beat-1" in reader.stdout.readline()
    finally:
        os.killpg(reader.pid, 15)
        reader.wait(20)


def test_make_shell_has_the_app_and_the_tasks(stack: Stack) -> None:
    ours, theirs = pty.openpty()
    command = ["make", "--old-file=.venv/ready", "shell"]
    shell = subprocess.Popen(
        command, cwd=stack.directory, env=stack.environment(TERM="dumb"), stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = ""

    def says(text: str) -> bool:
        nonlocal shown
        try:
            shown += os.read(ours, 65536).decode(errors="replace")
        except BlockingIOError:
            pass
        return text in shown

    try:
        stack.wait(lambda: says(">>>"), "a prompt", 60)
        os.write(ours, b"print(app.main, add(40, 3), add.delay(50, 4).get(timeout=30))\n")
        stack.wait(lambda: says("stalk 43 54"), "an answer", 60)
        os.write(ours, b"exit()\n")
        assert shell.wait(30) == 0
    finally:
        shell.kill()
        os.close(ours)
