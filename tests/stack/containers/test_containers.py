"""What every container of the stack has, as Compose reads it and as it runs."""

import json
import re
from typing import Any

import pytest

from config import load
from tests.stack.containers.deployment import SERVICES, Stack, clone

OWN_PLACES = {
    "redis": {"/data"},
    "worker": {"/tmp", "/run/stalk"},
    "beat": {"/tmp", "/run/stalk"},
    "flower": {"/tmp", "/run/stalk", "/var/lib/flower"},
}
# Docker mounts these into every container: 64 MB of shared memory for semaphores, and message queues.
DOCKERS_OWN = {"/dev/shm", "/dev/mqueue"}
# Two shells, and what asks for the time, for a file's age or Redis; Python with Celery would be one, but no small one.
MOST_PROCESSES = 8
# A full version: three numbers, or two where that names a release of Debian's packages.
PINNED = re.compile(r".+:[0-9]+\.[0-9]+\.[0-9]+(-[a-z0-9.-]+)?")

each_service = pytest.mark.parametrize("service", SERVICES)


@pytest.fixture(scope="module")
def shipped(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """compose.yaml with nothing set but the password that it insists on."""
    fresh = Stack(clone(tmp_path_factory.mktemp("config") / "clone"), "stalk")
    asked = fresh.compose(
        "config", "--format", "json", variables={"COMPOSE_PROJECT_NAME": "", "FLOWER_PORT": "", "REDIS_PASSWORD": "x"}
    )
    return dict(json.loads(asked.stdout))


def test_the_stack_is_these_four_services(shipped: dict[str, Any]) -> None:
    assert (shipped["name"], sorted(shipped["services"])) == ("stalk", sorted(SERVICES))


@each_service
def test_a_service_has_a_health_check_a_restart_policy_and_rotated_logs(shipped: dict[str, Any], service: str) -> None:
    about = shipped["services"][service]
    assert about["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries", "start_period", "start_interval"} <= set(about["healthcheck"])
    assert about["restart"] == "unless-stopped"
    assert about["logging"]["driver"] == "json-file"
    assert set(about["logging"]["options"]) == {"max-size", "max-file"}


@each_service
def test_a_service_has_limits_and_a_grace_period(shipped: dict[str, Any], service: str) -> None:
    about = shipped["services"][service]
    limits = about["deploy"]["resources"]["limits"]
    assert all(float(limits[limit]) > 0 for limit in ("memory", "cpus", "pids")), limits
    assert re.fullmatch(r"(\d+m)?\d+s", about["stop_grace_period"])


def test_limits_come_from_the_environment(shipped: dict[str, Any], stack: Stack) -> None:
    given = {"REDIS_MEMORY": "301m", "WORKER_MEMORY": "302m", "WORKER_CPUS": "0.25"}
    # All others are changed in compose.override.yaml.
    expected = {service: dict(shipped["services"][service]["deploy"]["resources"]["limits"]) for service in SERVICES}
    expected["redis"] |= {"memory": str(301 * 1024 * 1024)}
    expected["worker"] |= {"memory": str(302 * 1024 * 1024), "cpus": 0.25}
    services = json.loads(stack.compose("config", "--format", "json", variables=given).stdout)["services"]
    assert {service: services[service]["deploy"]["resources"]["limits"] for service in SERVICES} == expected


@each_service
def test_a_service_is_hardened(shipped: dict[str, Any], service: str) -> None:
    about = shipped["services"][service]
    assert (about["read_only"], about["cap_drop"], about["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"])
    assert not about.get("cap_add")
    assert not about.get("privileged")


@each_service
def test_what_needs_redis_waits_until_it_is_healthy(shipped: dict[str, Any], service: str) -> None:
    if service != "redis":
        assert shipped["services"][service]["depends_on"]["redis"]["condition"] == "service_healthy"


def test_the_grace_period_of_a_worker_is_longer_than_its_soft_shutdown(shipped: dict[str, Any]) -> None:
    worker = load({}).worker
    assert shipped["services"]["worker"]["stop_grace_period"] == "1m0s"
    assert worker.stop_grace_period == 60 > worker.soft_shutdown


def test_only_flower_publishes_a_port_and_only_on_loopback(shipped: dict[str, Any]) -> None:
    ports = {service: about["ports"] for service, about in shipped["services"].items() if about.get("ports")}
    assert [(port["host_ip"], port["published"], port["target"]) for port in ports.pop("flower")] == [
        ("127.0.0.1", "8080", 8080)
    ]
    assert ports == {}


def test_images_of_others_are_pinned_by_full_version_and_can_be_replaced(shipped: dict[str, Any], stack: Stack) -> None:
    def images(config: dict[str, Any]) -> tuple[str, str]:
        services = config["services"]
        return services["redis"]["image"], services["worker"]["build"]["args"]["PYTHON_IMAGE"]

    assert all(PINNED.fullmatch(image) for image in images(shipped)), images(shipped)
    chosen = {"REDIS_IMAGE": "mirror.example/redis:9.9.9", "PYTHON_IMAGE": "mirror.example/python:9.9.9"}
    asked = stack.compose("config", "--format", "json", variables=chosen)
    assert images(json.loads(asked.stdout)) == tuple(chosen.values())


def test_worker_beat_and_flower_are_one_image_that_is_never_fetched(shipped: dict[str, Any]) -> None:
    ours = [shipped["services"][service] for service in ("worker", "beat", "flower")]
    assert {(about["image"], about["pull_policy"]) for about in ours} == {("stalk-app", "never")}
    assert ["build" in about for about in ours] == [True, False, False]


# ---- the same from the running containers


@each_service
def test_a_container_runs_without_root_and_without_any_capability(stack: Stack, service: str) -> None:
    # All its processes, not only the first; without Docker's own that is about to start a health check: that one
    # is root until it has become the check.
    fields = {"Uid", "CapPrm", "CapEff", "CapBnd", "NoNewPrivs"}
    found: dict[str, set[str]] = {}
    for process in stack.shell(service, "cat /proc/[0-9]*/status", check=False).split("Name:")[1:]:
        name, *lines = process.splitlines()
        for field, _, values in (line.partition(":") for line in lines):
            if field in fields and not name.strip().startswith("runc:["):
                found.setdefault(field, set()).update(values.split())
    user = found.pop("Uid")
    assert len(user) == 1
    assert user.isdisjoint({"0"})
    assert found == {"CapPrm": {"0" * 16}, "CapEff": {"0" * 16}, "CapBnd": {"0" * 16}, "NoNewPrivs": {"1"}}


@each_service
def test_a_container_can_write_to_its_own_places_only(stack: Stack, service: str) -> None:
    script = "find / -path /proc -prune -o -type d -writable -print -o -type f -writable -print 2>/dev/null"
    found = set(stack.shell(service, script, check=False).split())
    inside = {path for path in found for place in OWN_PLACES[service] if path.startswith(f"{place}/")}
    assert found - inside - DOCKERS_OWN == OWN_PLACES[service]


@each_service
def test_the_limits_are_in_force(stack: Stack, service: str) -> None:
    host = stack.inspect(stack.ids(service)[0])["HostConfig"]
    assert host["Memory"] > 0
    assert host["NanoCpus"] > 0
    assert host["PidsLimit"] > 0
    assert host["ReadonlyRootfs"]
    assert host["RestartPolicy"]["Name"] == "unless-stopped"


def test_the_image_holds_no_compiler(stack: Stack) -> None:
    names = ("gcc", "cc", "c++", "g++", "clang", "tcc", "make", "ld", "uv")
    script = "; ".join(f"command -v {name}" for name in names) + "; find / -xdev -name 'cc1*' -type f 2>/dev/null"
    assert stack.shell("worker", script, check=False).split() == []


def test_python_says_what_is_in_force_without_the_passwords(stack: Stack) -> None:
    output = stack.shell("flower", "python -m config show && python -m config check")
    assert "FLOWER_URL_PREFIX=flower" in output
    assert "The configuration is good." in output
    for secret in secrets(stack):
        assert secret not in output


@each_service
def test_a_health_check_is_a_few_small_programs(stack: Stack, service: str) -> None:
    command = stack.inspect(stack.ids(service)[0])["Config"]["Healthcheck"]["Test"]
    check = command[1] if command[0] == "CMD-SHELL" else " ".join(command[1:])
    # The container counts its processes. The fewest of several looks, because others are started meanwhile.
    look = f"a=$(sh -c 'echo $$'); {check} >/dev/null || exit 1; b=$(sh -c 'echo $$'); echo $((b - a))"
    # There is no Python in what is searched: importing it alone would be 20 ms of CPU, and asking Celery 900 ms.
    path = "" if service == "redis" else "PATH=/usr/bin:/bin; "
    started = stack.shell(service, f"{path}! command -v python || exit 1; for i in 1 2 3 4 5; do {look}; done")
    assert min(map(int, started.split())) <= MOST_PROCESSES


def secrets(stack: Stack) -> list[str]:
    """Every password of the stack."""
    return [stack.environment_of("redis")["REDIS_PASSWORD"], stack.login().partition(":")[2]]
