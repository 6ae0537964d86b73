"""Start, replace and stop the programs of the Supervisor that runs this checkout's stack.

Its groups are redis, beat, flower, and each worker with its nodes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep
from typing import Any
from xmlrpc.client import Fault

from services.supervisor import rpc
from stack import paths
from stack.errors import CommandError
from stack.local import session

# It answers within milliseconds; one that does not is frozen.
ANSWER_SECONDS = 10
LOOK_SECONDS = 0.2
RESTING = ("STOPPED", "EXITED", "FATAL")


@contextmanager
def open_rpc() -> Iterator[Any]:
    """Supervisor's commands; CommandError when it does not answer, or refuses one."""
    try:
        yield rpc.connect(paths.SUPERVISOR_SOCKET, ANSWER_SECONDS)
    except rpc.ERRORS as error:
        why = error.faultString if isinstance(error, Fault) else error
        raise CommandError(f"Supervisor failed ({why}); {paths.SUPERVISOR_LOG} may say more") from None


def find_supervisor() -> int:
    """The process id of the Supervisor that runs this checkout's stack; 0 when none answers."""
    try:
        pid = int(rpc.connect(paths.SUPERVISOR_SOCKET, ANSWER_SECONDS).getPID())
    except rpc.ERRORS:
        return 0
    if not session.find_leader():
        # Somebody has deleted the record, or killed the command that was about to write it.
        session.record(pid, "unknown")
    return pid


def list_groups(supervisor: Any) -> set[str]:
    """The groups that Supervisor knows."""
    return {process["group"] for process in supervisor.getAllProcessInfo()}


def list_busy_groups(supervisor: Any) -> set[str]:
    """The groups in which a process runs, or is about to."""
    return {process["group"] for process in supervisor.getAllProcessInfo() if process["statename"] not in RESTING}


def apply_configuration(supervisor: Any, only_count: bool = False) -> None:
    """Replace the groups that have changed, end those that are gone, start those that are new or do not run.

    All at the same time, and running tasks finish first. With `only_count`, what has changed goes on as it is.
    """
    added, changed, removed = (set(names) for names in supervisor.reloadConfig()[0])
    if only_count:
        changed = set()
    ending = changed | removed
    if "redis" in ending:
        # Workers hand back to Redis, so it stops last and starts first.
        stop_groups(supervisor, ending - {"redis"})
        replace_groups(supervisor, {"redis"}, changed)
    replace_groups(supervisor, ending - {"redis"}, changed)
    for name in sorted(added, key=lambda name: name != "redis"):
        supervisor.addProcessGroup(name)
    for process in supervisor.getAllProcessInfo():
        if process["statename"] in RESTING:
            supervisor.startProcess(f"{process['group']}:{process['name']}", False)


def replace_groups(supervisor: Any, names: set[str], restarted: set[str]) -> None:
    """Stop groups at the same time and remove them; each of `restarted` starts again as soon as it has stopped."""
    begin_to_stop(supervisor, names)
    left = set(names)
    while left:
        for name in left - list_busy_groups(supervisor):
            supervisor.removeProcessGroup(name)
            if name in restarted:
                supervisor.addProcessGroup(name)
            left.remove(name)
        if left:
            sleep(LOOK_SECONDS)


def stop_groups(supervisor: Any, names: set[str]) -> None:
    """Stop groups at the same time and wait for all; Supervisor kills what takes too long."""
    begin_to_stop(supervisor, names)
    while names & list_busy_groups(supervisor):
        sleep(LOOK_SECONDS)


def begin_to_stop(supervisor: Any, names: set[str]) -> None:
    """Tell groups to stop, and do not wait."""
    for name in names & list_groups(supervisor):
        supervisor.stopProcessGroup(name, False)
