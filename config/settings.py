"""Every variable that can be set: its meaning, its default and why it is that."""

from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.fields import FieldInfo

from config import redis_url, types
from config.redis_url import RedisUrl

# Limits of containers that had variables of their own: rarely changed, so they stand in compose.yaml alone.
REMOVED_LIMITS = (
    *("REDIS_CPUS", "REDIS_PIDS", "WORKER_PIDS", "BEAT_MEMORY", "BEAT_CPUS", "BEAT_PIDS"),
    *("FLOWER_MEMORY", "FLOWER_CPUS", "FLOWER_PIDS"),
)


def setting(variable: str, default: Any, *, unit: str = "", example: str = "", **bounds: int) -> Any:
    """Declare a setting that is read from `variable`; the text below it says what it does.

    `bounds` are `ge` and `le` of a whole number; `example` is for a setting without default.
    """
    words: Any = {"unit": unit, "example": example, "bounds": bounds}
    return Field(default, alias=variable, json_schema_extra=words, **bounds)  # type: ignore[call-overload]


class Group(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True, arbitrary_types_allowed=True)


class BrokerSettings(Group):
    """The Redis that carries the tasks."""

    url: types.Url = setting("CELERY_BROKER_URL", redis_url.parse("redis://redis:6379/0"))
    """Redis database that carries the tasks: the stack's own `redis` service, or a Redis of yours."""

    password: types.Secret = setting("REDIS_PASSWORD", SecretStr(""))
    """Password of the `redis` service, and of every Redis URL that has none. Empty for a Redis without password."""

    visibility_timeout: types.Whole = setting("CELERY_VISIBILITY_TIMEOUT", 3600, ge=1, unit="seconds")
    """How long a Celery worker without Stalk's code may keep a task of the same queues before another worker runs it
    again; an hour, as in Celery. For Stalk's own workers WORKER_LEASE counts instead, however long a task runs."""

    allow_volatile: types.Flag = setting("BROKER_ALLOW_VOLATILE", False)
    """Start although the broker keeps nothing on disk: every waiting task is lost when it restarts."""

    sentinel_master: types.Name = setting("CELERY_SENTINEL_MASTER", "")
    """Name of the master that the sentinels of a sentinel:// URL watch."""

    sentinel_password: types.Secret = setting("CELERY_SENTINEL_PASSWORD", SecretStr(""))
    """Password of the sentinels themselves, if they have one."""


class ResultSettings(Group):
    """Where results are kept."""

    url: types.Url = setting("CELERY_RESULT_BACKEND", redis_url.parse("redis://redis:6379/1"))
    """Redis database that keeps the results. Another one than the broker's, so that emptying one spares the other."""

    expires: types.Whole = setting("CELERY_RESULT_EXPIRES", 86400, ge=1, unit="seconds")
    """How long a result is kept. A day: long enough to look into yesterday's failure, short enough to bound memory."""


class TaskSettings(Group):
    """Limits, schedules and logs, the same for every task."""

    time_limit: types.Whole = setting("CELERY_TASK_TIME_LIMIT", 1800, ge=2, unit="seconds")
    """A task that runs longer is killed, so that one that hangs does not occupy a worker for ever. Half an hour is far
    more than most tasks need. For tasks and calls without limits of their own. Enforced by the prefork pool only."""

    soft_time_limit: types.Whole | None = setting("CELERY_TASK_SOFT_TIME_LIMIT", None, ge=1, unit="seconds")
    """A task that runs longer gets SoftTimeLimitExceeded and can clean up before it is killed. Must be below
    CELERY_TASK_TIME_LIMIT; unset: 29/30 of it, such as 29 of 30 minutes. For tasks and calls without limits of their
    own; one with a soft limit alone is killed later by the same difference. Enforced by the prefork pool only."""

    imports: types.Modules = setting("CELERY_IMPORTS", (), example="shop.tasks,shop.reports")
    """Modules with tasks, in addition to those in services/tasks/."""

    timezone: types.TimeZone = setting("CELERY_TIMEZONE", "UTC")
    """Time zone in which crontab schedules are read. Internally all times are UTC."""

    log_level: types.LogLevel = setting("LOG_LEVEL", "info")
    """Workers, beat and Flower log messages of this level and above."""


