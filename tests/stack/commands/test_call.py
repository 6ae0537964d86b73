"""make call and the program behind it."""

import json
import os
import pty
import signal
import subprocess
from contextlib import suppress
from typing import Any, Self

import pytest

from tests.stack.containers.deployment import COMMAND_SECONDS, SERVICES, Marks, Stack
from tests.stack.deployment import Deployment

ADD = "services.tasks.arithmetic.add"


def test_make_call_prints_one_json_object_and_nothing_else(deployment: Deployment) -> None:
    done = deployment.make("call", TASK=ADD, ARGS="[4, 3]")
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
        ("services.tasks.own_tasks.mark", ["slow", [None]], 3, "no result after 1 s"),
    ],
    ids=[
        "success",
        "a task that fails",
        "a task that nobody defines",
        "arguments that do not fit",
        "no result in time",
    ],
)
def test_the_exit_code_of_a_call_tells_how_it_ended(
    stack: Stack, task: str, arguments: list[object], code: int, says: str
) -> None:
    answer, found = stack.call(task, *arguments, **({"wait": 1} if code == 3 else {}))
    if code == 3:
        Marks(stack, "slow", []).release()
    assert (found, says in json.dumps(answer)) == (code, True), answer


def test_arguments_that_are_no_json_are_named_and_make_fails(stack: Stack) -> None:
    done = stack.make("call", check=False, TASK=ADD, ARGS="[4, three]")
    assert done.returncode == 2
    assert "ARGS: found '[4, three]', which is not JSON" in json.loads(done.stdout)["error"]


def test_make_status_shows_containers_nodes_queues_and_beat_on_one_screen(stack: Stack) -> None:
    stack.send(ADD, [1, 2], [3, 4], queue="one")

    def nodes_answer() -> list[str]:
        # One that connects again just now hears nothing.
        lines = stack.make("status").stdout.splitlines()
        return lines if any(line.startswith("node0@") for line in lines) else []

    lines = stack.wait(nodes_answer, "the node in make status")
    healthy = [line.split()[0] for line in lines if "healthy" in line.split()]
    # The number at a name's end is Compose's: a container that took another's place has the next one.
    assert healthy == [container["Name"] for container in stack.containers()], lines
    assert len(healthy) == len(SERVICES), lines
    words = [line.split() for line in lines]
    assert ["one", "2"] in words
    assert ["held", "by", "workers", "(unacked)", "0"] in words
    assert any(line.startswith("Beat: last tick ") for line in lines)
    assert len(lines) <= 24


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, deployment: Deployment, *command: str) -> None:
        self._deployment = deployment
        self._ours, theirs = pty.openpty()
        streams: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        environment = deployment.environment(TERM="dumb")
        self.program = subprocess.Popen(
            command, cwd=deployment.directory, env=environment, start_new_session=True, **streams
        )
        os.close(theirs)
        os.set_blocking(self._ours, False)
        self.output = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.program.poll() is None:
            os.killpg(self.program.pid, signal.SIGKILL)
            self.program.wait(COMMAND_SECONDS)
        os.close(self._ours)

    def wait_for(self, text: str) -> None:
        """Return when the program has shown this."""

        def has_shown() -> bool:
            with suppress(BlockingIOError, OSError):
                self.output += os.read(self._ours, 65536).decode(errors="replace")
            return text in self.output

        self._deployment.wait(has_shown, f"{text!r} on the terminal")

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())


def test_a_command_inside_the_stack_asks_on_the_terminal(stack: Stack) -> None:
    with Terminal(stack, "make", "--old-file=.venv/ready", "purge-dead-letters") as terminal:
        terminal.wait_for("Type yes to go on: ")
        terminal.type("no\n")
        terminal.wait_for("error: nothing was deleted")


@pytest.mark.parametrize("service", ["beat", "worker"])
def test_make_logs_follows_one_service_until_ctrl_c_which_ends_nothing_else(
    deployment: Deployment, service: str
) -> None:
    before = deployment.units()
    # What the service logs at its start: for beat whatever its word was first, as "waiting" is none that it logs.
    logged = {"beat": "beat: ", "worker": "ready."}
    others = {"beat": ("worker-1", "worker1-node0"), "worker": ("beat: ", "beat-1")}
    with Terminal(deployment, *deployment.command("logs", SERVICE=service)) as terminal:
        terminal.wait_for(logged[service])
        if service == "worker":
            # Once it shows what there is, it follows what comes.
            answer = deployment.make("call", TASK=ADD, ARGS="[4, 3]").stdout
            terminal.wait_for(json.loads(answer)["id"])
        # A task that has failed has left its traceback in the log; the command leaves none.
        before_the_end = len(terminal.output)
        os.killpg(terminal.program.pid, signal.SIGINT)
        terminal.program.wait(COMMAND_SECONDS)
        terminal.wait_for("")
        assert "Traceback" not in terminal.output[before_the_end:], terminal.output
        for other in (*others[service], "redis-1"):
            assert other not in terminal.output
    assert deployment.units() == before


def test_logs_of_a_service_that_does_not_exist_are_refused(stack: Stack) -> None:
    asked = stack.make("logs", check=False, SERVICE="nope")
    assert "error: SERVICE: found 'nope'; there are beat, flower, redis, worker" in asked.stderr


def test_make_shell_has_the_app_and_the_tasks(stack: Stack) -> None:
    with Terminal(stack, *stack.command("shell")) as terminal:
        terminal.wait_for(">>>")
        terminal.type("print(app.main, add(40, 3), add.delay(50, 4).get(timeout=300))\n")
        terminal.wait_for("stalk 43 54")
        # With no memory left, the kernel kills this before any task.
        terminal.type("print('score', open('/proc/self/oom_score_adj').read())\n")
        terminal.wait_for("score 1000")
        terminal.type("exit()\n")
        assert terminal.program.wait(COMMAND_SECONDS) == 0
