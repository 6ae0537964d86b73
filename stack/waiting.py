"""Wait until every container works, saying what is waited for."""

from __future__ import annotations

from time import monotonic, sleep
from typing import Any

from stack import docker
from stack.failure import Failure

# Redis loading 1 GB takes 20 s, a first import of heavy tasks a minute: three minutes are a fault.
LIMIT_SECONDS = 180.0
LOOK_SECONDS = 0.5
LOG_LINES = "15"


def until_healthy() -> None:
    """Return when every container of the project is healthy.

    Raises Failure, with the last log lines of the container that is not, after LIMIT_SECONDS, or as soon as
    one keeps ending.
    """
    started, said = monotonic(), ""
    while True:
        waiting = [container for container in docker.containers() if not is_healthy(container)]
        if not waiting:
            return
        names = ", ".join(str(container["Name"]) for container in waiting)
        if names != said:
            print(f"Waiting for {names} …", flush=True)
            said = names
        ended = [container for container in waiting if keeps_ending(container)]
        if ended or monotonic() - started > LIMIT_SECONDS:
            raise Failure(report((ended or waiting)[0]))
        sleep(LOOK_SECONDS)


def is_healthy(container: dict[str, Any]) -> bool:
    """Whether a container works, as `docker compose ps` tells; one without a health check only has to run."""
    return container["State"] == "running" and container.get("Health") in ("healthy", "", None)


def keeps_ending(container: dict[str, Any]) -> bool:
    """Whether a container has ended by itself more than once."""
    if container["State"] not in ("restarting", "exited", "dead"):
        return False
    count = docker.run("docker", "inspect", "--format", "{{.RestartCount}}", str(container["ID"]), check=False).stdout
    return container["State"] != "restarting" or int(count.strip() or 0) > 1


def report(container: dict[str, Any]) -> str:
    """What is wrong with a container, and its last log lines."""
    name, state = container["Name"], container.get("Health") or container["State"]
    logged = docker.run("docker", "logs", "--tail", LOG_LINES, str(container["ID"]), check=False)
    lines = (logged.stdout + logged.stderr).rstrip()
    return f"{name} is {state} and does not work; its last lines are\n{lines}\nand 'make logs' shows more"
