"""What can be set: every setting with its type, unit, default and meaning, validated together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from config import redis_url
from config.environment import (
    ConfigError,
    pin_celery_urls,
    process_environment,
    read_env_file,
    with_secret_files,
)
from config.redis_url import RedisUrl

ENV_FILE = Path(__file__).resolve().parent.parent / ".env"
POOLS = ("prefork", "threads", "solo")
RATE_LIMIT_SCOPES = ("node", "shared")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
# Time the node needs, after its soft shutdown, to hand back what it holds before Supervisor kills it.
HAND_BACK_SECONDS = 10
# Time Supervisor needs on top of that to leave before the container is killed.
SUPERVISOR_EXIT_SECONDS = 5
# Of REDIS_MAXMEMORY: as far as workers go when Redis is full (services/broker/lua/headroom.lua).
WITH_RESERVE = 1.25
# Headers that come with requests of people who have not logged in as well: taken for a user's name, they let all in.
NOT_OF_USERS = {
    *("accept", "authorization", "connection", "cookie", "forwarded", "host", "origin", "referer", "user-agent", "via"),
    *("x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto", "x-real-ip", "x-scheme"),
}


def check_whole(text: object) -> object:
    """Accept digits and nothing else: int("1_000"), 3600.0 and "+5" are more than an operator means."""
    if isinstance(text, str) and not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise ValueError("not a whole number")
    return text


def lower(text: object) -> object:
    return text.lower() if isinstance(text, str) else text


def splitter(mark: str) -> Callable[[object], object]:
    def split(text: object) -> object:
        if not isinstance(text, str):
            return text
        return tuple(part.strip() for part in text.split(mark) if part.strip())

    return split


def parse_url(value: object) -> object:
    return redis_url.parse(value) if isinstance(value, str) else value


def parse_queues(value: object) -> object:
    names = splitter(",")(value)
    if isinstance(value, str) and not all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names):  # type: ignore[attr-defined]
        raise ValueError("not queue names")
    return names


def parse_dead_letters(value: object) -> object:
    if not isinstance(value, str):
        return value
    names = [name.strip() for name in value.split(",")]
    if names == ["none"]:
        return ()
    if not set(names) <= {"retries", "rejects"}:
        raise ValueError("not kinds of dead letters")
    return tuple(names)


def parse_autoscale(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]+),([0-9]+)", value.replace(" ", ""))
    if not match or not int(match[1]) >= int(match[2]) >= 1:
        raise ValueError("not a pair of sizes")
    return int(match[1]), int(match[2])


def check_login(value: object) -> object:
    user, colon, password = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not (user and colon and password):
        raise ValueError("not user:password")
    return value


def parse_header(value: object) -> object:
    if isinstance(value, str) and (not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", value) or value.lower() in NOT_OF_USERS):
        raise ValueError("not a header that names a user")
    return value


def parse_networks(value: object) -> object:
    if not isinstance(value, str):
        return value
    networks = tuple(ip_network(part) for part in splitter(",")(value))  # type: ignore[attr-defined]
    version_4 = collapse_addresses(network for network in networks if isinstance(network, IPv4Network))
    version_6 = collapse_addresses(network for network in networks if isinstance(network, IPv6Network))
    prefixes = [network.prefixlen for network in version_4] + [network.prefixlen for network in version_6]
    # A network without a prefix is everybody, and so are two halves.
    if not prefixes or not all(prefixes):
        raise ValueError("not named addresses")
    return networks


def parse_prefix(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"/?[A-Za-z0-9._~-]+(?:/[A-Za-z0-9._~-]+)*/?", value):
        raise ValueError("not a path")
    return value.strip("/") if isinstance(value, str) else value


def check_address(value: object) -> object:
    """Accept what Compose takes in `ports`: there a bare IPv6 address is not told from a port."""
    text = str(value)
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if (ip_address(bare).version == 6) is (bare == text):
        raise ValueError("IPv6 needs brackets, and IPv4 has none")
    return value


def check_time_zone(value: object) -> object:
    try:
        ZoneInfo(str(value))
    except (KeyError, ValueError, OSError):
        raise ValueError("not a time zone") from None
    return value


def parse_changes(value: object) -> object:
    """Read `entry=off; entry=60; entry=0 3 * * *` into pairs."""
    if not isinstance(value, str):
        return value
    pairs = []
    for part in splitter(";")(value):  # type: ignore[attr-defined]
        entry, equals, period = (word.strip() for word in part.partition("="))
        valid = period == "off" or re.fullmatch(r"[1-9][0-9]{0,8}", period) or len(period.split()) == 5
        if not (entry and equals and valid):
            raise ValueError(f"{part!r} cannot be read")
        pairs.append((entry, period))
    return tuple(pairs)


Whole = Annotated[int, BeforeValidator(check_whole)]
Names = Annotated[tuple[str, ...], BeforeValidator(splitter(","))]
Url = Annotated[RedisUrl, BeforeValidator(parse_url)]
Scope = Annotated[str, BeforeValidator(lower), Field(pattern="^(" + "|".join(RATE_LIMIT_SCOPES) + ")$")]
Size = Annotated[str, BeforeValidator(lower), Field(pattern=r"^[1-9][0-9]*[kmg]$")]
# The kernel gives no container less than a hundredth of a CPU.
Cpus = Annotated[str, Field(pattern=r"^(0(\.0+)?|0\.(0[1-9]|[1-9])[0-9]*|[1-9][0-9]*(\.[0-9]+)?)$")]
Image = Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9._/@:-]*$")]
SIZE = "a whole number with k, m or g, such as 512m"
CPUS = "a number from 0.01, such as 1 or 0.5, up to the CPUs that there are; 0 is no limit"


def setting(
    variable: str,
    default: Any,
    help: str,
    allowed: str,
    *,
    unit: str = "",
    example: str = "",
    **constraints: Any,
) -> Any:
    """A setting: the `variable` it is read from, what it does (`help`) and which values are `allowed`."""
    about: dict[str, Any] = {"allowed": allowed, "unit": unit, "example": example}
    return Field(default, alias=variable, description=help, json_schema_extra=about, **constraints)


class Group(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True, arbitrary_types_allowed=True)


class BrokerSettings(Group):
    """The Redis that carries the tasks."""

    url: Url = setting(
        "CELERY_BROKER_URL",
        redis_url.parse("redis://redis:6379/0"),
        "Redis database that carries the tasks: the stack's own `redis`, or one that you name.",
        "a redis://, rediss://, redis+socket:// or sentinel:// URL, its password percent-encoded",
        example="rediss://:secret@redis.example.com:6380/0",
    )
    password: SecretStr = setting(
        "REDIS_PASSWORD",
        SecretStr(""),
        "Password of the `redis` service, and of every Redis URL that carries none. Any character is allowed.",
        "any text; empty for a Redis without password",
    )
    visibility_timeout: Whole = setting(
        "CELERY_VISIBILITY_TIMEOUT",
        3600,
        "How long a worker that is not Stalk's may hold a task on the same queues before it counts as lost. Stalk's "
        "own workers have WORKER_LEASE instead, however long a task runs.",
        "whole seconds, 1 or more",
        unit="seconds",
        ge=1,
    )
    allow_volatile: bool = setting(
        "BROKER_ALLOW_VOLATILE",
        False,
        "Start although the broker keeps nothing on disk: every waiting task is lost when it restarts.",
        "1 or 0",
    )
    sentinel_master: str = setting(
        "CELERY_SENTINEL_MASTER", "", "Name of the master that the sentinels of a sentinel:// URL watch.", "a name"
    )
    sentinel_password: SecretStr = setting(
        "CELERY_SENTINEL_PASSWORD",
        SecretStr(""),
        "Password of the sentinels themselves, where they have one.",
        "any text",
    )


class ResultSettings(Group):
    """Where results are kept."""

    url: Url = setting(
        "CELERY_RESULT_BACKEND",
        redis_url.parse("redis://redis:6379/1"),
        "Redis database that keeps the results: another one than the broker's, so that emptying one spares the other.",
        "a redis://, rediss://, redis+socket:// or sentinel:// URL, its password percent-encoded",
        example="rediss://:secret@redis.example.com:6380/1",
    )
    expires: Whole = setting(
        "CELERY_RESULT_EXPIRES",
        86400,
        "How long a result is kept. A day: long enough to look into yesterday's failure, short enough to bound memory.",
        "whole seconds, 1 or more",
        unit="seconds",
        ge=1,
    )


class TaskSettings(Group):
    """What holds for every task."""

    time_limit: Whole = setting(
        "CELERY_TASK_TIME_LIMIT",
        1800,
        "A task that runs longer is killed: one that hangs must not hold its place for ever. For tasks and calls that "
        "give no limit of their own. Enforced by the prefork pool only.",
        "whole seconds, 2 or more",
        unit="seconds",
        ge=2,
    )
    soft_time_limit: Whole | None = setting(
        "CELERY_TASK_SOFT_TIME_LIMIT",
        None,
        "A task that runs longer gets SoftTimeLimitExceeded and can clean up. Unset: a thirtieth of "
        "CELERY_TASK_TIME_LIMIT before it is killed, which is a minute of 30. For tasks and calls that give no limit "
        "of their own; one that gives a soft limit alone is killed as much later. Enforced by the prefork pool only.",
        "whole seconds, 1 or more, below CELERY_TASK_TIME_LIMIT",
        unit="seconds",
        ge=1,
    )

    imports: Names = setting(
        "CELERY_IMPORTS",
        (),
        "Modules with tasks besides those in services/tasks/.",
        "module names separated by commas",
        example="shop.tasks,shop.reports",
    )
    timezone: Annotated[str, BeforeValidator(check_time_zone)] = setting(
        "CELERY_TIMEZONE",
        "UTC",
        "Time zone in which crontab schedules are read. Inside, all times are UTC.",
        "a name of the tz database",
        example="Europe/Berlin",
    )
    log_level: Annotated[str, BeforeValidator(lower), Field(pattern="^(" + "|".join(LOG_LEVELS) + ")$")] = setting(
        "LOG_LEVEL", "info", "What workers, beat and Flower log.", "one of " + ", ".join(LOG_LEVELS)
    )


class WorkerSettings(Group):
    """The nodes in a worker container."""

    processes: Whole = setting(
        "WORKER_PROCESSES",
        1,
        "Celery nodes in a worker container. One is right for prefork, which has children of its own.",
        "a whole number from 1 to 64",
        ge=1,
        le=64,
    )
    pool: Annotated[str, BeforeValidator(lower), Field(pattern="^(" + "|".join(POOLS) + ")$")] = setting(
        "WORKER_POOL",
        "prefork",
        "How a node runs tasks: prefork (processes; for CPU-bound work and time limits), threads (for I/O-bound "
        "work), solo (one after another).",
        "one of " + ", ".join(POOLS),
    )
    concurrency: Whole | None = setting(
        "WORKER_CONCURRENCY",
        None,
        "Tasks that a node runs at the same time. Unset: one for each CPU that the container may use.",
        "a whole number from 1 to 1000",
        ge=1,
        le=1000,
    )
    queues: Annotated[tuple[str, ...], BeforeValidator(parse_queues)] = setting(
        "WORKER_QUEUES",
        ("celery",),
        "Queues that the nodes take tasks from.",
        "queue names of letters, digits, dots, dashes and underscores, separated by commas",
        example="celery,reports",
        min_length=1,
    )
    autoscale: Annotated[tuple[int, int] | None, BeforeValidator(parse_autoscale)] = setting(
        "WORKER_AUTOSCALE",
        None,
        "Let a prefork node grow and shrink between two sizes, in place of WORKER_CONCURRENCY.",
        "largest,smallest: two whole numbers of 1 or more, such as 8,2",
        example="8,2",
    )
    max_tasks_per_child: Whole | None = setting(
        "WORKER_MAX_TASKS_PER_CHILD",
        None,
        "Replace a prefork child after so many tasks: bounds what leaks.",
        "a whole number, 1 or more",
        ge=1,
    )
    max_memory_per_child: Whole | None = setting(
        "WORKER_MAX_MEMORY_PER_CHILD",
        None,
        "Replace a prefork child that has grown beyond this, after its task.",
        "whole KiB, 10000 or more",
        unit="KiB",
        ge=10000,
    )
    prefetch_multiplier: Whole = setting(
        "WORKER_PREFETCH_MULTIPLIER",
        1,
        "Tasks a node holds for each that it can run. 1: nothing waits in a worker while another is idle.",
        "a whole number from 1 to 1000",
        ge=1,
        le=1000,
    )
    lease: Whole = setting(
        "WORKER_LEASE",
        60,
        "How long a task belongs to a worker that gives no sign of life; then another one runs it. Renewed three times "
        "in that time, however long the task runs. Shorter: tasks of a dead worker are back sooner, and one that only "
        "stands still is sooner taken for dead.",
        "whole seconds from 2 to 3600",
        unit="seconds",
        ge=2,
        le=3600,
    )
    max_deliveries: Whole = setting(
        "WORKER_MAX_DELIVERIES",
        5,
        "How often a task is started whose worker or child dies while it runs, or that runs into its hard time limit "
        "with acks_on_timeout=False. Then it becomes a dead letter.",
        "a whole number from 1 to 100",
        ge=1,
        le=100,
    )
    max_requeues: Whole = setting(
        "WORKER_MAX_REQUEUES",
        100,
        "How often a task may ask to be run later (Reject with requeue=True): after 0.1 s, each time twice as late, up "
        "to a minute. Then it becomes a dead letter. 100 take an hour and a half, longer than most outages.",
        "a whole number from 0 to 10000",
        ge=0,
        le=10000,
    )
    rate_limit_scope: Scope = setting(
        "WORKER_RATE_LIMIT_SCOPE",
        "node",
        "Whose starts a task's rate_limit counts: those of each node by itself, as in Celery (node), or those of all "
        "nodes together (shared). The same for all workers on one Redis.",
        "one of " + ", ".join(RATE_LIMIT_SCOPES),
    )
    dead_letters: Annotated[tuple[str, ...], BeforeValidator(parse_dead_letters)] = setting(
        "WORKER_DEAD_LETTERS",
        ("retries", "rejects"),
        "What else becomes a dead letter, beside tasks that no worker can run: tasks that failed with their last "
        "retry, and tasks that were rejected without being requeued.",
        "retries, rejects, both with a comma between, or none",
    )
    dead_letters_max: Whole = setting(
        "WORKER_DEAD_LETTERS_MAX",
        10_000,
        "With so many dead letters kept, a task that fails with its last retry or is rejected is not kept beside them: "
        "it says FAILURE, and a warning in the log says the rest, so that failures of every day cannot fill Redis. "
        "Messages that no worker can run are kept in any case. 10,000 of 2 KB each take 20 MB.",
        "a whole number, 1 or more",
        ge=1,
    )
    soft_shutdown: Whole = setting(
        "WORKER_SOFT_SHUTDOWN",
        45,
        "How long running tasks may go on after a stop. What still runs then goes back to the queue.",
        "whole seconds, 1 or more",
        unit="seconds",
        ge=1,
    )
    stop_grace_period: Whole = setting(
        "WORKER_STOP_GRACE_PERIOD",
        60,
        "When Docker kills a worker container that was told to stop. The soft shutdown, 10 s to hand tasks back "
        "and 5 s for Supervisor must fit in.",
        "whole seconds, WORKER_SOFT_SHUTDOWN + 15 or more",
        unit="seconds",
        ge=1,
    )
    heartbeat_timeout: Whole = setting(
        "WORKER_HEARTBEAT_TIMEOUT",
        60,
        "A node whose main loop has stood still for so long, with Redis answering and no solo task running, is "
        "killed and replaced. A reconnect pauses up to 30 s, so less than 45 would kill healthy nodes.",
        "whole seconds, 45 or more",
        unit="seconds",
        ge=45,
    )


class BeatSettings(Group):
    """The scheduler."""

    schedule: Annotated[tuple[tuple[str, str], ...], BeforeValidator(parse_changes)] = setting(
        "BEAT_SCHEDULE",
        (),
        "Changes to the schedule in services/schedule.py: an entry's period in seconds, its crontab, or off.",
        "entry=period pairs separated by ';', a period being whole seconds, five crontab fields, or off",
        example="report-free-space=0 3 * * *",
    )


class FlowerSettings(Group):
    """The web interface."""

    basic_auth: Annotated[SecretStr, BeforeValidator(check_login)] = setting(
        "FLOWER_BASIC_AUTH",
        SecretStr(""),
        "Login for every page, the API and /metrics. A colon or comma in the password is fine.",
        "user:password",
        example="admin:a-long-password",
    )
    read_only_auth: Annotated[SecretStr, BeforeValidator(check_login)] = setting(
        "FLOWER_READ_ONLY_AUTH",
        SecretStr(""),
        "A second login that sees everything and changes nothing: it gets no buttons, and what acts is refused.",
        "user:password, another user than that of FLOWER_BASIC_AUTH",
        example="guest:another-long-password",
    )
    trusted_header: Annotated[str, BeforeValidator(parse_header)] = setting(
        "FLOWER_TRUSTED_HEADER",
        "",
        "Header in which a reverse proxy that has logged the user in names that user, who then needs no other login "
        "and may do everything. Only with FLOWER_TRUSTED_PROXIES (docs/operations.md).",
        "the name of a header that clients cannot send through the proxy",
        example="X-Forwarded-User",
    )
    trusted_proxies: Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(parse_networks)] = setting(
        "FLOWER_TRUSTED_PROXIES",
        (),
        "Addresses from which FLOWER_TRUSTED_HEADER is taken, as Flower sees them; from all others it is ignored.",
        "IP addresses and networks, such as 10.0.0.7 or 10.0.1.0/24, separated by commas; not all addresses",
        example="10.0.0.7",
    )
    port: Whole = setting(
        "FLOWER_PORT",
        8080,
        "Port on the host. Inside its container Flower always listens on 8080.",
        "a port from 1 to 65535",
        ge=1,
        le=65535,
    )
    bind: Annotated[str, BeforeValidator(check_address)] = setting(
        "FLOWER_BIND",
        "127.0.0.1",
        "Address on the host. Loopback, because Flower has no TLS: put a reverse proxy before it.",
        "an IP address of the host, IPv6 in brackets",
    )
    url_prefix: Annotated[str, BeforeValidator(parse_prefix)] = setting(
        "FLOWER_URL_PREFIX", "", "Path under which a reverse proxy serves Flower.", "a path", example="/flower"
    )
    max_tasks: Whole = setting(
        "FLOWER_MAX_TASKS",
        10000,
        "Tasks that Flower remembers; the oldest go first. 10,000 take about 100 MB.",
        "a whole number from 100 to 1000000",
        ge=100,
        le=1_000_000,
    )
    max_workers: Whole = setting(
        "FLOWER_MAX_WORKERS",
        1000,
        "Workers that Flower remembers, gone ones included.",
        "a whole number from 1 to 5000",
        ge=1,
        le=5000,
    )
    offline_after: Whole = setting(
        "FLOWER_PURGE_OFFLINE_WORKERS",
        60,
        "How long a worker that is gone stays on the page.",
        "whole seconds, 1 or more",
        unit="seconds",
        ge=1,
    )
    save_every: Whole = setting(
        "FLOWER_STATE_SAVE_INTERVAL",
        10,
        "How often Flower writes what it knows to its volume: what a kill can lose.",
        "whole seconds, 1 or more",
        unit="seconds",
        ge=1,
    )


class StackSettings(Group):
    """What Compose and make read: images, counts and limits."""

    workers: Whole = setting(
        "WORKERS",
        1,
        "Worker containers; `make scale WORKERS=4` writes it here.",
        "a whole number from 0 to 1000",
        ge=0,
        le=1000,
    )
    runtime: Annotated[str, BeforeValidator(lower), Field(pattern="^(docker|local)$")] = setting(
        "STALK_RUNTIME",
        "",
        "What `make` runs the stack with. Unset: containers if a Docker Engine answers at the first `make up`, else "
        "processes of this host; then it stays so.",
        "docker or local",
    )
    redis_replicas: Whole = setting(
        "REDIS_REPLICAS",
        1,
        "Set it to 0 to use a Redis of your own, named by the two URLs, in place of the `redis` service.",
        "0 or 1",
        ge=0,
        le=1,
    )
    redis_port: Whole = setting(
        "REDIS_PORT",
        6379,
        "Port for Redis on this host's loopback, with docker/publish.yaml (docs/connect.md).",
        "a port from 1 to 65535",
        ge=1,
        le=65535,
    )
    redis_tls_bind: Annotated[str, BeforeValidator(check_address)] = setting(
        "REDIS_TLS_BIND",
        "",
        "Address of this host on which Redis speaks TLS with other machines (docs/connect.md). Unset: it does not.",
        "an IP address of the host, IPv6 in brackets",
        example="192.0.2.10",
    )
    redis_tls_port: Whole = setting("REDIS_TLS_PORT", 6380, "Port for that.", "a port from 1 to 65535", ge=1, le=65535)
    python_image: Image = setting(
        "PYTHON_IMAGE",
        "python:3.13.15-slim-trixie",
        "Base of the application image. `make up` writes stalk-base/python:3.13 here where no registry answers.",
        "an image name with a full version",
    )
    redis_image: Image = setting(
        "REDIS_IMAGE",
        "redis:8.8.2-trixie",
        "Image of the `redis` service. `make up` writes stalk-base/redis:8.0 here where no registry answers.",
        "an image name with a full version",
    )
    run_directory: str = setting(
        "STALK_RUN_DIR",
        "/run/stalk",
        "Directory for heartbeats, pid files and sockets, empty after a start. In the stack's containers it is always "
        "/run/stalk, a tmpfs.",
        "an absolute path",
        pattern=r"^/.*[^/]$",
    )
    redis_maxmemory: Size = setting(
        "REDIS_MAXMEMORY",
        "512m",
        "Data that Redis accepts before it refuses new tasks; workers go on for a quarter more. Half its memory "
        "limit: rewriting the append-only file can need as much again.",
        f"{SIZE}; below four fifths of REDIS_MEMORY, where that is the limit",
    )
    redis_memory: Size = setting("REDIS_MEMORY", "1g", "Memory limit of the redis container.", SIZE)
    redis_cpus: Cpus = setting(
        "REDIS_CPUS", "1", "CPU limit of the redis container: Redis runs commands on one.", CPUS, unit="CPUs"
    )
    redis_pids: Whole = setting(
        "REDIS_PIDS",
        64,
        "Process limit of the redis container: one process, its threads, its forks and health checks.",
        "a whole number, 16 or more",
        ge=16,
    )
    worker_memory: Size = setting(
        "WORKER_MEMORY",
        "1g",
        "Memory limit of a worker container: 60 MB for each node and child, and your tasks.",
        SIZE,
    )
    worker_cpus: Cpus = setting(
        "WORKER_CPUS",
        "1",
        "CPU limit of a worker container, and so the children of its prefork node. "
        "`make up` writes the number of CPUs here on its first run.",
        CPUS,
        unit="CPUs",
    )
    worker_pids: Whole = setting(
        "WORKER_PIDS",
        1024,
        "Process and thread limit of a worker container.",
        "a whole number, 64 or more",
        ge=64,
    )
    beat_memory: Size = setting("BEAT_MEMORY", "256m", "Memory limit of the beat container, which needs 70 MB.", SIZE)
    beat_cpus: Cpus = setting("BEAT_CPUS", "1", "CPU limit of the beat container.", CPUS, unit="CPUs")
    beat_pids: Whole = setting(
        "BEAT_PIDS", 64, "Process and thread limit of the beat container.", "a whole number, 16 or more", ge=16
    )
    flower_memory: Size = setting(
        "FLOWER_MEMORY", "512m", "Memory limit of the flower container: 80 MB, and FLOWER_MAX_TASKS.", SIZE
    )
    flower_cpus: Cpus = setting("FLOWER_CPUS", "1", "CPU limit of the flower container.", CPUS, unit="CPUs")
    flower_pids: Whole = setting(
        "FLOWER_PIDS", 128, "Process and thread limit of the flower container.", "a whole number, 16 or more", ge=16
    )


@dataclass(frozen=True)
class Settings:
    """All settings, validated on their own and together."""

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
        """The broker's URL with the password that is in force."""
        return self.broker.url.with_password(self.broker.password.get_secret_value())

    @property
    def result_url(self) -> RedisUrl:
        """The result backend's URL with the password that is in force."""
        return self.results.url.with_password(self.broker.password.get_secret_value())

    @property
    def unset_urls(self) -> dict[str, RedisUrl]:
        """The URLs that nobody has set, by their variables, where their default leads nowhere.

        It names the `redis` service, which containers of the stack reach: their image sets STALK_RUN_DIR.
        """
        if "run_directory" in self.stack.model_fields_set:
            return {}
        urls = {
            "CELERY_BROKER_URL": (self.broker, self.broker_url),
            "CELERY_RESULT_BACKEND": (self.results, self.result_url),
        }
        return {name: url for name, (group, url) in urls.items() if "url" not in group.model_fields_set}


