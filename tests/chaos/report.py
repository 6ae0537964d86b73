"""The table: docs/chaos.md."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version

from tests.chaos import containers
from tests.chaos.arena import CHORD_EACH
from tests.chaos.faults import FAULTS
from tests.chaos.run import Outcome
from tests.chaos.subjects import POOLS
from tests.support.redis_server import executable

HEAD = f"""# Faults, and what became of the tasks

Written by `make chaos`; not by hand. Each line is one run: two nodes, one Redis, tasks that leave a mark outside Redis
when they start and end, and a fault that strikes while they come. *Lost*: sent, and neither executed nor anywhere in
Redis. *Never kept*: the publish, or the end of its transaction, was behind the byte where Redis's own file was torn.
*Twice*: started again, and why. *Recorded*: of those, the starts whose `delivery_count` was higher than that of the
start before; the others were too short for Redis to hear of their first start. *Worst recovery*: the longest that a
task took from its publish to its end, beyond its own length, outages included. Where stock workers take part, what is
lost is what a killed one of them had taken, and at most that. One in {CHORD_EACH} things sent is a chord. Containers
are the shipped ones, with the Redis of their image.
The last columns are kombu's own transport under the same fault, with the lease as its visibility timeout; what it does
shows after few strikes.
"""
COLUMNS = (
    "fault",
    "pool",
    "strikes",
    "sent",
    "executed",
    "lost",
    "never kept",
    "started twice and why",
    "recorded",
    "worst recovery, s",
    "stock: strikes",
    "stock: sent",
    "stock: lost",
    "stock: twice",
)


def versions() -> str:
    """What the runs were made with."""
    said = subprocess.run([executable(), "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    server = (re.findall(r"v=(\S+)", said) or ["?"])[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("celery", "kombu"))
    return f"Python {platform.python_version()}, {packages}, Redis {server}, redis-py {version('redis')}"


def twice(outcome: Outcome) -> str:
    """How many started again for which reason."""
    return "; ".join(f"{count}: {why}" for why, count in outcome.twice.items()) or "0"


def lost(outcome: Outcome) -> str:
    """How many were lost, and how many Redis has still although all patience is at its end."""
    return f"{len(outcome.lost)}" + (f" ({len(outcome.waiting)} still wait)" if outcome.waiting else "")


def about(fault: str) -> str:
    """What a fault does, in a line."""
    return FAULTS[fault].about if fault in FAULTS else containers.about(fault)


def line(stalk: Outcome | None, stock: Outcome | None, fault: str, pool: str) -> str:
    none = ["-"]
    cells = [about(fault), pool]
    if stalk:
        counts = [str(stalk.times), str(stalk.sent), str(stalk.executed), lost(stalk), str(len(stalk.never_kept))]
        cells += [*counts, twice(stalk), str(stalk.recorded), f"{stalk.worst:.1f}"]
    else:
        cells += none * 8
    if stock:
        ended = f"; {len(stock.exits)} nodes exited" if stock.exits and stock.fault != "poison" else ""
        cells += [str(stock.times), str(stock.sent), lost(stock), f"{sum(stock.twice.values())}{ended}"]
    else:
        cells += none * 4
    return f"| {' | '.join(cells)} |"


def table(outcomes: Iterable[Outcome], command: str, seed: int) -> str:
    """The whole document."""
    found = {(outcome.fault, outcome.pool, outcome.subject): outcome for outcome in outcomes}
    rows = [
        line(found.get((fault, pool, "stalk")), found.get((fault, pool, "stock")), fault, pool)
        for fault in (*FAULTS, *containers.FAULTS)
        for pool in POOLS
        if {(fault, pool, "stalk"), (fault, pool, "stock")} & found.keys()
    ]
    leases = ", ".join(sorted({str(outcome.lease) for outcome in found.values()}))
    when = datetime.now(UTC).date().isoformat()
    made = f"`{command}`, {when}, seed {seed}, lease {leases} s. {versions()}."
    heading = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join([HEAD, made, "", *heading, *rows, ""])
