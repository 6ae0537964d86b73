"""python -m services.supervisor.restart: restart the nodes of this container warm, as `make dev` does.

Returns when they take tasks again. Exit codes: 0 they do, 1 one could not be started, and its log says why.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import sleep
from typing import Any
from xmlrpc.client import ServerProxy

from supervisor.xmlrpc import SupervisorTransport

from config import load

# A word of services/worker/heartbeat.py, which would import all of Celery.
READY = "ready"
LOOK_SECONDS = 0.1


def restart(supervisor: Any, run_directory: Path) -> bool:
    """Stop all nodes, running tasks finish, and start them again; whether all of them take tasks."""
    supervisor.stopAllProcesses(True)
    for path in run_directory.glob("*.heartbeat"):
        path.unlink()
    supervisor.startAllProcesses(False)
    while processes := supervisor.getAllProcessInfo():
        if any(process["statename"] == "FATAL" for process in processes):
            return False
        if all(word(run_directory / f"{process['name']}.heartbeat") == READY for process in processes):
            return True
        sleep(LOOK_SECONDS)
    return False


def word(heartbeat: Path) -> str:
    """What a node says of itself; "" before it has said anything."""
    try:
        return heartbeat.read_text().strip()
    except FileNotFoundError:
        return ""


def main() -> None:
    """Restart the nodes of the Supervisor whose socket is in this container's run directory."""
    directory = Path(load().stack.run_directory)
    transport = SupervisorTransport("stalk", "stalk", f"unix://{directory / 'supervisor.sock'}")
    try:
        works = restart(ServerProxy("http://localhost", transport=transport).supervisor, directory)
    except OSError:
        # Supervisor ends with a node that cannot be started.
        works = False
    sys.exit(0 if works else 1)


if __name__ == "__main__":
    main()