GROUPS: dict[str, type[Group]] = {
    "broker": BrokerSettings,
    "results": ResultSettings,
    "tasks": TaskSettings,
    "worker": WorkerSettings,
    "beat": BeatSettings,
    "flower": FlowerSettings,
    "stack": StackSettings,
}


def fields(group: type[Group]) -> list[tuple[str, str, FieldInfo]]:
    """(attribute, variable, field) of every setting of a group."""
    return [(name, str(field.alias), field) for name, field in group.model_fields.items()]


def variables() -> list[str]:
    """The name of every variable that can be set, `NAME_FILE` forms left out."""
    return [variable for group in GROUPS.values() for _, variable, _ in fields(group)]


def is_secret(field: FieldInfo) -> bool:
    """Whether a field's value must never be shown."""
    return field.annotation is SecretStr


# A Redis URL may carry a password, so it may come from a file and is never repeated in an error.
SECRETS = tuple(
    variable
    for group in GROUPS.values()
    for _, variable, field in fields(group)
    if is_secret(field) or field.annotation is RedisUrl
)


def load(environment: Mapping[str, str] | None = None, env_file: Path | None = None) -> Settings:
    """Read and check all settings: the environment, over `.env` where there is one.

    With no argument this is the process's own environment over the checkout's `.env`, and the variables
    that Celery prefers to its configuration are made to agree with the result.

    Raises ConfigError with all mistakes at once.
    """
    own = environment is None
    if environment is None:
        environment, env_file = process_environment(), env_file or ENV_FILE
    from_file = read_env_file(env_file) if env_file else {}
    # As in Compose: what the environment sets beats the file even if it is empty, and empty counts as not set.
    merged = from_file | dict(environment)
    values, problems = with_secret_files(merged, SECRETS)
    groups: dict[str, Any] = {}
    wrong: set[str] = set()
    for name, group in GROUPS.items():
        # Empty counts as not set.
        given = {variable: values[variable] for _, variable, _ in fields(group) if values.get(variable)}
        try:
            groups[name] = group(**given)
        except ValidationError as error:
            problems += _sentences(error, group, values)
            wrong |= {str(mistake["loc"][0]) for mistake in error.errors(include_input=False, include_context=False)}
            groups[name] = group(**{variable: value for variable, value in given.items() if variable not in wrong})
    # A default that stands in for a mistake is in conflict with nothing.
    problems += [problem for problem in _conflicts(**groups) if not any(variable in problem for variable in wrong)]
    if problems:
        raise ConfigError(problems)
    settings = Settings(**groups, warnings=_unknown(from_file) + _warnings(**groups))
    if own:
        pin_celery_urls(settings.broker_url.text(), settings.result_url.text())
    return settings


