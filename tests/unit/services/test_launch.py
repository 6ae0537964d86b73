"""services.launch: what Celery and Supervisor are started with."""

import re
import shlex
import sys
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from celery.bin.beat import beat
from celery.bin.celery import celery
from celery.bin.worker import worker

from config import child_environment, load
from config.loading import REQUEUE_SECONDS, SUPERVISOR_EXIT_SECONDS
from services.launch import NODE_VARIABLES, build_node_command, list_variables, supervisor_values
from tests.support.checkout import ROOT, Checkout
from tests.unit.refusals import run_refused
from tests.unit.secret_settings import MARK, build_secrets

# Options that change how much is printed, not what is done.
HARMLESS = {"NO_COLOR"}


def options_of(environment: dict[str, str]) -> dict[str, Any]:
    """What Celery itself makes of a node's command line."""
    command = build_node_command(load(environment))
    arguments = command[command.index("worker") + 1 :]
    context = CLIContext(app=Celery(set_as_current=False), no_color=True, workdir=None)
    options: dict[str, Any] = worker.make_context("worker", [*arguments, "--hostname=node0@here"], obj=context).params
    return options


# --- A node's command line


def test_a_node_runs_celery_of_this_python_with_our_application() -> None:
    assert build_node_command(load({}))[:5] == [sys.executable, "-m", "celery", "--app=services.app", "worker"]


@pytest.mark.parametrize(
    ("option", "default", "environment", "value"),
    [
        ("concurrency", "auto", {"WORKER_CONCURRENCY": "3"}, 3),
        ("queues", ["celery"], {"WORKER_QUEUES": "celery,reports"}, ["celery", "reports"]),
        ("autoscale", None, {"WORKER_AUTOSCALE": "8,2"}, (8, 2)),
        ("max_tasks_per_child", None, {"WORKER_MAX_TASKS_PER_CHILD": "100"}, 100),
        ("max_memory_per_child", None, {"WORKER_MAX_MEMORY_PER_CHILD": "200000"}, 200000),
        ("loglevel", 20, {"LOG_LEVEL": "critical"}, 50),
        ("task_events", True, {}, True),
        # Autoscaling takes its place.
        ("concurrency", "auto", {"WORKER_AUTOSCALE": "8,2"}, None),
    ],
)
def test_a_setting_is_an_option_of_celery(
    option: str, default: object, environment: dict[str, str], value: object
) -> None:
    assert options_of({})[option] == default
    assert options_of(environment)[option] == value


@pytest.mark.parametrize(
    ("pool", "module"), [("", "prefork"), ("prefork", "prefork"), ("threads", "thread"), ("solo", "solo")]
)
def test_every_pool_is_one_of_celerys(pool: str, module: str) -> None:
    assert options_of({"WORKER_POOL": pool})["pool"].__module__ == f"celery.concurrency.{module}"


# --- What others see


def test_no_command_line_carries_a_secret() -> None:
    settings = load(build_secrets())
    assert MARK not in " ".join(build_node_command(settings))
    assert MARK not in repr(supervisor_values(settings))


def test_every_value_that_supervisors_configuration_names_is_given() -> None:
    text = (ROOT / "docker" / "supervisor" / "worker.conf").read_text()
    named = set(re.findall(r"%\(ENV_(\w+)\)s", text))
    assert named
    assert supervisor_values(load({})).keys() == named


def test_supervisor_gets_the_settings_and_has_given_up_before_docker_kills_it() -> None:
    settings = load(
        {
            "WORKER_PROCESSES": "3",
            "WORKER_SOFT_SHUTDOWN": "100",
            # The shortest.
            "WORKER_STOP_GRACE_PERIOD": "115",
            "WORKER_HEARTBEAT_TIMEOUT": "90",
            "STALK_RUN_DIR": "/run/other",
        }
    )
    values = supervisor_values(settings)
    given = {"STALK_NODES": "3", "STALK_HEARTBEAT_TIMEOUT": "90", "STALK_RUN_DIR": "/run/other"}
    assert values.items() >= given.items()
    assert int(values["STALK_KILL_AFTER"]) == 100 + REQUEUE_SECONDS == 115 - SUPERVISOR_EXIT_SECONDS
    assert shlex.split(values["STALK_NODE_COMMAND"]) == build_node_command(settings)


@pytest.mark.parametrize("variables", [NODE_VARIABLES, list_variables("broker", "results", "tasks", "beat", "stack")])
def test_a_process_sees_no_variable_that_beats_its_settings(
    monkeypatch: pytest.MonkeyPatch, variables: list[str]
) -> None:
    foreign = {
        *("BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "RESULT_BACKEND", "REMAP_SIGTERM"),
        *("FLOWER_PORT", "FLOWER_BASIC_AUTH", "FLOWER_BASIC_AUTH_FILE", "FLOWER_UNAUTHENTICATED_API"),
        *("SUPERVISOR_ENABLED", "SUPERVISOR_SERVER_URL", "CELERY_CONFIG_MODULE", "CELERY_LOADER"),
        *("CELERY_CUSTOM_WORKER_POOL", "C_FORCE_ROOT"),
    }
    passed = {"CELERY_BROKER_URL", "CELERY_BROKER_URL_FILE", "REDIS_PASSWORD_FILE", "BEAT_SCHEDULE", "SHOP_URL"}
    for name in foreign | passed:
        monkeypatch.setenv(name, "x")
    assert child_environment(variables).keys() & (foreign | passed) == passed


@pytest.mark.parametrize(("command", "name"), [(celery, ""), (worker, "WORKER_"), (beat, "BEAT_")])
def test_no_option_of_celery_is_set_behind_our_back(monkeypatch: pytest.MonkeyPatch, command: Any, name: str) -> None:
    # As click derives them from celery's auto_envvar_prefix="CELERY" (celery 5.7).
    read = {option.envvar or f"CELERY_{name}{option.name.upper()}" for option in command.params} - HARMLESS
    assert len(read) > 5
    for variable in read:
        monkeypatch.setenv(variable, "1")
    assert child_environment(NODE_VARIABLES).keys() & read == set()


# --- The command


@pytest.mark.parametrize("arguments", [[], ["worker", "beat"]])
def test_wrong_arguments_are_refused_with_the_usage(checkout: Checkout, arguments: list[str]) -> None:
    lines = run_refused(checkout, "-m", "services.launch", *arguments)
    assert lines[0].startswith("usage: python -m services.launch")


@pytest.mark.parametrize(
    ("command", "wrong", "says"),
    [
        (
            ["-m", "services.launch", "worker"],
            {"WORKER_POOL": "gevent", "CELERY_RESULT_BACKEND": f"redis://{MARK}@redis/0"},
            ["error: CELERY_RESULT_BACKEND: found", "error: WORKER_POOL: found"],
        ),
        (
            ["-c", "import services.app"],
            {"BEAT_SCHEDULE": "no-such-entry=off"},
            ["error: BEAT_SCHEDULE: found entry 'no-such-entry'; allowed: "],
        ),
    ],
    ids=["launch", "application"],
)
def test_a_wrong_configuration_is_refused_before_anything_starts(
    checkout: Checkout, command: list[str], wrong: dict[str, str], says: list[str]
) -> None:
    lines = run_refused(checkout, *command, **build_secrets() | wrong)
    assert [line[: len(start)] for line, start in zip(lines, says, strict=True)] == says
    assert MARK not in "".join(lines)
