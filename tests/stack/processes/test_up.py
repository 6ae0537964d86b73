"""make up, call, status and scale without Docker."""

import json
import os
import signal
import stat
from pathlib import Path

import pytest
import redis

from config.environment import read_env_file
from tests.stack.processes.deployment import PROGRAMS, Local


def test_the_first_up_says_which_runtime_and_why_and_keeps_it_beside_the_data(first_up: tuple[Local, str]) -> None:
    local, output = first_up
    assert "Runtime: local (no Docker Engine answers)." in output
    assert f"http://127.0.0.1:{local.port}/flower/" in output
    assert (local.state / "runtime").read_text() == "local\n"
    assert not read_env_file(local.env_file).get("STALK_RUNTIME")


def test_make_local_asks_for_processes(local: Local) -> None:
    assert "Runtime: local (as STALK_RUNTIME says)." in local.make("local").stdout


def test_status_shows_units_nodes_queues_and_beat_without_colours(local: Local) -> None:
    output = local.make("status").stdout
    for word in (*PROGRAMS, "healthy", "worker1-node0@", "prefork", "celery", "Beat: last tick"):
        assert word in output
    assert "\x1b" not in output


def test_status_names_where_tasks_wait_that_no_node_reads(local: Local) -> None:
    local.send("own_probe.rest", "misspelt", 0, queue="mial")
    with local.redis() as client:
        client.copy("mial", "celery\x06\x161")
        try:
            lines = local.make("status").stdout.splitlines()
        finally:
            client.delete("mial", "celery\x06\x161", "_kombu.binding.mial")
    where = "1 task waits there, see docs/operations.md#tasks-that-nobody-reads"
    read = "nodes read 0, which is the most urgent, 3, 6 and 9"
    assert f"No node reads mial: {where}" in lines
    assert f"No node reads celery, priority 1 ({read}): {where}" in lines


def test_status_as_json_is_one_object(local: Local) -> None:
    told = local.status()
    assert told["runtime"] == "local"
    assert {unit["name"]: (unit["state"], unit["health"]) for unit in told["units"]} == dict.fromkeys(
        PROGRAMS, ("running", "healthy")
    )
    assert [name.partition("@")[0] for name in told["nodes"]] == ["worker1-node0"]
    assert told["queues"] == {"celery": 0}
    # A number, and not None: that the tick is a recent one is what `healthy` says.
    assert told["beat"]["seconds_since_tick"] >= 0


def test_the_schedule_is_a_line_for_each_entry_and_as_json_one_object(local: Local) -> None:
    head, *lines = local.make("schedule").stdout.splitlines()
    assert head.split() == ["Entry", "From", "Task", "Schedule", "On", "Last", "run", "Next", "due"]
    told = json.loads(local.make("schedule", JSON="1").stdout)["schedule"]
    assert [line.split()[0] for line in lines] == [one["name"] for one in told]
    (own,) = (one for one in told if one["name"] == "report-free-space")
    assert (own["source"], own["problem"]) == ("code", None)


def test_scaling_leaves_those_that_run_as_they_are(local: Local) -> None:
    before = local.pids()
    # What has changed meanwhile waits for `make up`.
    later = local.write_task("later", "")
    assert "2 workers run" in local.make("scale", WORKERS="2").stdout
    more = local.pids()
    assert more.pop("worker2-node0")
    assert more == before
    assert read_env_file(local.env_file)["WORKERS"] == "2"
    local.make("scale", WORKERS="1")
    assert local.pids() == before
    later.unlink()


def test_a_redis_that_is_killed_is_back_with_its_data(local: Local) -> None:
    with local.redis(database=5) as client:
        client.set("kept", "yes")
        # With everysec a busy disk lets it answer what it has not written yet, and a kill loses that: docs/delivery.md.
        client.config_set("appendfsync", "always")
    before = local.pids()["redis"]
    os.kill(before, signal.SIGKILL)
    local.wait(lambda: local.pids()["redis"] not in (0, before), "another Redis")
    local.wait(lambda: answers(local), "Redis answers")
    assert local.redis(database=5).get("kept") == "yes"
    assert local.run_task("services.tasks.arithmetic.add", 1, 2) == 3


def answers(local: Local) -> bool:
    try:
        return bool(local.redis().ping())
    except redis.RedisError:
        return False


def test_redis_is_reached_through_its_socket_alone_and_with_its_password(local: Local) -> None:
    socket = local.run / "redis.sock"
    assert stat.S_IMODE(socket.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(local.run.stat().st_mode) == 0o700
    assert stat.S_IMODE(local.state.stat().st_mode) == 0o700
    assert listening(local.pids()["redis"]) == []
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(unix_socket_path=str(socket)).ping()
    with local.redis() as client:
        assert client.config_get("port")["port"] == "0"
        for name, value in {"maxmemory-policy": "noeviction", "appendonly": "yes", "timeout": "0"}.items():
            assert client.config_get(name)[name] == value


def test_what_holds_secrets_is_readable_by_its_owner_alone(local: Local) -> None:
    for path in (local.env_file, local.run / "environment.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def listening(pid: int) -> list[str]:
    """The TCP sockets on which a process listens, as the kernel writes them."""
    names = {path.readlink().name for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            # 0A is LISTEN; the tenth field is the socket's number.
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in names:
                found.append(fields[1])
    return found


def test_what_listens_is_seen_by_its_number(local: Local) -> None:
    assert [address.partition(":")[2] for address in listening(local.pids()["flower"])] == [f"{local.port:04X}"]


def test_a_task_sees_its_variables_and_nothing_of_the_shell(local: Local) -> None:
    names = set(local.run_task("services.tasks.own_module.names"))
    assert "PROBE_LOG" in names
    assert "ONLY_IN_THE_SHELL" not in names
    assert not {"MAKEFLAGS", "MAKELEVEL", "TASK", "SUPERVISOR_ENABLED", "FLOWER_BASIC_AUTH"} & names


def test_everything_is_in_the_checkout(local: Local) -> None:
    assert sorted(local.home.iterdir()) == []
    assert sorted(local.scratch.iterdir()) == []
