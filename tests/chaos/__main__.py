"""python -m tests.chaos: every fault against every pool, for Stalk and for kombu's own transport; writes the table.

Exit codes: 0 Stalk kept its contract in every run, 1 it did not, 2 the command line is wrong.
"""

from __future__ import annotations

import json
import shlex
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import click

from tests.chaos.arena import Plan
from tests.chaos.faults import FAULTS
from tests.chaos.report import table
from tests.chaos.run import Outcome, run
from tests.chaos.subjects import POOLS, SUBJECTS


def plan(fault: str, pool: str, subject: str, seed: int, *, full: bool, lease: int, count: int, rate: float) -> Plan:
    """The plan of one run; its own seed follows from the one given, so that a run can be repeated alone."""
    own = zlib.crc32(f"{seed} {fault} {pool}".encode())
    times = FAULTS[fault].times[full]
    return Plan(fault, pool, SUBJECTS[subject], lease, times, count, rate, own)


def read(path: Path) -> list[Outcome]:
    """Outcomes of runs before."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def line(outcome: Outcome) -> str:
    """An outcome as it is kept: without what the processes said."""
    return json.dumps(asdict(outcome) | {"story": ""}) + "\n"


def say(outcome: Outcome) -> None:
    """One line for each run, and one for each breach of Stalk's contract."""
    twice = ", ".join(f"{count} {why}" for why, count in outcome.twice.items()) or "0"
    click.echo(
        f"{outcome.fault} {outcome.pool} {outcome.subject}: sent {outcome.sent}, executed {outcome.executed}, "
        f"lost {len(outcome.lost)}, never kept {len(outcome.never_kept)}, waiting {len(outcome.waiting)}, "
        f"twice {twice}, worst {outcome.worst:.1f} s {'; '.join(outcome.exits + outcome.remarks)}"
    )
    for breach in outcome.breaches if outcome.subject == "stalk" else []:
        click.echo(f"    {breach}")


@click.command(context_settings={"show_default": True})
@click.option("--fault", "faults", multiple=True, type=click.Choice(list(FAULTS)), help="Only these.")
@click.option("--pool", "pools", multiple=True, type=click.Choice(POOLS), help="Only these.")
@click.option("--subject", "subjects", multiple=True, type=click.Choice(list(SUBJECTS)), help="Only these.")
@click.option("--count", default=2000, help="Tasks in a run, at least.")
@click.option("--rate", default=100.0, help="Tasks a second.")
@click.option("--lease", default=5, help="WORKER_LEASE, and kombu's visibility timeout.")
@click.option("--seed", default=1, help="Decides which node is struck.")
@click.option("--short", is_flag=True, help="Strike as often as the tests do.")
@click.option("--resume", is_flag=True, help="Keep the outcomes that RESULTS has, and do not run them again.")
@click.option("--results", default=".stalk/chaos.jsonl", type=click.Path(path_type=Path), help="One outcome a line.")
@click.option("--output", default="docs/chaos.md", type=click.Path(path_type=Path), help="The table.")
def main(
    *,
    faults: tuple[str, ...],
    pools: tuple[str, ...],
    subjects: tuple[str, ...],
    count: int,
    rate: float,
    lease: int,
    seed: int,
    short: bool,
    resume: bool,
    results: Path,
    output: Path,
) -> None:
    """Run faults against pools and write what became of the tasks."""
    results.parent.mkdir(parents=True, exist_ok=True)
    outcomes = read(results) if resume else []
    done = {(outcome.fault, outcome.pool, outcome.subject) for outcome in outcomes}
    results.write_text("".join(line(outcome) for outcome in outcomes))
    command = shlex.join(["python", "-m", "tests.chaos", *sys.argv[1:]])
    for fault in faults or FAULTS:
        for pool in pools or POOLS:
            for subject in subjects or SUBJECTS:
                if (fault, pool, subject) in done or (FAULTS[fault].stalk_only and subject == "stock"):
                    continue
                outcome = run(plan(fault, pool, subject, seed, full=not short, lease=lease, count=count, rate=rate))
                say(outcome)
                outcomes.append(outcome)
                with results.open("a") as file:
                    file.write(line(outcome))
                output.write_text(table(outcomes, command, seed))
    sys.exit(1 if any(outcome.breaches for outcome in outcomes if outcome.subject == "stalk") else 0)


if __name__ == "__main__":
    main()
