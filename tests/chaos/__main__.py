"""python -m tests.chaos: every fault against every pool; writes the table.

With `--subject stock` kombu's own transport is struck, and what becomes of it kept (tests/chaos/stock_outcomes.py).

Exit codes: 0 Stalk kept its contract in every run, 1 it did not, 2 the command line is wrong.
"""

import json
import os
import shlex
import sys
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import click

from tests.chaos import stock_outcomes
from tests.chaos.faults import ALL_FAULTS, CONTAINER_FAULTS, FAULTS
from tests.chaos.report import build_document, describe_twice
from tests.chaos.run import Outcome, run, run_in_containers
from tests.chaos.subjects import POOLS, STALK, SUBJECTS, Subject
from tests.chaos.testbeds.base import Plan
from tests.chaos.testbeds.containers import open_container_stack
from tests.stack.conftest import missing_engine

# A worker's container may use one core, and its tasks take 50 ms.
CONTAINER_RATE = 40.0
# The least that the contract speaks of, and that Docker can be told to do anything in.
CONTAINER_LEASE = 10
# A run with strike after strike keeps half a core busy: three on two cores leave a quarter of them idle. With more the
# longest recovery would be the length of a wait for a processor.
RUNS_PER_CORE = 1.5
# Two nodes with their children, one that is just starting, a producer and Redis take half of it.
RUN_KIB = 1024**2


@dataclass
class Records:
    """The outcomes so far, in a file, and the table that they make."""

    subject: Subject
    results: Path
    output: Path
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)

    def exclude(self, plans: Iterable[Plan]) -> list[Plan]:
        """The plans that have no outcome yet."""
        carried_out = {(outcome.fault, outcome.pool) for outcome in self.outcomes}
        return [plan for plan in plans if (plan.fault, plan.pool) not in carried_out]

    def load(self) -> None:
        """Take over the outcomes of runs before."""
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        found = [Outcome(**json.loads(line)) for line in lines]
        self.outcomes += [outcome for outcome in found if outcome.subject == self.subject.name]

    def add(self, outcome: Outcome) -> None:
        """Keep and print an outcome, and write the table with it."""
        self.outcomes.append(outcome)
        self.results.parent.mkdir(parents=True, exist_ok=True)
        # Without the logs, which are long.
        self.results.write_text("".join(json.dumps(asdict(each) | {"story": ""}) + "\n" for each in self.outcomes))
        if self.subject == STALK:
            command = shlex.join(["python", "-m", "tests.chaos", *sys.argv[1:]])
            self.output.write_text(build_document(self.outcomes, stock_outcomes.load(), command, self.seed))
        else:
            stock_outcomes.keep(outcome)
        print_outcome(outcome)


def print_outcome(outcome: Outcome) -> None:
    """One line for each run, and one for each breach of Stalk's contract."""
    click.echo(
        f"{outcome.fault} {outcome.pool} {outcome.subject}: sent {outcome.sent}, executed {outcome.executed}, "
        f"lost {len(outcome.lost)}, never kept {len(outcome.never_kept)}, waiting {len(outcome.waiting)}, "
        f"twice {describe_twice(outcome)} (recorded {outcome.recorded}), worst {outcome.worst:.1f} s, "
        f"took {outcome.seconds:.0f} s {'; '.join(outcome.exits + outcome.remarks)}"
    )
    for breach in outcome.breaches if outcome.subject == STALK.name else []:
        click.echo(f"    {breach}")


def count_parallel_runs() -> int:
    """How many runs this machine has cores and memory for at a time."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    memory = int(lines["MemAvailable"].split()[0]) // RUN_KIB
    return max(1, min(int(len(os.sched_getaffinity(0)) * RUNS_PER_CORE), memory))


def run_in_process(plan: Plan, keep: Path | None) -> Outcome:
    """One run on processes of this machine, in a directory that is gone afterwards, or in one below `keep`."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        return run(plan, keep / f"{plan.fault}-{plan.pool}-{plan.subject.name}" if keep else Path(temporary))


