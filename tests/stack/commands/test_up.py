"""make up: the first time, again, and after a change."""

import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack.containers.deployment import Stack, sentences
from tests.stack.deployment import Deployment

# Every character that one of Compose, make, sh, Python and an URL reads in a way of its own.
PASSWORD = 'pa$$w#rd $HOME ${x} it\'s "q" :/?@%41,;é'
IN_ENV_FILE = "'" + PASSWORD.replace("'", "\\'") + "'"


def test_the_first_make_up_writes_secrets_and_says_where_to_look(first_stack: tuple[Stack, str]) -> None:
    stack, output = first_stack
    assert stat.S_IMODE(stack.env_file.stat().st_mode) == 0o600
    assert "Wrote .env, with random passwords (mode 0600)." in output
    assert f"http://127.0.0.1:{stack.port}/flower/ (user admin, password in .env at FLOWER_BASIC_AUTH)" in output
    assert "make call TASK=services.tasks.arithmetic.add ARGS='[4, 3]'" in output
    written = dict(re.findall(r"^(REDIS_PASSWORD|FLOWER_BASIC_AUTH)=(.+)$", stack.env_file.read_text(), re.MULTILINE))
    for secret in (written["REDIS_PASSWORD"], written["FLOWER_BASIC_AUTH"].removeprefix("admin:")):
        assert len(secret) >= 32
        assert secret not in output


def test_make_up_again_changes_nothing(deployment: Deployment) -> None:
    before = deployment.units(), deployment.env_file.read_bytes()
    runtime = deployment.status()["runtime"]
    assert f"Runtime: {runtime} (as before)." in deployment.make("up").stdout
    assert (deployment.units(), deployment.env_file.read_bytes()) == before


def test_a_mistake_in_what_is_about_to_run_is_one_sentence_and_the_old_stack_goes_on(deployment: Deployment) -> None:
    before = deployment.units()
    mistakes = {
        "import json\nno_such_name\n": "line 2: NameError: name 'no_such_name' is not defined; ",
        "def broken(:\n": "line 1: SyntaxError: ",
    }
    for text, says in mistakes.items():
        broken = deployment.write_task("broken", text)
        try:
            done = deployment.make("up", check=False)
        finally:
            broken.unlink()
        assert done.returncode == 2, done
        first, last = done.stderr.splitlines()
        assert first.startswith(f"error: services/tasks/broken.py {says}")
        assert first.endswith("; nothing was started or replaced")
        # 2 is also what make itself makes of every failure.
        assert last.startswith("make: *** ")
        assert last.endswith("Error 2")
    assert deployment.units() == before
    assert deployment.add() == 7


def test_a_refused_up_leaves_the_image_that_an_added_container_would_run(stack: Stack) -> None:
    broken = stack.write_task("broken", "no_such_name\n")
    try:
        stack.make("up", check=False)
    finally:
        broken.unlink()
    tagged = stack.docker("image", "inspect", "--format={{.Id}}", f"{stack.project}-app").split()
    assert tagged == [stack.inspect(one)["Image"] for one in stack.ids("worker")]


@pytest.fixture(scope="module")
def changed_stack(first_stack: tuple[Stack, str]) -> Iterator[Stack]:
    """The stack after changes of its settings and one more `make up`; afterwards it is as it was."""
    stack, _ = first_stack
    stack.settle()
    before = stack.env_file.read_bytes()
    stack.set_variables(f"REDIS_PASSWORD={IN_ENV_FILE}\nFLOWER_BASIC_AUTH='ops:a,b:c$d\\'é'\nLOG_LEVEL=debug\n")
    stack.make("up")
    yield stack
    stack.env_file.write_bytes(before)
    stack.make("up")


def test_a_change_of_env_is_picked_up(changed_stack: Stack) -> None:
    assert changed_stack.environment_of("worker")["LOG_LEVEL"] == "debug"
    assert "DEBUG" in changed_stack.logs("worker")


def test_a_password_with_special_characters_is_the_same_everywhere(changed_stack: Stack) -> None:
    assert changed_stack.environment_of("redis")["REDIS_PASSWORD"] == PASSWORD
    assert changed_stack.call("services.tasks.arithmetic.add", 4, 3)[1] == 0
    assert changed_stack.redis("PING") == "PONG"
    assert changed_stack.login() == "ops:a,b:c$d'é"
    assert changed_stack.flower("/flower/", "ops:a,b:c$d'é").status == 200
    assert changed_stack.flower("/flower/", "ops:a").status == 401


def test_a_change_of_redis_conf_is_picked_up_and_keeps_the_data(stack: Stack) -> None:
    stack.redis("SET", "mine", "kept")
    configuration = stack.directory / "docker" / "redis" / "redis.conf"
    configuration.write_text(configuration.read_text().replace("tcp-keepalive 60", "tcp-keepalive 61"))
    others = [stack.ids(service) for service in ("worker", "beat", "flower")]
    stack.make("up")
    assert stack.redis("CONFIG", "GET", "tcp-keepalive").split() == ["tcp-keepalive", "61"]
    assert stack.redis("GET", "mine") == "kept"
    # Only Redis is another container.
    assert [stack.ids(service) for service in ("worker", "beat", "flower")] == others


def test_all_mistakes_in_env_are_named_and_nothing_is_started(other_stack: Stack) -> None:
    mistakes = {"LOG_LEVEL": "loud", "CELERY_VISIBILITY_TIMEOUT": "1h", "WORKER_POOL": "gevent", "REDIS_REPLICAS": "2"}
    lines = [f"{name}={value}\n" for name, value in mistakes.items()]
    other_stack.env_file.write_text("REDIS_PASSWORD=x\nFLOWER_BASIC_AUTH=a:b\n" + "".join(lines))
    done = other_stack.make("up", check=False)
    assert done.returncode == 2
    for name, value in mistakes.items():
        assert sum(name in line and repr(value) in line for line in sentences(done.stderr)) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert other_stack.remains() == {}


def test_a_port_that_is_taken_is_one_sentence_that_names_the_variable(other_stack: Stack) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", other_stack.port))
        taken.listen()
        done = other_stack.make("up", check=False)
    (sentence,) = sentences(done.stderr)
    assert f"port {other_stack.port} on 127.0.0.1 is not available for Flower" in sentence
    assert "set FLOWER_PORT" in sentence
    assert other_stack.remains() == {}


# Not beside the first `make up`: where there are no base images, both would build them.
@pytest.mark.xdist_group("containers")
def test_an_image_that_does_not_build_is_told_with_the_builders_lines(other_stack: Stack) -> None:
    lock = Path(other_stack.directory / "requirements" / "own.lock")
    lock.write_text("humanize==4.0.0 --hash=sha256:" + "0" * 64 + "\n")
    done = other_stack.make("up", check=False)
    assert "error: the application image could not be built; the builder's last lines are" in done.stderr
    assert "own.lock" in done.stderr or "humanize" in done.stderr
    assert other_stack.remains() == {}


def test_make_clean_asks_and_deletes_nothing_where_nobody_answers(deployment: Deployment) -> None:
    before = deployment.units()
    done = deployment.make("clean", check=False)
    assert done.returncode == 2
    assert "run 'make clean YES=1'" in done.stderr
    assert deployment.units() == before
