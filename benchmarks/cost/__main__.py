"""python -m benchmarks.cost: what a delivery costs with Stalk, beside kombu's own transport with the same settings.

Gates nothing. Exit codes: 0 everything was measured, 1 a run failed, 2 the command line is wrong, 143 stopped by TERM.
"""

import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import click

from benchmarks.cost.bench import Bench, Plan, measure
from benchmarks.cost.figures import (
    FIGURES,
    Figure,
    Measurement,
    format_number,
    format_summary,
    judge,
    ratios,
    summarize,
)
from tests.chaos.report import describe_versions
from tests.chaos.subjects import CONCURRENCY, POOLS, PREFETCH, STALK, Subject
from tests.support.checkout import Checkout
from tests.support.harness import Harness
from tests.support.waiting import GaveUp

STOCK = Subject("stock", "benchmarks.cost.stock_app")
# 128 and the number of SIGTERM, as shells say it.
STOPPED = 143
# What nodes and producers of both sides import, beside the code of the stack.
PACKAGES = ("benchmarks", "tests/chaos", "tests/support")

HEAD = """# What a delivery costs

Written by `python -m benchmarks.cost`; not by hand. Stalk beside kombu's own Redis transport with the same settings:
late acknowledgement, the same prefetch count, time limits, events and log lines, and each result stored. Tasks do
nothing but note when they start. Each value is the median of all pairs with their range; a ratio is Stalk's value
divided by stock's in the same pair. Throughput, CPU and commands leave out the first tenth of the tasks, CPU includes
child processes, and idle latency runs from before `apply_async` to the task's start. There is no verdict where stock
differs from itself by more than 1.5 times.
"""
COLUMNS = ("figure", "stock", "Stalk", "Stalk / stock", "verdict: Stalk is")


@dataclass(frozen=True)
class Pair:
    """Both sides, one right after the other."""

    stock: Measurement
    stalk: Measurement


@dataclass
class Records:
    """The pairs so far, and the document that they make."""

    plans: Sequence[Plan]
    output: Path | None
    pairs: dict[str, list[Pair]] = field(default_factory=dict)

    def add(self, plan: Plan, pair: Pair) -> None:
        """Keep and print a pair, and write the document with it: a run takes long and may be stopped."""
        self.pairs.setdefault(plan.pool, []).append(pair)
        for side, each in (("stock", pair.stock), ("Stalk", pair.stalk)):
            values = ", ".join(f"{figure.title} {format_number(getattr(each, figure.field))}" for figure in FIGURES)
            click.echo(f"{plan.pool} {len(self.pairs[plan.pool])} {side}: {values}")
        if self.output:
            self.output.write_text(self.document())

    def document(self) -> str:
        """The whole of it, as Markdown."""
        command = shlex.join(["python", "-m", "benchmarks.cost", *sys.argv[1:]])
        made = f"`{command}`, {datetime.now(UTC).date().isoformat()}, {os.cpu_count()} cores. {describe_versions()}."
        tables = [f"## {caption(plan)}\n\n{table(self.pairs.get(plan.pool, []))}" for plan in self.plans]
        return "\n".join([HEAD, made, "", *tables])


def caption(plan: Plan) -> str:
    """What a table is about."""
    concurrency = CONCURRENCY[plan.pool]
    return f"{plan.pool}, concurrency {concurrency}, prefetch multiplier {plan.prefetch}, {plan.tasks:,} tasks"


def table(pairs: Sequence[Pair]) -> str:
    """A pool's figures as a Markdown table that can be read as it is."""
    if not pairs:
        return "Not measured yet.\n"
    rows = [COLUMNS, *(row(figure, pairs) for figure in FIGURES)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(COLUMNS))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "".join(f"| {line} |\n" for line in lines)


def row(figure: Figure, pairs: Sequence[Pair]) -> tuple[str, ...]:
    """One figure of all pairs."""
    stock = [float(getattr(pair.stock, figure.field)) for pair in pairs]
    stalk = [float(getattr(pair.stalk, figure.field)) for pair in pairs]
    baseline, compared = summarize(stock), ratios(stock, stalk)
    ratio = format_summary(summarize(compared)) if compared else "-"
    return (
        figure.title,
        format_summary(baseline),
        format_summary(summarize(stalk)),
        ratio,
        judge(figure, baseline, compared),
    )


def one_side(directory: Path, code: Checkout, subject: Subject, plan: Plan) -> Measurement:
    """Measure one side, on a Redis and a node of its own that are gone afterwards."""
    directory.mkdir(parents=True)
    with Harness(directory, code).opened() as harness:
        try:
            return measure(Bench(harness, subject, plan))
        except GaveUp as error:
            raise click.ClickException(str(error)) from None


def one_pair(directory: Path, code: Checkout, plan: Plan, index: int) -> Pair:
    """Measure both sides; every other pair the other one first, so that neither always runs second."""
    order = (STOCK, STALK) if index % 2 == 0 else (STALK, STOCK)
    found = {side.name: one_side(directory / f"{plan.pool}-{index}-{side.name}", code, side, plan) for side in order}
    return Pair(found["stock"], found["stalk"])


def stop(*_: object) -> None:
    """As Ctrl-C does: whoever stops this must not be left with its nodes."""
    # timeout(1) sends it twice; the second one would interrupt the cleanup.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(STOPPED)


@click.command(context_settings={"show_default": True})
@click.option("--pool", "pools", multiple=True, type=click.Choice(POOLS), help="Only these.")
@click.option("--pairs", default=7, type=click.IntRange(min=1), help="Runs of each side.")
# Fewer have no tenth to leave out.
@click.option("--tasks", default=10_000, type=click.IntRange(min=20), help="Tasks that fill the queue.")
@click.option("--latencies", default=200, type=click.IntRange(min=1), help="Tasks that are sent one at a time.")
@click.option(
    "--prefetch", default=PREFETCH, type=click.IntRange(min=1), help="Tasks that a node holds for each that it can run."
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="File for the tables, as Markdown.")
def main(*, pools: tuple[str, ...], pairs: int, tasks: int, latencies: int, prefetch: int, output: Path | None) -> None:
    """Measure both sides in pairs and say what each figure and their ratios are."""
    plans = [Plan(pool, tasks, latencies, prefetch) for pool in pools or POOLS]
    records = Records(plans, output)
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="cost-") as name:
        code = Checkout(Path(name) / "code", packages=PACKAGES)
        # A pair of each pool in turn: what disturbs the machine for a while disturbs all pools.
        for index in range(pairs):
            for plan in plans:
                records.add(plan, one_pair(Path(name), code, plan, index))
    click.echo("\n" + records.document())


if __name__ == "__main__":
    main()
