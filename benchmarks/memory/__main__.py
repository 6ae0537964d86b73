"""python -m benchmarks.memory: whether a node and Redis give back what they take; writes the table.

Each part has a Redis and a node of its own. Exit codes: 0 every bound was kept, 1 one was not, or the run came to
nothing, 2 the command line is wrong.
"""

import shlex
import signal
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

import click
from celery.exceptions import TimeoutError as NoAnswer

from benchmarks.footprint import MIB, Figure, Reading, breaches, change, exactly, growth, mib, of_each, table
from benchmarks.memory.site import CONCURRENCY, Site, allow_seconds, open_site
from config import load
from services.broker.keys import PUBLISHED, SCHEDULED
from tests.chaos.report import describe_versions
from tests.support.waiting import GaveUp

# After a million tasks a leak of ten bytes a task shows as 10 MB.
NODE_LIMIT = 10 * MIB
# A byte a task.
REDIS_LIMIT = MIB
# By then every path has been taken that a task takes, and every buffer and cache is there.
FIRST = 10_000
# So that results expire while the run goes on, as they do in a stack that runs for longer than a day.
EXPIRES_SECONDS = 60
# Redis looks for what has expired ten times a second, and gives it a quarter of its time.
EXPIRED_SECONDS = EXPIRES_SECONDS + 120
# After that it shrinks its tables, and the buffers of clients that have gone quiet, within a few seconds.
SETTLE_SECONDS = 30
# Longer than any run, so that nothing becomes due in it.
COUNTDOWN_SECONDS = 6 * 3600

HEAD = """# Memory: what a node and Redis take, and give back

Written by `python -m benchmarks.memory`; not by hand. Each part has one Redis and one node, whose tasks do nothing and
have a result. *Node*: the memory of its processes, read when nothing waits and nothing is held; by proportional share,
so that a page which a child has in common with its parent counts once; swapped-out memory included, pages of files
left out, because every Python of the machine shares those. A child that writes to such a page for the first time makes
the node larger and has not grown itself: *if nothing were shared* tells that from a leak. *Redis*: its `used_memory`.
"""
COLUMNS = "| tasks | tasks a second | node | node, if nothing were shared | Redis |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Part:
    """What one part has found: a title, sentences about it, figures, and how it went on."""

    title: str
    about: str
    figures: list[Figure]
    course: str = ""

    def text(self) -> str:
        return "\n\n".join(filter(None, [f"## {self.title}", self.about, table(self.figures), self.course]))


# --- A million tasks


def many_tasks(pool: str, count: int, every: int, producers: int) -> Part:
    """Run so many tasks, wait until their results have expired, and compare the node and Redis with before.

    Raises AssertionError when the node or a producer ends, or when something takes for ever.
    """
    with open_site(pool, producers, CELERY_RESULT_EXPIRES=str(EXPIRES_SECONDS)) as site:
        used, keys = site.used(), site.keys()
        course: list[str] = []
        first = run(site, FIRST, every, course)
        last = run(site, count, every, course)
        executed = exactly("results stored", site.executed(), count)
        figures = [executed, *of_node(f"its first {FIRST:,} tasks", first, f"{count:,} tasks", last)]
        figures += of_redis(site, used, keys)
        about = f"{pool}, concurrency {CONCURRENCY[pool]}; results expire after {EXPIRES_SECONDS} s. {recycling(site)}"
        return Part(f"{count:,} tasks", about, figures, "\n".join([COLUMNS, *course]))


def run(site: Site, total: int, every: int, course: list[str]) -> Reading:
    """Have tasks sent until `total` have been executed, with a line for every so many; the node's memory after that."""
    for wanted in steps(site.executed(), total, every):
        done = site.executed()
        # New producers each time: one that asks for no results keeps 250 bytes of each task, and what Redis tells it
        # piles up unread until Redis hangs up (celery 5.7, redis-py 8.1), which would be measured here as well.
        with site.sending(wanted - done):
            # The rate is that of a node at work, not of producers that start.
            site.wait_executed(done + 1, 1)
            began, had = monotonic(), site.executed()
            site.wait_executed(wanted, wanted - done)
            rate = (site.executed() - had) / (monotonic() - began)
        site.wait(site.is_idle, allow_seconds(0), "nothing waits and nothing is held")
        course.append(progress(site, rate))
    return site.reading()


def steps(done: int, total: int, every: int) -> list[int]:
    """At how many tasks there is a line: at each multiple of `every` that is to come, and at the last."""
    return [*(count for count in range(every, total, every) if count > done), total]


def progress(site: Site, rate: float) -> str:
    """A line of the table, which is said as well."""
    node = site.reading()
    line = f"| {site.executed():,} | {rate:,.0f} | {mib(node.own)} | {mib(node.alone)} | {mib(site.used())} |"
    click.echo(line)
    return line


def recycling(site: Site) -> str:
    """What of the configuration decides about memory: whether children are replaced, which would hide a leak."""
    settings = load(site.stack.environment())
    worker = settings.worker
    limits = {
        "WORKER_MAX_TASKS_PER_CHILD": worker.max_tasks_per_child,
        "WORKER_MAX_MEMORY_PER_CHILD": worker.max_memory_per_child,
    }
    said = ", ".join(f"{name}={value or 'unset'}" for name, value in limits.items())
    # A prefork node sets a timer for each task, as long as this.
    said += f", CELERY_TASK_TIME_LIMIT={settings.tasks.time_limit}"
    return f"{said}, as by default: " + ("children are replaced." if any(limits.values()) else "no child is replaced.")