def _sentences(error: ValidationError, group: type[Group], values: Mapping[str, str]) -> list[str]:
    about = {variable: field for _, variable, field in fields(group)}
    sentences = []
    for mistake in error.errors(include_url=False, include_input=False):
        variable = str(mistake["loc"][0])
        field = about[variable]
        found = "a value that is not shown" if variable in SECRETS else repr(values.get(variable, ""))
        reason = f" ({mistake['ctx']['error']})" if field.annotation is RedisUrl and "ctx" in mistake else ""
        allowed = field.json_schema_extra["allowed"]  # type: ignore[index]
        sentences.append(f"{variable}: found {found}{reason}; allowed: {allowed}")
    return list(dict.fromkeys(sentences))


def _conflicts(
    *,
    broker: BrokerSettings,
    results: ResultSettings,
    tasks: TaskSettings,
    worker: WorkerSettings,
    flower: FlowerSettings,
    stack: StackSettings,
    **_: Any,
) -> list[str]:
    """Mistakes that only show when settings are held against each other."""
    found = _worker_conflicts(worker) + _flower_conflicts(flower)
    if tasks.soft_time_limit and tasks.soft_time_limit >= tasks.time_limit:
        found.append(
            f"CELERY_TASK_SOFT_TIME_LIMIT ({tasks.soft_time_limit} s) must be below CELERY_TASK_TIME_LIMIT "
            f"({tasks.time_limit} s), or tasks are killed before they can clean up"
        )
    if broker.url.scheme == "sentinel" and not broker.sentinel_master:
        found.append("CELERY_SENTINEL_MASTER must name the master, because CELERY_BROKER_URL is a sentinel:// URL")
    if results.url.scheme == "sentinel" and not broker.sentinel_master:
        found.append("CELERY_SENTINEL_MASTER must name the master, because CELERY_RESULT_BACKEND is a sentinel:// URL")
    # Without a container of its own nothing limits it: there is another Redis, or a process of the host.
    limited = stack.redis_replicas and stack.runtime != "local"
    if limited and size_in_bytes(stack.redis_maxmemory) * WITH_RESERVE >= size_in_bytes(stack.redis_memory):
        found.append(
            f"REDIS_MAXMEMORY ({stack.redis_maxmemory}) and a quarter of it, in which workers go on when Redis is "
            f"full, must be below REDIS_MEMORY ({stack.redis_memory}), or the kernel kills Redis; half of it is safe"
        )
    return found


