"""The table: docs/chaos.md."""

import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version

from tests.chaos.faults import ALL_FAULTS
from tests.chaos.run import Outcome
from tests.chaos.stock_outcomes import Kept, Versions, describe_stale, read_installed
from tests.chaos.subjects import POOLS
from tests.chaos.testbeds.base import CHORD_EACH

HEAD = f"""# Faults, and what became of the tasks

Written by `make chaos`; not by hand. Each line is one run: two nodes, one Redis, tasks that leave a mark outside Redis
when they start and end, and a fault that strikes while they come. *Lost*: sent, and neither executed nor anywhere in
Redis. *Never kept*: the publish, or the end of its transaction, was behind the byte where Redis's own file was torn.
Redis is killed when its file has all that it has answered, which is more than it promises (delivery.md).
*Twice*: started again, and why. *Recorded*: of those, the starts whose `delivery_count` was higher than that of the
start before; the others were too short for Redis to hear of their first start. *Worst recovery*: the longest that a
task took from its publish to its end, beyond its own length, outages included, and what it waited for a processor:
runs go on side by side. Where stock workers take part, what is lost is what a killed one of them had taken, and at most
that. One in {CHORD_EACH} things sent is a chord. Containers are the shipped ones, with the Redis of their image.
The last columns are kombu's own transport under the same fault, with the lease as its visibility timeout; what it does
shows after few strikes. They are of a run of their own, `make chaos-stock`, and stand until Celery or kombu changes.
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


def describe_versions() -> str:
    """The versions of Python, Celery, kombu, Redis and redis-py that runs use."""
    return f"Python {platform.python_version()}, {read_installed()}, redis-py {version('redis')}"


def describe_twice(outcome: Outcome) -> str:
    """How many started again for which cause."""
    return "; ".join(f"{count}: {why}" for why, count in outcome.twice.items()) or "0"


def describe_lost(lost: int, waiting: int) -> str:
    """How many were lost, and how many were still in Redis at the end."""
    return f"{lost} ({waiting} still wait)" if waiting else str(lost)


def build_row(stalk: Outcome | None, stock: Kept | None, fault: str, pool: str) -> str:
    cells = [ALL_FAULTS[fault].about, pool]
    cells += build_stalk_cells(stalk) if stalk else ["-"] * 8
    cells += build_stock_cells(stock) if stock else ["-"] * 4
    return f"| {' | '.join(cells)} |"


def build_stalk_cells(stalk: Outcome) -> list[str]:
    lost = describe_lost(len(stalk.lost), len(stalk.waiting))
    counts = [str(stalk.times), str(stalk.sent), str(stalk.executed), lost, str(len(stalk.never_kept))]
    return [*counts, describe_twice(stalk), str(stalk.recorded), f"{stalk.worst:.1f}"]


def build_stock_cells(stock: Kept) -> list[str]:
    """The last columns."""
    ended = f"; {stock.exits} nodes exited" if stock.exits else ""
    return [str(stock.times), str(stock.sent), describe_lost(stock.lost, stock.waiting), f"{stock.twice}{ended}"]


def describe_kept(kept: Iterable[Kept], here: Versions) -> str:
    """When and with which versions the last columns were made, and whether that is out of date."""
    kept = list(kept)
    runs = "; ".join(sorted({f"{each.date}, {each.versions}" for each in kept}))
    return f"kombu's own transport: `make chaos-stock`, {runs}. {describe_stale(kept, here)}".rstrip()


def build_document(outcomes: Iterable[Outcome], kept: Iterable[Kept], command: str, seed: int) -> str:
    """The whole document."""
    stalk = {(outcome.fault, outcome.pool): outcome for outcome in outcomes}
    stock, here = {(each.fault, each.pool): each for each in kept}, read_installed()
    rows = [
        build_row(stalk.get((fault, pool)), stock.get((fault, pool)), fault, pool)
        for fault in ALL_FAULTS
        for pool in POOLS
        if {(fault, pool)} & (stalk.keys() | stock.keys())
    ]
    leases = ", ".join(sorted({str(outcome.lease) for outcome in stalk.values()}))
    when = datetime.now(UTC).date().isoformat()
    made = f"Stalk: `{command}`, {when}, seed {seed}, lease {leases} s. {describe_versions()}."
    heading = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join([HEAD, made, "", describe_kept(stock.values(), here), "", *heading, *rows, ""])
