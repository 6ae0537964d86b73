"""Which runtime, and what is refused before anything starts."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

from tests.stack.processes.deployment import Local

# What `docker` answers on a machine with an engine; everything that would change something fails.
FAKE_DOCKER = """#!/bin/sh
case "$*" in
  "version --format "*) echo 27.0.1 1.46 ;;
  "compose version --short") echo 2.30.0 ;;
  "ps --all "*) ;;
  "compose ps --all --format json") cat "$(dirname "$0")/containers" ;;
  *) echo "docker was asked: $*" >&2; exit 9 ;;
esac
"""


def fake_docker(local: Local, *containers: dict[str, str]) -> dict[str, str]:
    """A PATH on which Docker is there, and these are its containers."""
    place = local.directory / "fake"
    place.mkdir()
    script(place / "docker", FAKE_DOCKER)
    (place / "containers").write_text("".join(json.dumps(container) + "\n" for container in containers))
    return {"PATH": f"{place}:{local.path}"}


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def sentence(text: str) -> str:
    """The one line on standard error that is ours; make adds its own."""
    lines = [line for line in text.splitlines() if not line.startswith("make: ***")]
    assert len(lines) == 1, text
    return lines[0]


# ---- the runtime


def test_with_containers_recorded_and_no_engine_nothing_is_started(bare: Callable[..., Local]) -> None:
    local = bare()
    local.state.mkdir()
    (local.state / "runtime").write_text("docker\n")
    done = local.make("up", check=False)
    assert done.returncode == 2
    output = sentence(done.stderr)
    assert "this checkout's data is in Docker's volumes, so nothing was started" in output
    assert "STALK_RUNTIME=local make up" in output
    assert not local.env_file.exists()
    assert not local.run.exists()


def test_local_can_be_asked_for_against_the_record_and_is_told_what_happens_to_the_data(local: Local) -> None:
    (local.state / "runtime").write_text("docker\n")
    output = local.make("up", exported={"STALK_RUNTIME": "local"}).stdout
    assert "Changing from containers" in output
    assert "no data is taken along, what was queued stays there" in output
    assert "STALK_RUNTIME=docker make up goes back to it" in output
    assert (local.state / "runtime").read_text() == "local\n"


def test_changing_to_containers_is_refused_while_processes_run(local: Local) -> None:
    exported = fake_docker(local) | {"STALK_RUNTIME": "docker"}
    done = local.make("up", check=False, exported=exported)
    assert "the stack still runs as processes of this host" in sentence(done.stderr)
    assert "stop it first with STALK_RUNTIME=local make stop" in done.stderr
    assert (local.state / "runtime").read_text() == "local\n"


def test_changing_to_processes_is_refused_while_containers_run(bare: Callable[..., Local]) -> None:
    local = bare()
    local.state.mkdir()
    (local.state / "runtime").write_text("docker\n")
    running = {"Name": "stalk-redis-1", "Service": "redis", "State": "running", "Status": "Up", "ID": "1"}
    done = local.make("up", check=False, exported=fake_docker(local, running) | {"STALK_RUNTIME": "local"})
    assert "the stack still runs as containers" in sentence(done.stderr)
    assert not local.run.exists()


def test_a_record_that_nobody_wrote_is_named(bare: Callable[..., Local]) -> None:
    local = bare()
    local.state.mkdir()
    (local.state / "runtime").write_text("podman\n")
    assert "says 'podman', which is no runtime" in sentence(local.make("up", check=False).stderr)


def test_commands_before_the_first_up_say_what_to_do(bare: Callable[..., Local]) -> None:
    local = bare()
    assert "start it with 'make up'" in sentence(local.make("call", check=False, TASK="a").stderr)
    assert local.make("stop").stdout == "Nothing runs.\n"


# ---- what is in the way


def test_a_port_that_is_taken_is_named_and_nothing_is_started(bare: Callable[..., Local]) -> None:
    local = bare()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", local.port))
        taken.listen()
        done = local.make("up", check=False)
    output = sentence(done.stderr)
    assert f"port {local.port} on 127.0.0.1 is not available for Flower" in output
    assert "FLOWER_PORT" in output
    assert not local.run.exists()
    assert not (local.state / "runtime").exists(), "nothing has run: nothing is to be kept to"


def test_another_port_is_looked_at_too_while_flower_runs(local: Local) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = local.make("up", check=False, exported={"FLOWER_PORT": str(port)})
    assert f"port {port} on 127.0.0.1 is not available" in sentence(done.stderr)
    assert local.flower().status == 200


def test_a_path_that_is_too_long_for_sockets_is_named(bare: Callable[..., Local]) -> None:
    local = bare("long/" * 15 + "checkout")
    output = sentence(local.make("up", check=False).stderr)
    assert str(local.directory) in output
    assert "too long for the Unix sockets in it" in output
    assert "move the checkout to a shorter path" in output


def test_a_path_that_redis_cannot_be_told_is_named(bare: Callable[..., Local]) -> None:
    local = bare('with a "quote"')
    assert "has a double quote" in sentence(local.make("up", check=False).stderr)


def test_a_file_of_tls_that_is_not_there_is_named_and_nothing_is_started(bare: Callable[..., Local]) -> None:
    local = bare()
    urls = {
        variable: f"rediss://redis.example.com/{database}?ssl_ca_certs=/etc/stalk/gone.crt"
        for database, variable in enumerate(("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"))
    }
    # Processes of the host have no limits of containers, however many CPUs these name.
    done = local.make("up", check=False, exported=urls | {"REDIS_REPLICAS": "0", "WORKER_CPUS": "1000"})
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    for line, variable in zip(lines, urls, strict=True):
        assert f"{variable}: ssl_ca_certs names /etc/stalk/gone.crt, which cannot be read (No such file" in line
        assert line.endswith("; nothing was started or replaced")
    assert not local.run.exists()