def _worker_conflicts(worker: WorkerSettings) -> list[str]:
    found = []
    needed = worker.soft_shutdown + HAND_BACK_SECONDS + SUPERVISOR_EXIT_SECONDS
    if worker.stop_grace_period < needed:
        found.append(
            f"WORKER_STOP_GRACE_PERIOD ({worker.stop_grace_period} s) must be {needed} or more, because "
            f"WORKER_SOFT_SHUTDOWN is {worker.soft_shutdown} s and handing tasks back takes up to "
            f"{HAND_BACK_SECONDS + SUPERVISOR_EXIT_SECONDS} s"
        )
    if worker.autoscale and worker.pool != "prefork":
        found.append(f"WORKER_AUTOSCALE needs WORKER_POOL=prefork; the {worker.pool} pool cannot grow or shrink")
    if worker.autoscale and worker.concurrency:
        found.append("WORKER_AUTOSCALE and WORKER_CONCURRENCY are both set: keep one of them")
    if worker.pool == "solo" and (worker.concurrency or 1) > 1:
        found.append(
            f"WORKER_CONCURRENCY is {worker.concurrency}, but the solo pool runs one task at a time: use "
            "WORKER_PROCESSES, or another WORKER_POOL"
        )
    return found


def _flower_conflicts(flower: FlowerSettings) -> list[str]:
    found = []
    full, read_only = (login.get_secret_value() for login in (flower.basic_auth, flower.read_only_auth))
    if full and full.partition(":")[0] == read_only.partition(":")[0]:
        found.append("FLOWER_READ_ONLY_AUTH has the user of FLOWER_BASIC_AUTH: give it another user")
    if flower.trusted_header and not flower.trusted_proxies:
        found.append(
            "FLOWER_TRUSTED_HEADER needs FLOWER_TRUSTED_PROXIES, or anybody could send the header: set it to the "
            "addresses of the proxies that log users in"
        )
    if flower.trusted_proxies and not flower.trusted_header:
        found.append(
            "FLOWER_TRUSTED_PROXIES needs FLOWER_TRUSTED_HEADER: set it to the header in which they name the user"
        )
    return found


