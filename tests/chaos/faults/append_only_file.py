"""The fault of Redis's append-only file: its end is torn off."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from time import monotonic

from tests.chaos.event_log import FORGOT, Incident
from tests.chaos.faults.fault import fault
from tests.chaos.redis_contents import TASK_ID
from tests.chaos.testbeds.processes import ProcessTestbed
from tests.support.checkout import ROOT
from tests.support.redis.builds import write_check_aof
from tests.support.redis.server import executable

# Cut off the end of the append-only file: a part of its last command.
TORN_BYTES = 50
# The name of a chord, in the id of a task in its header.
CHORD_PART = re.compile(rb"(chaos-\w+-\d{6})-\d\d")


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
