"""Workers: every pool, several containers, and what becomes of a task when its worker is told to stop."""

import json
from collections.abc import Iterator

import pytest

from services.broker import keys
from tests.stack.containers.deployment import Stack
from tests.stack.deployment import Deployment
from tests.support.documents import block

# Tasks that run beside one that takes all memory, and how many of those there are, one after the other.
INNOCENTS = [[None]] * 8
HOGS = 5
# The default of WORKER_MAX_DELIVERIES.
DELIVERIES = 5
SOLO = """
  worker-solo:
    extends: {file: compose.yaml, service: worker}
    environment: {WORKER_QUEUES: one, WORKER_POOL: solo, WORKER_CONCURRENCY: "1"}
"""


@pytest.fixture(scope="module")
def two_kinds(first_stack: tuple[Stack, str]) -> Stack:
    """The stack with the second worker service of docs/operations.md, and a third one of the same form."""
    stack, _ = first_stack
    stack.settle()
    stack.override.write_text(block("docs/operations.md", "second-worker") + SOLO)
    stack.make("up")
    return stack


def test_a_result_comes_through_each_pool(two_kinds: Stack) -> None:
    stack = two_kinds
    marks = {queue: stack.send_marks([0], queue=queue) for queue in ("celery", "io", "one")}
    for mark in marks.values():
        mark.wait_finished()
    shown = stack.make("status").stdout
    pools = {line.split()[0]: line.split()[1:3] for line in shown.splitlines() if line.startswith("node0@")}
    ran = [pools[node] for mark in marks.values() for node in mark.nodes()]
    assert ran == [["prefork", "2"], ["threads", "20"], ["solo", "1"]]


def test_a_second_worker_that_is_taken_out_again_is_gone_with_the_next_make_up(two_kinds: Stack) -> None:
    two_kinds.override.unlink()
    two_kinds.make("up")
    assert {container["Service"] for container in two_kinds.containers()} == {"redis", "worker", "beat", "flower"}


@pytest.fixture(scope="module")
def three_workers(first_stack: tuple[Stack, str]) -> Stack:
    """The stack as scaled by plain Compose."""
    stack, _ = first_stack
    stack.settle()
    stack.compose("up", "--detach", "--scale", "worker=3")
    stack.wait_healthy()
    return stack


def test_three_workers_share_the_work(three_workers: Stack) -> None:
    # One for each child of each node: nobody could run two of them at a time.
    marks = three_workers.send_marks(*[[None]] * 6)
    marks.wait_started(6)
    marks.release()
    marks.wait_finished()
    assert len(marks.nodes()) == 3
    three_workers.wait(lambda: set(three_workers.nodes_in_flower()) == marks.nodes(), "the three nodes in Flower")


def test_what_a_worker_runs_when_it_is_scaled_away_is_run_by_another(three_workers: Stack) -> None:
    stack = three_workers
    # Each child of each node has one; those that are cut off end at once when they are begun anew.
    marks = stack.send_marks(*[[None, 0]] * 6)
    marks.wait_started(6)
    stack.make("scale", WORKERS="2")
    assert len(stack.ids("worker")) == 2
    marks.release()
    marks.wait_finished()
    begun_twice = [mark["task"] for mark in marks.all("started")[6:]]
    assert len(begun_twice) == 2
    finished_by = {mark["task"]: mark["node"] for mark in marks.all("finished")}
    assert all(
        finished_by[mark["task"]] != mark["node"] for mark in marks.all("started")[:6] if mark["task"] in begun_twice
    )
    stack.wait(lambda: len(stack.nodes_in_flower()) == 2, "the worker that is gone disappears from Flower")


def test_make_up_keeps_what_make_scale_has_set(three_workers: Stack) -> None:
    assert three_workers.env_value("WORKERS") == "2"
    before = three_workers.ids()
    three_workers.make("up")
    assert three_workers.ids() == before
    three_workers.make("scale", WORKERS="1")
    assert len(three_workers.ids("worker")) == 1