class WorkerSettings(Group):
    """The nodes in a worker container; a node is a Celery worker with its pool."""

    processes: types.Whole = setting("WORKER_PROCESSES", 1, ge=1, le=64)
    """Celery nodes in a worker container. One is right for prefork, which has children of its own."""

    pool: types.Pool = setting("WORKER_POOL", "prefork")
    """How a node runs tasks: prefork (processes; for CPU-bound work and time limits), threads (for I/O-bound work),
    solo (one after another)."""

    concurrency: types.Whole | None = setting("WORKER_CONCURRENCY", None, ge=1, le=1000)
    """Tasks that a node runs at the same time. Unset: one for each CPU that the container may use."""

    queues: types.Queues = setting("WORKER_QUEUES", ("celery",))
    """Queues from which the nodes take tasks."""

    autoscale: types.Autoscale = setting("WORKER_AUTOSCALE", None, example="8,2")
    """Let a prefork node grow and shrink between two sizes, in place of WORKER_CONCURRENCY."""

    max_tasks_per_child: types.Whole | None = setting("WORKER_MAX_TASKS_PER_CHILD", None, ge=1)
    """Replace a prefork child after so many tasks, which bounds memory leaks."""

    max_memory_per_child: types.Whole | None = setting("WORKER_MAX_MEMORY_PER_CHILD", None, ge=10000, unit="KiB")
    """Replace a prefork child that uses more memory than this, after its task."""

    prefetch_multiplier: types.Whole = setting("WORKER_PREFETCH_MULTIPLIER", 1, ge=1, le=1000)
    """Tasks that a node reserves for each that it can run at the same time. With 1 no task waits in one worker while
    another is idle."""

    lease: types.Whole = setting("WORKER_LEASE", 60, ge=2, le=3600, unit="seconds")
    """How long a task stays with a worker that shows no sign of life; then another one runs it. A live worker renews
    the lease three times in that time, however long the task runs. A shorter one brings the tasks of a dead worker back
    sooner, but a worker that is merely stuck is taken for dead sooner too."""

    max_deliveries: types.Whole = setting("WORKER_MAX_DELIVERIES", 5, ge=1, le=100)
    """How often a task is started whose worker or pool child dies while it runs, or that exceeds its hard time limit
    with acks_on_timeout=False. Then it becomes a dead letter. More than once, because a worker may also die of
    something else than the task."""

    max_requeues: types.Whole = setting("WORKER_MAX_REQUEUES", 100, ge=0, le=10000)
    """How often a task may requeue itself (Reject with requeue=True). It runs again after 0.1 s, and after twice as
    long each time, up to a minute. Then it becomes a dead letter. 100 take an hour and a half, longer than most
    outages."""

    rate_limit_scope: types.RateLimitScope = setting("WORKER_RATE_LIMIT_SCOPE", "node")
    """Which starts a task's rate_limit counts: those of each node separately, as in Celery (node), or those of all
    nodes together (shared). Must be the same for all workers on one Redis."""

    dead_letters: types.DeadLetters = setting("WORKER_DEAD_LETTERS", ("retries", "rejects"))
    """What becomes a dead letter, in addition to messages that no worker can run: tasks that fail with their last retry
    (retries), and tasks that are rejected and not requeued (rejects)."""

    dead_letters_max: types.Whole = setting("WORKER_DEAD_LETTERS_MAX", 10_000, ge=1)
    """Once so many dead letters are kept, tasks that fail with their last retry or are rejected are not added: they end
    as FAILURE, with a warning in the log, so that everyday failures cannot fill Redis. Messages that no worker can run
    are always kept. 10,000 of 2 KB each take 20 MB."""

    soft_shutdown: types.Whole = setting("WORKER_SOFT_SHUTDOWN", 45, ge=1, unit="seconds")
    """How long running tasks may go on after a stop. What still runs then goes back to the queue. 45 s, so that a stop
    takes a minute at most (WORKER_STOP_GRACE_PERIOD)."""

    stop_grace_period: types.Whole = setting("WORKER_STOP_GRACE_PERIOD", 60, ge=1, unit="seconds")
    """How long Docker waits, after it has told a worker container to stop, before it kills it. At least
    WORKER_SOFT_SHUTDOWN and 15 s: 10 to requeue tasks and 5 for Supervisor to exit."""

    heartbeat_timeout: types.Whole = setting("WORKER_HEARTBEAT_TIMEOUT", 60, ge=45, unit="seconds")
    """A node whose main loop has been stuck for so long, although Redis answers and no solo task runs, is killed and
    replaced. Reconnecting pauses up to 30 s, so less than 45 would kill healthy nodes."""


