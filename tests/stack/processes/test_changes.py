"""What `make up` does after a change: what the change concerns is restarted, warm, and nothing else."""

import re

import pytest

from tests.stack.processes.deployment import Local

WORD = "services.tasks.own_module.word"
VARIABLE = "services.tasks.own_module.variable"


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    assert set(before) == set(after)
    return {name for name, pid in before.items() if after[name] != pid}


def test_a_change_of_code_restarts_what_runs_it_and_running_tasks_finish(local: Local) -> None:
    before = local.pids()
    running = local.start("through-a-change")
    local.replace("services/tasks/own_module.py", '"old"', '"new"')
    local.end_while(lambda: local.make("up"), "through-a-change")
    assert changed(before, local.pids()) == {"worker1-node0", "beat", "flower"}
    assert running.get()
    assert (local.notes("start", "through-a-change"), local.notes("end", "through-a-change")) == (1, 1)
    assert local.run_task(WORD) == "new"


def test_a_change_of_flowers_settings_restarts_flower_alone(local: Local) -> None:
    before = local.pids()
    local.set_variable(local.env_file, "FLOWER_MAX_TASKS", "500")
    local.make("up")
    assert changed(before, local.pids()) == {"flower"}


def test_a_comment_in_the_env_file_restarts_nothing(local: Local) -> None:
    before = local.pids()
    local.env_file.write_text(local.env_file.read_text() + "# a remark\n")
    local.make("up")
    assert changed(before, local.pids()) == set()


@pytest.mark.slow
def test_a_variable_of_the_shell_counts_as_in_compose_until_the_next_up(local: Local) -> None:
    before = local.pids()
    local.make("up", exported={"WORKER_CONCURRENCY": "3"})
    assert changed(before, local.pids()) == {"worker1-node0"}
    assert local.run_task(VARIABLE, "WORKER_CONCURRENCY") == "3"
    local.make("up")
    assert local.run_task(VARIABLE, "WORKER_CONCURRENCY") == "2"


def test_own_variables_and_secrets_reach_the_tasks(local: Local) -> None:
    before = local.pids()
    (local.directory / "token").write_text("from a file\n")
    local.set_variable(local.tasks_file, "GREETING", "'it''s $5 & \"more\"'".replace("''", "\\'"))
    local.set_variable(local.tasks_file, "TOKEN_FILE", "token")
    # Settings of the stack stay those of .env and the shell, as in compose.yaml.
    local.set_variable(local.tasks_file, "WORKER_CONCURRENCY", "7")
    local.make("up")
    assert changed(before, local.pids()) == {"worker1-node0", "beat"}
    assert local.run_task(VARIABLE, "GREETING") == 'it\'s $5 & "more"'
    assert local.run_task("services.tasks.own_module.secret", "TOKEN") == "from a file"
    assert local.run_task(VARIABLE, "WORKER_CONCURRENCY") == "2"


def test_a_mistake_in_the_tasks_variables_is_named_and_nothing_restarts(local: Local) -> None:
    before = local.pids()
    kept = local.tasks_file.read_text()
    local.tasks_file.write_text(kept + "MISTAKE=a \\ b\n")
    done = local.make("up", check=False)
    assert done.returncode == 2
    local.tasks_file.write_text(kept)
    assert re.search(r"\.env\.tasks line \d: Compose and Python would read the value of MISTAKE diff", done.stderr)
    assert local.pids() == before


@pytest.mark.slow
def test_what_supervisor_itself_runs_on_and_another_password_are_taken_up_with_the_data(local: Local) -> None:
    before = local.supervisor()
    with local.redis(database=5) as client:
        client.set("under", "the old password")
    local.set_variable(local.env_file, "WORKER_HEARTBEAT_TIMEOUT", "90")
    local.set_variable(local.env_file, "REDIS_PASSWORD", "'another one, with # and \"'")
    assert "What Supervisor itself runs on has changed" in local.make("up").stdout
    assert local.supervisor() != before
    assert "\ntimeout = 90\n" in (local.run / "supervisord.conf").read_text()
    assert local.redis(database=5).get("under") == "the old password"
    assert local.run_task("services.tasks.arithmetic.add", 1, 2) == 3
