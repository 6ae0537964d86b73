"""python -m services.supervisor.restart: restart the nodes of this container, as `make dev` does.

Running tasks finish first. Returns when all nodes take tasks again. Exit codes: 0 they do, 1 one could not be
started, and its log says why.
"""

import sys
from pathlib import Path
from time import sleep
from typing import Any

from config import load
from services.supervisor import rpc
from services.supervisor.heartbeat_file import READY, SUFFIX, HeartbeatFile

LOOK_SECONDS = 0.1


def restart(supervisor: Any, run_directory: Path) -> bool:
    """Stop all nodes and start them again; whether all of them take tasks."""
    supervisor.stopAllProcesses(True)
    for path in run_directory.glob(f"*{SUFFIX}"):
        path.unlink()
    supervisor.startAllProcesses(False)
    while processes := supervisor.getAllProcessInfo():
        if any(process["statename"] == "FATAL" for process in processes):
            return False
        if all(HeartbeatFile(run_directory, process["name"]).read()[0] == READY for process in processes):
            return True
        sleep(LOOK_SECONDS)
    return False


def main() -> None:
    """Restart the nodes of the Supervisor whose socket is in this container's run directory."""
    directory = Path(load().stack.run_directory)
    try:
        # No time limit: the nodes stop when their tasks have ended, or when Supervisor kills them.
        restarted = restart(rpc.connect(directory / "supervisor.sock"), directory)
    except rpc.ERRORS:
        # Supervisor ends with a node that cannot be started.
        restarted = False
    sys.exit(0 if restarted else 1)


if __name__ == "__main__":
    main()