class BeatSettings(Group):
    """The scheduler."""

    schedule: types.Schedule = setting("BEAT_SCHEDULE", (), example="report-free-space=0 3 * * *")
    """Changes to the schedule in services/schedule.py: an entry's period in seconds, its crontab, or off."""


class FlowerSettings(Group):
    """The web interface."""

    basic_auth: types.Login = setting("FLOWER_BASIC_AUTH", SecretStr(""))
    """Login for every page, the API and /metrics. The password may have colons and commas."""

    read_only_auth: types.Login = setting("FLOWER_READ_ONLY_AUTH", SecretStr(""), example="guest:another-long-password")
    """Login of a second user, who sees everything and changes nothing: the pages have no buttons, and actions are
    refused."""

    trusted_header: types.Header = setting("FLOWER_TRUSTED_HEADER", "", example="X-Forwarded-User")
    """Header in which a reverse proxy that logs users in names the user, who then needs no other login and may do
    everything. Only with FLOWER_TRUSTED_PROXIES (docs/operations.md)."""

    trusted_proxies: types.Networks = setting("FLOWER_TRUSTED_PROXIES", (), example="10.0.0.7")
    """Addresses, as Flower sees them, from which FLOWER_TRUSTED_HEADER is accepted; from all others it is ignored."""

    port: types.Port = setting("FLOWER_PORT", 8080)
    """Port on the host. Inside its container Flower always listens on 8080."""

    bind: types.Address = setting("FLOWER_BIND", "127.0.0.1")
    """Address on the host. Loopback, because Flower has no TLS: put a reverse proxy in front of it."""

    url_prefix: types.UrlPrefix = setting("FLOWER_URL_PREFIX", "", example="/flower")
    """Path under which a reverse proxy serves Flower."""

    max_tasks: types.Whole = setting("FLOWER_MAX_TASKS", 10000, ge=100, le=1_000_000)
    """Tasks that Flower remembers; it forgets the oldest first. 10,000 take about 100 MB of the 512 MB that its
    container may use (compose.yaml)."""

    max_workers: types.Whole = setting("FLOWER_MAX_WORKERS", 1000, ge=1, le=5000)
    """Workers that Flower remembers, including those that are gone: as many as WORKERS may be."""

    offline_after: types.Whole = setting("FLOWER_PURGE_OFFLINE_WORKERS", 60, ge=1, unit="seconds")
    """How long a worker that is gone stays on the page."""

    save_every: types.Whole = setting("FLOWER_STATE_SAVE_INTERVAL", 10, ge=1, unit="seconds")
    """How often Flower saves what it knows to its volume. A kill loses what came since."""