@pytest.mark.slow
def test_a_task_that_ends_in_time_ends_before_its_worker_stops(with_long_grace: Stack) -> None:
    stack = with_long_grace
    stack.compose("up", "--detach", "--no-deps", "worker")
    stack.wait_healthy()
    marks = stack.send_marks([None])
    marks.wait_started()
    stack.stop_while_they_run(lambda: stack.compose("stop", "worker"), marks)
    assert marks.unfinished() == set()
    assert len(marks.all("started")) == 1
    assert stack.inspect(stack.ids("worker")[0])["State"]["ExitCode"] == 0


@pytest.mark.slow
def test_a_task_that_takes_too_long_waits_again_when_its_worker_has_stopped(stack: Stack) -> None:
    marks = stack.send_marks([None, 0], [None, 0], [0], [0])
    marks.wait_started(2)
    stack.compose("stop", "worker")
    assert stack.inspect(stack.ids("worker")[0])["State"]["ExitCode"] == 0
    assert stack.queued() == 4
    assert stack.redis("HLEN", "unacked") == "0"
    stack.compose("start", "worker")
    marks.wait_finished()
    assert len(marks.all("started")) == 6


def test_a_node_that_is_killed_is_back(deployment: Deployment) -> None:
    deployment.kill_node()
    assert deployment.add() == 7


@pytest.fixture
def small(stack: Stack) -> Iterator[Stack]:
    """The stack with a worker of nine children in 256 MB, half of which they take."""
    stack.purge_dead_letters()
    # A short lease, so that those whose node dies come to their last start within the test.
    given = {"WORKER_MEMORY": "256m", "WORKER_CONCURRENCY": str(len(INNOCENTS) + 1), "WORKER_LEASE": "10"}
    stack.compose("up", "--detach", "--no-deps", "worker", variables=given)
    stack.wait_healthy()
    yield stack
    stack.compose("up", "--detach", "--no-deps", "worker")
    stack.purge_dead_letters()


@pytest.mark.slow
def test_a_task_that_takes_all_memory_becomes_a_dead_letter_alone(small: Stack) -> None:
    before, node = small.inspected("worker")[0], small.node_pid()
    hogs: list[str] = []
    again = 0
    for _ in range(HOGS):
        innocents = small.send_marks(*INNOCENTS)
        innocents.wait_started(len(INNOCENTS))
        (hog,) = small.send("services.tasks.own_tasks.hog", [])
        hogs.append(hog)
        # Asked of Redis: a command in the worker's container would need memory there while the task takes it all.
        small.wait(lambda: int(small.redis("ZCARD", keys.DEAD_LETTERS)) >= len(hogs), "the next dead letter")
        assert letters(small) == [[hog, "crashed"] for hog in hogs], small.describe()
        assert {mark["task"] for mark in innocents.all("started")} == set(innocents.tasks), small.describe()
        innocents.release()
        innocents.wait_finished()
        again += len(innocents.all("started")) - len(INNOCENTS)
    # The kernel frees the files of a killed task last, and may kill one more child meanwhile (docs/operations.md): no
    # task beside it starts again without that.
    killed = small.docker("logs", before["Id"]).count("exited with 'signal 9 (SIGKILL)'")
    assert killed == len(hogs) * DELIVERIES + again, small.describe()
    # Seen after 1 of 25 such deaths in some runs; a kernel that takes one along regularly makes it 25.
    assert again <= len(hogs), small.describe()
    after = small.inspected("worker")[0]
    assert small.node_pid() == node, small.describe()
    assert (after["Id"], after["RestartCount"]) == (before["Id"], before["RestartCount"])


def letters(stack: Stack) -> list[list[str]]:
    """Which tasks are dead letters and why, oldest first."""
    output = json.loads(stack.make("dead-letters", JSON="1").stdout)
    return [[letter["task_id"], letter["reason"]] for letter in output["dead_letters"]]


def test_a_node_that_cannot_start_ends_its_container_with_an_error(stack: Stack) -> None:
    done = stack.compose(
        "run", "--rm", "-T", "--no-deps", "-e", "CELERY_IMPORTS=services.broken", "worker", check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert "RuntimeError: broken on purpose" in output
    assert "watchdog: node0 could not be started; its error is above; stopping the container" in output
