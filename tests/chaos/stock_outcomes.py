"""What kombu's own transport made of the faults, kept in stock.jsonl until Celery or kombu changes.

`make chaos-stock` writes the file, a run a line; `make chaos` takes the last columns of its table from it.
"""

import json
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tests.chaos.run import Outcome
from tests.support.redis.server import executable

KEPT = Path(__file__).with_name("stock.jsonl")


class Versions(NamedTuple):
    """The versions under test, and the Redis that they ran on."""

    celery: str
    kombu: str
    redis: str

    def __str__(self) -> str:
        return f"celery {self.celery}, kombu {self.kombu}, Redis {self.redis}"


def read_installed() -> Versions:
    """The installed versions."""
    printed = subprocess.run([executable(), "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    return Versions(version("celery"), version("kombu"), (re.findall(r"v=(\S+)", printed) or ["?"])[0])


@dataclass(frozen=True)
class Kept:
    """The columns of a run's outcome, with its date and versions."""

    fault: str
    pool: str
    times: int
    sent: int
    lost: int
    waiting: int
    twice: int
    # Nodes that ended by themselves, where no poison had ended them.
    exits: int
    date: str
    celery: str
    kombu: str
    redis: str

    @property
    def versions(self) -> Versions:
        return Versions(self.celery, self.kombu, self.redis)


def summarize(outcome: Outcome) -> Kept:
    """The columns of a run that ends now."""
    return Kept(
        fault=outcome.fault,
        pool=outcome.pool,
        times=outcome.times,
        sent=outcome.sent,
        lost=len(outcome.lost),
        waiting=len(outcome.waiting),
        twice=sum(outcome.twice.values()),
        exits=0 if outcome.fault == "poison" else len(outcome.exits),
        date=datetime.now(UTC).date().isoformat(),
        **read_installed()._asdict(),
    )


def load(path: Path = KEPT) -> list[Kept]:
    """All kept outcomes."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Kept(**json.loads(line)) for line in lines]


def keep(outcome: Outcome, path: Path = KEPT) -> None:
    """Store an outcome in place of the one of the same fault and pool."""
    one = summarize(outcome)
    others = [each for each in load(path) if (each.fault, each.pool) != (one.fault, one.pool)]
    path.write_text("".join(f"{json.dumps(asdict(each))}\n" for each in [*others, one]))


def describe_stale(kept: Iterable[Kept], here: Versions) -> str:
    """A sentence where outcomes are of other versions of Celery or kombu than the installed ones; else ""."""
    others = sorted({str(each.versions) for each in kept if (each.celery, each.kombu) != (here.celery, here.kombu)})
    if not others:
        return ""
    return (
        f"Columns of kombu's own transport are of {'; '.join(others)}, and here is {here}: "
        "`make chaos-stock` makes them anew."
    )