def run_in_processes(records: Records, plans: Iterable[Plan], jobs: int, keep: Path | None) -> None:
    """Carry out `jobs` plans at a time, each in a process of its own."""
    with ProcessPoolExecutor(jobs) as pool:
        runs = [pool.submit(run_in_process, plan, keep) for plan in plans]
        try:
            for done in as_completed(runs):
                records.add(done.result())
        finally:
            for each in runs:
                each.cancel()


def run_in_own_stack(records: Records, plans: Sequence[Plan]) -> None:
    """Carry out plans of containers one after the other, those of a pool together, if there is a Docker Engine."""
    if not plans:
        return
    if why := missing_engine():
        click.echo(f"Without the faults of containers: {why}")
        return
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as directory,
        open_container_stack(Path(directory), CONTAINER_LEASE) as container_stack,
    ):
        for plan in sorted(plans, key=lambda plan: POOLS.index(plan.pool)):
            adapted = replace(plan, lease=CONTAINER_LEASE, count=plan.count // 4, rate=CONTAINER_RATE)
            records.add(run_in_containers(container_stack, adapted))


@click.command(context_settings={"show_default": True})
@click.option("--fault", "faults", multiple=True, type=click.Choice(list(ALL_FAULTS)), help="Only these.")
@click.option("--pool", "pools", multiple=True, type=click.Choice(POOLS), help="Only these.")
@click.option("--subject", "name", default=STALK.name, type=click.Choice(list(SUBJECTS)), help="What is struck.")
@click.option("--count", default=2000, help="Tasks in a run, at least.")
@click.option("--rate", default=100.0, help="Tasks a second, at most.")
@click.option("--lease", default=5, help="WORKER_LEASE, and kombu's visibility timeout; containers have 10.")
@click.option("--seed", default=1, help="Decides which node is struck.")
@click.option("--short", is_flag=True, help="Strike as often as the tests do.")
@click.option(
    "--jobs",
    type=int,
    default=count_parallel_runs,
    help="Runs at a time, by cores and memory; those of containers take turns.",
)
@click.option("--resume", is_flag=True, help="Keep the outcomes that RESULTS has, and do not run them again.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Directory for what the processes of each run left behind.",
)
@click.option("--results", type=click.Path(path_type=Path), help="One outcome a line.  [default: in .stalk/]")
@click.option("--output", default="docs/chaos.md", type=click.Path(path_type=Path), help="The table.")
def main(
    *,
    faults: tuple[str, ...],
    pools: tuple[str, ...],
    name: str,
    count: int,
    rate: float,
    lease: int,
    seed: int,
    short: bool,
    jobs: int,
    resume: bool,
    keep: Path | None,
    results: Path | None,
    output: Path,
) -> None:
    """Run faults against pools and write what became of the tasks."""
    subject = SUBJECTS[name]
    records = Records(subject, results or Path(f".stalk/chaos-{name}.jsonl"), output, seed)
    if resume:
        records.load()
    if subject == STALK and (
        sentence := stock_outcomes.describe_stale(stock_outcomes.load(), stock_outcomes.read_installed())
    ):
        click.echo(sentence)
    plans = [
        Plan(
            fault.name,
            pool,
            subject,
            lease,
            # Few strikes are enough to see what kombu's own transport does.
            fault.times[subject == STALK and not short],
            count,
            rate,
            # The same when the run is repeated alone.
            zlib.crc32(f"{seed} {fault.name} {pool}".encode()),
        )
        for fault in ALL_FAULTS.values()
        for pool in pools or POOLS
        if fault.name in (faults or ALL_FAULTS) and not (fault.stalk_only and subject != STALK)
    ]
    plans = records.exclude(plans)
    run_in_processes(records, [plan for plan in plans if plan.fault in FAULTS], jobs, keep)
    run_in_own_stack(records, [plan for plan in plans if plan.fault in CONTAINER_FAULTS])
    sys.exit(1 if any(each.breaches for each in records.outcomes if each.subject == STALK.name) else 0)


if __name__ == "__main__":
    main()