class StackSettings(Group):
    """What Compose and make read: images, counts and limits."""

    workers: types.Whole = setting("WORKERS", 1, ge=0, le=1000)
    """Number of worker containers; `make scale WORKERS=4` writes it here."""

    runtime: types.Runtime = setting("STALK_RUNTIME", "")
    """What `make` runs the stack with: containers (docker) or processes of this host (local). Unset: the first `make
    up` takes containers if a Docker Engine answers, else processes, and later ones do the same."""

    redis_replicas: types.ZeroOrOne = setting("REDIS_REPLICAS", 1)
    """1 runs the `redis` service; 0 uses a Redis of your own, named by CELERY_BROKER_URL and CELERY_RESULT_BACKEND."""

    redis_port: types.Port = setting("REDIS_PORT", 6379)
    """Port for Redis on this host's loopback, with docker/publish.yaml (docs/connect.md)."""

    redis_tls_bind: types.Address = setting("REDIS_TLS_BIND", "", example="192.0.2.10")
    """Address of this host on which other machines reach Redis with TLS (docs/connect.md). Unset: none do."""

    redis_tls_port: types.Port = setting("REDIS_TLS_PORT", 6380)
    """Port on REDIS_TLS_BIND."""

    python_image: types.Image = setting("PYTHON_IMAGE", "python:3.13.15-slim-trixie")
    """Base of the application image. `make up` writes stalk-base/python:3.13 here where no registry answers."""

    redis_image: types.Image = setting("REDIS_IMAGE", "redis:8.8.2-trixie")
    """Image of the `redis` service. `make up` writes stalk-base/redis:8.0 here where no registry answers."""

    run_directory: types.Directory = setting("STALK_RUN_DIR", "/run/stalk")
    """Directory for heartbeats, pid files and sockets, empty after a start. In the stack's containers it is always
    /run/stalk, a tmpfs."""

    redis_maxmemory: types.Size = setting("REDIS_MAXMEMORY", "512m")
    """Data that Redis holds before it refuses new tasks; workers may use a quarter more to finish theirs. Half of
    REDIS_MEMORY, because rewriting the append-only file can need as much again; four fifths of it or more are
    refused."""

    redis_memory: types.Size = setting("REDIS_MEMORY", "1g")
    """Memory limit of the redis container: twice REDIS_MAXMEMORY."""

    worker_memory: types.Size = setting("WORKER_MEMORY", "1g")
    """Memory limit of a worker container: 60 MB for each node and child, and what your tasks need."""

    worker_cpus: types.Cpus = setting("WORKER_CPUS", "1", unit="CPUs")
    """CPU limit of a worker container, and with it the number of children of a prefork node. `make up` writes the
    number of CPUs here on its first run."""


@dataclass(frozen=True)
class Settings:
    """All settings, validated each and together."""

    broker: BrokerSettings
    results: ResultSettings
    tasks: TaskSettings
    worker: WorkerSettings
    beat: BeatSettings
    flower: FlowerSettings
    stack: StackSettings
    warnings: tuple[str, ...] = ()

    @property
    def broker_url(self) -> RedisUrl:
        """The broker's URL, with REDIS_PASSWORD if it has no password of its own."""
        return self.broker.url.with_password(self.broker.password.get_secret_value())

    @property
    def result_url(self) -> RedisUrl:
        """The result backend's URL, with REDIS_PASSWORD if it has no password of its own."""
        return self.results.url.with_password(self.broker.password.get_secret_value())

    @property
    def unset_urls(self) -> dict[str, RedisUrl]:
        """The URLs that nobody has set, by variable, where their default leads nowhere.

        The default names the `redis` service. Only the stack's containers reach it; their image sets STALK_RUN_DIR.
        """
        if "run_directory" in self.stack.model_fields_set:
            return {}
        urls = {
            "CELERY_BROKER_URL": (self.broker, self.broker_url),
            "CELERY_RESULT_BACKEND": (self.results, self.result_url),
        }
        return {name: url for name, (group, url) in urls.items() if "url" not in group.model_fields_set}


GROUPS: dict[str, type[Group]] = {name: group for name, group in get_type_hints(Settings).items() if name != "warnings"}


@dataclass(frozen=True)
class Variable:
    """A variable, and the setting of which group is read from it."""

    name: str
    group: str
    attribute: str
    default: Any
    allowed: str
    unit: str
    example: str
    is_secret: bool


def describe(group: str, attribute: str, field: FieldInfo) -> Variable:
    """The variable of one field, with the values that its bounds or its type allow in words."""
    words: Any = field.json_schema_extra
    allowed = next((part for part in field.metadata if isinstance(part, types.Allowed)), "")
    if bounds := words["bounds"]:
        numbers = f"whole {words['unit']}" if words["unit"] else "a whole number"
        allowed = numbers + (" from {ge} to {le}" if "le" in bounds else ", {ge} or more").format(**bounds)
    return Variable(
        name=str(field.alias),
        group=group,
        attribute=attribute,
        default=field.default,
        allowed=allowed or "one of " + ", ".join(get_args(field.annotation)),
        unit=words["unit"],
        example=words["example"],
        # A Redis URL may carry a password.
        is_secret=field.annotation in (SecretStr, RedisUrl),
    )


VARIABLES = {
    str(field.alias): describe(name, attribute, field)
    for name, group in GROUPS.items()
    for attribute, field in group.model_fields.items()
}
# Each may come from a file that NAME_FILE names, and no error repeats it.
SECRETS = tuple(variable.name for variable in VARIABLES.values() if variable.is_secret)