def _warnings(broker: BrokerSettings, results: ResultSettings, worker: WorkerSettings, **_: Any) -> tuple[str, ...]:
    found = []
    if broker.url.server == results.url.server and broker.url.database == results.url.database:
        found.append(
            f"CELERY_BROKER_URL and CELERY_RESULT_BACKEND name the same database ({broker.url.database}): emptying "
            "one empties the other; give results a database of their own"
        )
    if worker.pool != "prefork":
        found.append(
            f"WORKER_POOL={worker.pool} cannot enforce CELERY_TASK_TIME_LIMIT and CELERY_TASK_SOFT_TIME_LIMIT: a "
            "task that hangs stays; use prefork where that matters"
        )
        child_limits = [
            name
            for name, value in (
                ("WORKER_MAX_TASKS_PER_CHILD", worker.max_tasks_per_child),
                ("WORKER_MAX_MEMORY_PER_CHILD", worker.max_memory_per_child),
            )
            if value
        ]
        if child_limits:
            found.append(f"{' and '.join(child_limits)} only work with WORKER_POOL=prefork")
    return tuple(found)


def _unknown(from_file: Mapping[str, str]) -> tuple[str, ...]:
    known = set(variables())
    found = []
    for name in from_file:
        if name in known or name.removesuffix("_FILE") in SECRETS or name.startswith(("COMPOSE_", "DOCKER_")):
            continue
        guess = get_close_matches(name, known, n=1)
        hint = f"did you mean {guess[0]}?" if guess else "variables for your own tasks belong in .env.tasks"
        found.append(f"{name} in .env is read by nothing in Stalk: {hint}")
    return tuple(found)


def size_in_bytes(size: str) -> int:
    """Bytes of a size such as 512m."""
    return int(size[:-1]) << 10 * ("kmg".index(size[-1]) + 1)
