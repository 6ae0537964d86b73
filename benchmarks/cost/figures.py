"""Figures of both sides, and what pairs of them say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

# Of all times. What comes first finds cold caches and connections that are not open yet.
COLD = 0.1
# A baseline that differs from itself by more says nothing about others.
LARGEST_SPREAD = 1.5


@dataclass(frozen=True)
class Measurement:
    """One side of one pair."""

    # Tasks a second that a full queue gives.
    throughput: float
    # Seconds for 1,000 tasks.
    node_cpu: float
    redis_cpu: float
    # For each task: over a connection, and with those that scripts execute.
    calls: float
    commands: float
    # Milliseconds from before apply_async to the start.
    latency_median: float
    latency_99: float
    # MiB of the node's processes.
    memory: float
    # Tasks a second that one producer sends.
    publish: float


@dataclass(frozen=True)
class Figure:
    """A column of a measurement."""

    field: str
    title: str
    more_is_better: bool = False


FIGURES = (
    Figure("throughput", "throughput, tasks/s", more_is_better=True),
    Figure("node_cpu", "node's CPU, s per 1,000 tasks"),
    Figure("redis_cpu", "Redis's CPU, s per 1,000 tasks"),
    Figure("calls", "Redis calls over connections per task"),
    Figure("commands", "Redis commands in all per task"),
    Figure("latency_median", "idle latency p50, ms"),
    Figure("latency_99", "idle latency p99, ms"),
    Figure("memory", "node's memory, MiB"),
    Figure("publish", "publish, tasks/s", more_is_better=True),
)


@dataclass(frozen=True)
class Summary:
    """The median of some values, and how far they reach."""

    median: float
    least: float
    most: float

    @property
    def spread(self) -> float:
        """How many times the least value the greatest is."""
        return self.most / self.least if self.least else math.inf


def summarize(values: Sequence[float]) -> Summary:
    """Median and range; raises ValueError when there are no values."""
    if not values:
        raise ValueError("nothing was measured")
    return Summary(median(values), min(values), max(values))


def rate(times: Sequence[float]) -> float:
    """Events a second, from ascending times in seconds, without the first tenth."""
    first = math.ceil(len(times) * COLD)
    seconds = times[-1] - times[first]
    return (len(times) - 1 - first) / seconds if seconds else math.inf


def percentile(values: Sequence[float], part: float) -> float:
    """The least value that so many of 100 values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * part / 100) - 1)]


def ratios(stock: Sequence[float], stalk: Sequence[float]) -> list[float]:
    """Stalk to stock, pair by pair; a pair whose stock is zero has none."""
    return [ours / theirs for theirs, ours in zip(stock, stalk, strict=True) if theirs]


def judge(figure: Figure, baseline: Summary, pairs: Sequence[float]) -> str:
    """In how many of the pairs Stalk is better, unless the baseline is too unsteady to tell."""
    if baseline.spread > LARGEST_SPREAD:
        return f"none: stock itself spreads {baseline.spread:.2f} times"
    better = sum(1 for each in pairs if (each > 1) is figure.more_is_better and each != 1)
    return f"better in {better} of {len(pairs)}"


def format_number(value: float) -> str:
    """Three digits that count."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def format_summary(summary: Summary) -> str:
    return f"{format_number(summary.median)} ({format_number(summary.least)} to {format_number(summary.most)})"