def of_node(early: str, first: Reading, late: str, last: Reading) -> list[Figure]:
    """The node's memory at two times, in all and by process."""
    return [
        Figure(f"node after {early}", mib(first.own)),
        Figure(f"node after {late}", mib(last.own)),
        growth("node, growth", first.own, last.own, NODE_LIMIT),
        growth("node, growth if its processes shared nothing", first.alone, last.alone, NODE_LIMIT),
        *of_each(first, last),
        Figure("pages of files, not in it", f"{mib(first.files)} → {mib(last.files)}"),
    ]


def of_redis(site: Site, used: int, keys: list[str]) -> list[Figure]:
    """What Redis uses and keeps when all results have expired, beside what it did before the first task."""
    full, waited = site.used(), monotonic()
    site.wait(lambda: not site.results.dbsize(), EXPIRED_SECONDS, "no result is left")
    expired = monotonic() - waited
    with suppress(GaveUp):
        site.wait(lambda: site.used() - used < REDIS_LIMIT, SETTLE_SECONDS, "Redis is back")
    now = site.used()
    return [
        Figure("Redis before the first task", mib(used)),
        Figure("Redis after the last", mib(full)),
        Figure("no result left", f"{expired:.0f} s after the last task"),
        Figure("Redis then", mib(now)),
        change("Redis, difference to before", used, now, REDIS_LIMIT),
        Figure("keys of the broker before", kinds(keys)),
        Figure("keys of the broker after", kinds(site.keys())),
    ]


def kinds(keys: list[str]) -> str:
    """The keys, with those counted that belong to a publishing thread: they expire in an hour."""
    counts = Counter(f"{PUBLISHED}…" if key.startswith(PUBLISHED) else key for key in keys)
    return ", ".join(f"`{key}`" + (f" ({count})" if count > 1 else "") for key, count in counts.items()) or "none"


# --- Far ETAs


def far_etas(pool: str, count: int, producers: int) -> Part:
    """Publish so many tasks that are due in hours, and compare the node with before; ask ordinary tasks meanwhile.

    Raises AssertionError as many_tasks does, and celery.exceptions.TimeoutError when an ordinary task has no result.
    """
    with open_site(pool, producers) as site:
        before, used = site.reading(), site.used()
        idle = site.ask()

        def waiting() -> int:
            return int(site.broker.zcard(SCHEDULED))

        with site.sending(count, COUNTDOWN_SECONDS):
            site.wait(lambda: waiting() >= count // 2, allow_seconds(count), "half of the tasks wait for their time")
            meanwhile, between = site.ask(), waiting()
            site.wait(lambda: waiting() >= count, allow_seconds(count), "all tasks wait for their time")
        site.wait(site.is_idle, allow_seconds(0), "nothing waits and nothing is held")
        after, full = site.reading(), site.used()
        figures = [
            exactly("tasks that wait for their time", waiting(), count),
            Figure("node before", mib(before.own)),
            Figure("node with all of them", mib(after.own)),
            change("node, difference", before.own, after.own, NODE_LIMIT),
            change("node, difference if its processes shared nothing", before.alone, after.alone, NODE_LIMIT),
            *of_each(before, after),
            Figure("Redis before", mib(used)),
            Figure("Redis with all of them", mib(full)),
            Figure("Redis, of each that waits", f"{(full - used) / count:,.0f} bytes"),
            Figure("an ordinary task, before", seconds(idle)),
            Figure(f"an ordinary task, behind what is in the queue, when {between:,} wait", seconds(meanwhile)),
            Figure("an ordinary task, when all wait", seconds(site.ask())),
        ]
        due = COUNTDOWN_SECONDS // 3600
        about = f"{pool}, concurrency {CONCURRENCY[pool]}; due in {due} hours, published while the node runs."
        return Part(f"{count:,} tasks that are due in hours", about, figures)


def seconds(time: float) -> str:
    """From publish to result."""
    return f"{time * 1000:,.0f} ms"


# --- The command


@click.command(context_settings={"show_default": True})
@click.option("--part", default="all", type=click.Choice(["tasks", "etas", "all"]), help="Only this.")
@click.option("--pool", default="prefork", type=click.Choice(list(CONCURRENCY)), help="The node's WORKER_POOL.")
@click.option("--tasks", default=1_000_000, type=click.IntRange(min=2 * FIRST), help="Tasks to execute.")
@click.option("--etas", default=100_000, type=click.IntRange(min=100), help="Tasks that are due in hours.")
@click.option("--every", default=100_000, type=click.IntRange(min=1000), help="A line for every so many tasks.")
@click.option("--producers", default=2, type=click.IntRange(1, 8), help="Processes that send.")
@click.option("--output", default="docs/memory.md", type=click.Path(path_type=Path), help="The table.")
def main(*, part: str, pool: str, tasks: int, etas: int, every: int, producers: int, output: Path) -> None:
    """Measure the memory of a node and of Redis, and write the table."""
    # Ended by its handler, so that what was started ends as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parts = []
    try:
        if part in ("tasks", "all"):
            parts.append(many_tasks(pool, tasks, every, producers))
        if part in ("etas", "all"):
            parts.append(far_etas(pool, etas, producers))
    except (AssertionError, NoAnswer) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    for each in parts:
        click.echo(f"{each.text()}\n")
    command = shlex.join(["python", "-m", "benchmarks.memory", *sys.argv[1:]])
    made = f"`{command}`, {datetime.now(UTC).date().isoformat()}. {describe_versions()}."
    output.write_text("\n\n".join([f"{HEAD}\n{made}", *(each.text() for each in parts)]) + "\n")
    broken = [sentence for each in parts for sentence in breaches(each.figures)]
    for sentence in broken:
        click.echo(f"broken: {sentence}", err=True)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
