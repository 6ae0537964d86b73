"""Flower under a prefix, behind its login, over a kill."""

import pytest

from tests.stack.containers.deployment import Stack
from tests.stack.deployment import Deployment

PAGES = ("/flower/", "/flower/tasks", "/flower/broker", "/flower/api/workers", "/flower/api/tasks", "/flower/metrics")


@pytest.mark.parametrize("path", PAGES)
def test_every_page_wants_the_login(deployment: Deployment, path: str) -> None:
    login = deployment.login()
    user, _, password = login.partition(":")
    assert deployment.flower(path, login).status == 200
    for wrong in ("", f"{user}:", f"{user}:{password}x", f"x{user}:{password}", f"{user}:{password[:-1]}", user):
        assert deployment.flower(path, wrong).status == 401, wrong


def test_only_the_health_check_is_free(stack: Stack) -> None:
    def heard() -> tuple[int, str]:
        answer = stack.flower("/flower/healthcheck", "")
        return answer.status, answer.text

    # A busy Redis may answer it late.
    stack.wait(lambda: heard() == (200, "OK"), "the health check answers without a login")


def test_a_task_is_still_known_after_flower_was_killed(stack: Stack) -> None:
    answer, _ = stack.call("services.tasks.arithmetic.add", 4, 3)
    task, flower = answer["id"], stack.ids("flower")[0]

    def known() -> bool:
        response = stack.flower(f"/flower/api/task/info/{task}")
        return response.status == 200 and response.json()["state"] == "SUCCESS"

    stack.wait(known, "the task in Flower")
    seconds = float(stack.shell("flower", "date +%s.%N"))

    def saved() -> bool:
        return float(stack.shell("flower", "stat -c %.9Y /var/lib/flower/flower.db || echo 0")) > seconds

    # A heartbeat alone is not saved; another task is.
    stack.send("services.tasks.arithmetic.add", [1, 2])
    stack.wait(saved, "the state written to the volume")
    stack.docker("kill", "--signal=KILL", flower)
    stack.compose("up", "--detach")
    stack.wait_healthy("flower")
    assert stack.ids("flower") == [flower]
    assert known()
