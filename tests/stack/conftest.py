"""The stacks that all tests here share, one per runtime, and the Docker Engine that containers need."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.stack.containers import own_tasks
from tests.stack.containers.deployment import Stack, clone, environment, one_at_a_time
from tests.stack.deployment import Deployment
from tests.stack.processes import own_module
from tests.stack.processes.deployment import PROGRAMS, Local, kill
from tests.support.pytest_plugins.scheduling import RUNTIMES
from tests.support.task_modules import probe

# An engine that answers does so within a second, beside much else within a few; after that it counts as none.
ENGINE_SECONDS = 60
# A sentence that is the same for every test and on every machine: the summary counts by it.
NO_ENGINE = "no Docker Engine answers"
# Short where a test waits for it.
SETTINGS = {
    "WORKER_CONCURRENCY": "2",
    "WORKER_SOFT_SHUTDOWN": "8",
    "WORKER_STOP_GRACE_PERIOD": "23",
    "WORKER_HEARTBEAT_TIMEOUT": "45",
    # Nothing runs by itself: tests count what is in the queue.
    "BEAT_SCHEDULE": "report-free-space=off",
    "FLOWER_URL_PREFIX": "/flower",
    "FLOWER_STATE_SAVE_INTERVAL": "1",
    "FLOWER_PURGE_OFFLINE_WORKERS": "5",
}


@pytest.fixture(scope="session")
def docker_engine() -> None:
    """Skip where no Docker Engine answers, or fail with STALK_REQUIRE_DOCKER=1."""
    why = missing_engine()
    if not why:
        return
    if os.environ.get("STALK_REQUIRE_DOCKER") == "1":
        pytest.fail(f"STALK_REQUIRE_DOCKER=1, and {NO_ENGINE}: {why}")
    pytest.skip(NO_ENGINE)


def missing_engine() -> str:
    """Why there is no Docker Engine; empty when there is one."""
    try:
        asked = ["docker", "info", "--format", "{{.ServerVersion}}"]
        done = subprocess.run(
            asked, env=environment(), capture_output=True, text=True, timeout=ENGINE_SECONDS, check=False
        )
    except FileNotFoundError:
        return "there is no docker on PATH"
    except subprocess.TimeoutExpired:
        return f"docker info has not ended within {ENGINE_SECONDS} s"
    return "" if done.returncode == 0 else done.stderr.strip() or f"docker info exited with {done.returncode}"


@pytest.fixture(scope="session")
def first_stack(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, str]]:
    """The stack in a fresh clone, started by its first `make up`, and what that printed."""
    # As under umask 077: whatever a container cannot read then, no test will find working.
    directory = clone(tmp_path_factory.mktemp("stack") / "clone", mode_mask=0o077)
    shutil.copy(own_tasks.__file__, directory / "services" / "tasks" / "own_tasks.py")
    (directory / "services" / "broken.py").write_text('raise RuntimeError("broken on purpose")\n')
    # A busy machine needs more to answer; a node whose solo pool is at work never does.
    status = directory / "services" / "commands" / "status.py"
    before, text, after = status.read_text().partition("\nANSWER_SECONDS = 1.0")
    assert text, "services/commands/status.py has no ANSWER_SECONDS = 1.0"
    status.write_text(f"{before}\nANSWER_SECONDS = 20.0{after}")
    stack = Stack(directory, f"stalk-test-{os.getpid()}", **SETTINGS)
    try:
        with one_at_a_time():
            output = stack.make("up").stdout
        yield stack, output
    finally:
        stack.override.unlink(missing_ok=True)
        stack.make("clean", check=False, YES="1")
        left = stack.remains()
        # What `make clean` leaves is a fault, and still must not stay.
        stack.remove()
        assert not left, f"make clean has left {left}"


@pytest.fixture
def stack(first_stack: tuple[Stack, str]) -> Stack:
    """The shared stack with one healthy container of each service and empty queues."""
    shared, _ = first_stack
    shared.settle()
    return shared


@pytest.fixture
def with_long_grace(stack: Stack) -> Iterator[Stack]:
    """The shared stack, whose workers leave their tasks all the time that a test may need to let them end."""
    before = dict(stack.settings)
    # A test wakes them within seconds, on a busy machine within a minute.
    stack.settings.update(WORKER_SOFT_SHUTDOWN="200", WORKER_STOP_GRACE_PERIOD="220")
    yield stack
    stack.settings.clear()
    stack.settings.update(before)


@pytest.fixture
def other_stack(docker_engine: None, tmp_path: Path) -> Iterator[Stack]:
    """A second fresh clone, in which nothing has been started yet."""
    other = Stack(clone(tmp_path / "clone"), f"stalk-test-{os.getpid()}-other", **SETTINGS)
    yield other
    if other.remains():
        other.remove()


# ---- the stack as processes


@pytest.fixture(scope="session")
def first_up() -> Iterator[tuple[Local, str]]:
    """The stack after its first `make up`, and what that printed."""
    # pytest's own directories have long names, and a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="stalk-") as base:
        local = Local(Path(base))
        prepare(local)
        try:
            yield local, local.make("up").stdout
        finally:
            local.make("clean", check=False, YES="1")
            left = local.left()
            for process in left:
                # What `make clean` leaves is a fault, and still must not stay.
                kill(int(process.split()[0]))
        assert not left, f"make clean has left {left}"
        assert sorted(local.home.iterdir()) == []
        assert sorted(local.scratch.iterdir()) == []


def prepare(local: Local) -> None:
    """The checkout of somebody who has begun to work: tasks and variables of their own."""
    shutil.copy(probe.__file__, local.directory / "own_probe.py")
    shutil.copy(own_module.__file__, local.directory / "services" / "tasks" / "own_module.py")
    # The answer of a node on a busy machine.
    local.replace("services/commands/status.py", "\nANSWER_SECONDS = 1.0", "\nANSWER_SECONDS = 60.0")
    local.tasks_file.write_text(
        f"PROBE_LOG='{str(local.directory / 'probe.log').replace(chr(39), chr(92) + chr(39))}'\n"
    )


@pytest.fixture
def local(first_up: tuple[Local, str]) -> Local:
    """The shared stack with one worker, everything running, and empty queues; settings may differ from test to test."""
    local, _ = first_up
    if not all_run(local):
        local.set_variable(local.env_file, "WORKERS", "1")
        (local.state / "runtime").write_text("local\n")
        local.make("up")
    local.redis().delete("celery", "unacked", "unacked_index")
    return local


def all_run(local: Local) -> bool:
    """Whether there is one of each program, and it runs."""
    states = {name: process["statename"] for name, process in local.processes().items()}
    words = [path.read_text().strip() for path in local.run.glob("*.heartbeat")]
    return (
        sorted(states) == list(PROGRAMS)
        and set(states.values()) <= {"RUNNING", "STARTING"}
        and sorted(words) == ["ready", "ready", "ticking"]
    )


@pytest.fixture
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Local]]:
    """Makes a checkout in which nothing has been started; nothing may run in it afterwards."""
    made: list[Local] = []
    with tempfile.TemporaryDirectory(prefix="stalk-") as base:

        def make(name: str = "checkout") -> Local:
            made.append(Local(Path(base), name))
            return made[-1]

        yield make
        assert [local.left() for local in made] == [[] for _ in made]


# ---- either


@pytest.fixture(params=RUNTIMES, ids=lambda fixture: {"stack": "containers", "local": "processes"}[fixture])
def deployment(request: pytest.FixtureRequest) -> Deployment:
    """The shared stack of each runtime: for what both do alike."""
    shared: Deployment = request.getfixturevalue(request.param)
    return shared
