"""Faults of Redis: killed, restarted, frozen, full, its scripts flushed, its append-only file torn."""

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from time import monotonic

from redis.exceptions import OutOfMemoryError

from tests.chaos.event_log import FORGOT, Incident
from tests.chaos.faults.fault import LONGER, fault
from tests.chaos.faults.packet import publish_with
from tests.chaos.redis_contents import TASK_ID
from tests.chaos.subjects import STALK
from tests.chaos.testbeds.base import GO_ON_SECONDS, Workload
from tests.chaos.testbeds.processes import ProcessTestbed, state
from tests.support.checkout import ROOT
from tests.support.redis.builds import write_check_aof
from tests.support.redis.server import executable

# An outage longer than any client repeats a command for, so that connections fail and come back.
OUTAGE_SECONDS = 1.5
# Redis refuses writes for a while.
FULL_SECONDS = 2.0
# The tasks that fill Redis, a megabyte and a half. They are due when all are there, and most of them have to end before
# Redis uses less than its limit again.
FULL_TASKS, FULL_DUE_SECONDS, FULL_TIMES = 1000, 8.0, 1.06
# Cut off the end of the append-only file: a part of its last command.
TORN_BYTES = 50
# The name of a chord, in the id of a task in its header.
CHORD_PART = re.compile(rb"(chaos-\w+-\d{6})-\d\d")


@fault(2, 10)
def redis_kill(testbed: ProcessTestbed) -> None:
    """Redis killed with -9 and started again on its append-only file."""
    testbed.redis.kill()
    assert testbed.redis.process.code == -signal.SIGKILL
    testbed.let_time_pass(OUTAGE_SECONDS)
    testbed.redis.start()


@fault(2, 10)
def redis_restart(testbed: ProcessTestbed) -> None:
    """Redis restarted in order."""
    testbed.redis.stop()
    assert testbed.redis.process.code == 0
    testbed.let_time_pass(OUTAGE_SECONDS)
    testbed.redis.start()


@fault(1, 3)
def redis_freeze(testbed: ProcessTestbed) -> None:
    """Redis frozen for longer than a lease."""
    testbed.redis.freeze()
    testbed.let_time_pass(testbed.plan.lease * LONGER)
    assert state(testbed.redis.process.pid) == "T"
    testbed.redis.thaw()


@fault(2, 10)
def redis_full(testbed: ProcessTestbed) -> None:
    """Redis full for a while: it refuses every write.

    And then full of tasks, which have to empty it. Stock workers could not.
    """
    testbed.redis.ask("CONFIG", "SET", "maxmemory", "1")
    assert not accepts_writes(testbed), "Redis is not full"
    testbed.let_time_pass(FULL_SECONDS)
    testbed.redis.make_room()
    if testbed.plan.subject == STALK:
        let_it_empty(testbed)


def let_it_empty(testbed: ProcessTestbed) -> None:
    """Fill Redis with tasks that are soon due; only their end makes room."""
    label = testbed.new_label("full")
    testbed.send(Workload(label, count=FULL_TASKS, countdown=FULL_DUE_SECONDS))
    testbed.wait_for_tasks("sent", label, FULL_TASKS, GO_ON_SECONDS)
    testbed.redis.fill(FULL_TIMES)
    assert not accepts_writes(testbed), "Redis is not full"
    testbed.wait_for_tasks("end", label, FULL_TASKS, FULL_DUE_SECONDS + testbed.allowed_seconds)
    # Ended tasks are acknowledged a moment later.
    testbed.wait(lambda: accepts_writes(testbed), GO_ON_SECONDS, "Redis takes writes again")
    testbed.redis.make_room()


def accepts_writes(testbed: ProcessTestbed) -> bool:
    """Whether Redis uses less than it may."""
    with suppress(OutOfMemoryError):
        return bool(testbed.redis.client().set("chaos-probe", "1"))
    return False


@fault(3, 10, load="")
def redis_full_at_pop(testbed: ProcessTestbed) -> None:
    """Redis full in the same packet as a publish: between a worker's pop and its next write."""
    publish_with(testbed, "CONFIG", "SET", "maxmemory", "1")
    testbed.let_time_pass(FULL_SECONDS)
    testbed.redis.make_room()


@fault(10, 100)
def script_flush(testbed: ProcessTestbed) -> None:
    """SCRIPT FLUSH under load."""
    assert testbed.redis.ask("SCRIPT", "FLUSH") == "OK"


@fault(1, 5)
def torn_append_only_file(testbed: ProcessTestbed) -> None:
    """Redis killed and its append-only file torn: the last 50 bytes are missing."""
    since = monotonic()
    testbed.redis.kill()
    path = find_newest_increment(testbed.redis.directory)
    before = path.read_bytes()
    others = b"".join(each.read_bytes() for each in path.parent.iterdir() if each.is_file() and each != path)
    os.truncate(path, len(before) - TORN_BYTES)
    repair(testbed.redis.directory)
    repaired = path.stat().st_size
    before_start = testbed.redis.process.log()
    testbed.redis.start()
    kept = find_truncation(testbed.redis.process.log().removeprefix(before_start), before, repaired)
    assert 0 < kept < len(before), f"{path.name} had {len(before)} bytes, and Redis kept {kept}"
    gone = set(TASK_ID.findall(before)) - set(TASK_ID.findall(before[:kept])) - set(TASK_ID.findall(others))
    # A chord's counter is written once as well: without it the body is never sent.
    bodies = {part + b"-body" for part in CHORD_PART.findall(before[kept:])}
    testbed.never_kept.update(task.decode() for task in gone | bodies)
    # A node whose claim Redis has lost finds out when it renews the lease.
    testbed.incidents.append(Incident(FORGOT, since, monotonic() + testbed.plan.lease))
    testbed.remarks.append(f"{len(before) - kept} bytes gone, the first trace of {len(gone)} tasks among them")


def repair(directory: Path) -> None:
    """Repair the append-only file as the stack's own start of Redis does."""
    tool = directory / "redis-check-aof"
    tool.unlink(missing_ok=True)
    write_check_aof(Path(executable()), tool)
    script = ROOT / "docker" / "redis" / "repair"
    environment = {**os.environ, "STALK_REDIS_CHECK_AOF": str(tool)}
    subprocess.run(["sh", str(script), str(directory)], env=environment, check=True, capture_output=True)


def find_newest_increment(directory: Path) -> Path:
    """The append-only file that Redis writes to; before version 7 there is but one."""
    increments = (directory / "appendonlydir").glob("*.incr.aof")
    return max(increments, key=lambda path: path.stat().st_mtime, default=directory / "appendonly.aof")


def find_truncation(log: str, before: bytes, end: int) -> int:
    """The byte where Redis logs that it truncated the file, or its end where it was torn between two commands."""
    if found := re.findall(r"Truncating the AOF .*at offset (\d+)", log):
        return int(found[-1])
    assert re.match(rb"\r\n\*\d+\r\n", before[end - 2 :]), f"Redis does not say that it has cut a file off:\n{log}"
    return end
