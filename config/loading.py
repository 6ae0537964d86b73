"""From the environment and `.env` to Settings: every mistake at once, each by the name of its variable."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from config.environment import pin_celery_urls, process_environment, read_env_file, read_secret_files
from config.errors import ConfigError
from config.settings import GROUPS, REMOVED_LIMITS, SECRETS, VARIABLES, FlowerSettings, Settings, WorkerSettings
from config.types import size_in_bytes

ENV_FILE = Path(__file__).resolve().parent.parent / ".env"
# Time a node needs, after its soft shutdown, to requeue the tasks it still has before Supervisor kills it.
REQUEUE_SECONDS = 10
# Time Supervisor needs after that to exit before Docker kills the container.
SUPERVISOR_EXIT_SECONDS = 5
# Of REDIS_MAXMEMORY: what workers may use to finish tasks when Redis is full (services/broker/lua/headroom.lua).
HEADROOM = 1.25
URLS = ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND")


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
    values, problems = read_secret_files(from_file | dict(environment), SECRETS)
    values = {name: value for name, value in values.items() if value}
    problems += [_refuse_removed(name, values[name]) for name in REMOVED_LIMITS if name in values]
    settings, mistakes = _validate(values)
    problems += mistakes.values()
    # A default that stands in for a mistake is in conflict with nothing.
    problems += [problem for problem in _find_conflicts(settings) if not any(name in problem for name in mistakes)]
    if problems:
        raise ConfigError(problems)
    if own:
        pin_celery_urls(settings.broker_url.text(), settings.result_url.text())
    return replace(settings, warnings=(*_find_unknown(from_file), *_find_doubtful(settings)))


def _refuse_removed(name: str, value: str) -> str:
    service, limit = name.lower().split("_")
    line = f"services: {{{service}: {{deploy: {{resources: {{limits: {{{limit}: {value}}}}}}}}}}}"
    return f"{name} is no longer a variable: take it out, and write this line into compose.override.yaml: {line}"


def _validate(values: Mapping[str, str]) -> tuple[Settings, dict[str, str]]:
    """The settings, with defaults in place of mistakes, and a sentence for each mistake by its variable."""
    groups: dict[str, Any] = {}
    mistakes: dict[str, str] = {}
    for name, group in GROUPS.items():
        try:
            groups[name] = group.model_validate(values)
        except ValidationError as error:
            found = {str(one["loc"][0]): one for one in error.errors(include_url=False, include_input=False)}
            mistakes |= {variable: _explain(variable, values[variable], one) for variable, one in found.items()}
            good = {variable: value for variable, value in values.items() if variable not in found}
            groups[name] = group.model_validate(good)
    return Settings(**groups), mistakes


def _explain(variable: str, value: str, mistake: Any) -> str:
    found = "a value that is not shown" if variable in SECRETS else repr(value)
    # config.redis_url says what is wrong without repeating the password.
    reason = f" ({mistake['ctx']['error']})" if variable in URLS else ""
    return f"{variable}: found {found}{reason}; allowed: {VARIABLES[variable].allowed}"


def _find_conflicts(settings: Settings) -> Iterator[str]:
    """Mistakes that only show when settings are compared with each other."""
    broker, tasks, stack = settings.broker, settings.tasks, settings.stack
    yield from _find_worker_conflicts(settings.worker)
    yield from _find_flower_conflicts(settings.flower)
    if tasks.soft_time_limit and tasks.soft_time_limit >= tasks.time_limit:
        yield (
            f"CELERY_TASK_SOFT_TIME_LIMIT ({tasks.soft_time_limit} s) must be below CELERY_TASK_TIME_LIMIT "
            f"({tasks.time_limit} s), or tasks are killed before they can clean up"
        )
    for variable, url in zip(URLS, (broker.url, settings.results.url), strict=True):
        if url.scheme == "sentinel" and not broker.sentinel_master:
            yield f"CELERY_SENTINEL_MASTER must name the master, because {variable} is a sentinel:// URL"
    # Only a container of its own has the limit: not another Redis, nor a process of the host.
    limited = stack.redis_replicas and stack.runtime != "local"
    if limited and size_in_bytes(stack.redis_maxmemory) * HEADROOM >= size_in_bytes(stack.redis_memory):
        yield (
            f"REDIS_MAXMEMORY ({stack.redis_maxmemory}) and the quarter more that workers may use when Redis is full "
            f"must be below REDIS_MEMORY ({stack.redis_memory}), or the kernel kills Redis: set it to half of that"
        )


def _find_worker_conflicts(worker: WorkerSettings) -> Iterator[str]:
    needed = worker.soft_shutdown + REQUEUE_SECONDS + SUPERVISOR_EXIT_SECONDS
    if worker.stop_grace_period < needed:
        yield (
            f"WORKER_STOP_GRACE_PERIOD ({worker.stop_grace_period} s) must be {needed} or more, because "
            f"WORKER_SOFT_SHUTDOWN is {worker.soft_shutdown} s and handing tasks back takes up to "
            f"{REQUEUE_SECONDS + SUPERVISOR_EXIT_SECONDS} s"
        )
    if worker.autoscale and worker.pool != "prefork":
        yield f"WORKER_AUTOSCALE needs WORKER_POOL=prefork; the {worker.pool} pool cannot grow or shrink"
    if worker.autoscale and worker.concurrency:
        yield "WORKER_AUTOSCALE and WORKER_CONCURRENCY are both set: keep one of them"
    if worker.pool == "solo" and (worker.concurrency or 1) > 1:
        yield (
            f"WORKER_CONCURRENCY is {worker.concurrency}, but the solo pool runs one task at a time: use "
            "WORKER_PROCESSES, or another WORKER_POOL"
        )


def _find_flower_conflicts(flower: FlowerSettings) -> Iterator[str]:
    full, read_only = (login.get_secret_value() for login in (flower.basic_auth, flower.read_only_auth))
    if full and full.partition(":")[0] == read_only.partition(":")[0]:
        yield "FLOWER_READ_ONLY_AUTH has the user of FLOWER_BASIC_AUTH: give it another user"
    if flower.trusted_header and not flower.trusted_proxies:
        yield (
            "FLOWER_TRUSTED_HEADER needs FLOWER_TRUSTED_PROXIES, or anybody could send the header: set it to the "
            "addresses of the proxies that log users in"
        )
    if flower.trusted_proxies and not flower.trusted_header:
        yield ("FLOWER_TRUSTED_PROXIES needs FLOWER_TRUSTED_HEADER: set it to the header in which they name the user")


def _find_doubtful(settings: Settings) -> Iterator[str]:
    """Warnings about what works, but perhaps not as meant."""
    broker, results, worker = settings.broker.url, settings.results.url, settings.worker
    if (broker.server, broker.database) == (results.server, results.database):
        yield (
            f"CELERY_BROKER_URL and CELERY_RESULT_BACKEND name the same database ({broker.database}): emptying "
            "one empties the other; give results a database of their own"
        )
    if worker.pool != "prefork":
        yield (
            f"WORKER_POOL={worker.pool} cannot enforce CELERY_TASK_TIME_LIMIT and CELERY_TASK_SOFT_TIME_LIMIT: a "
            "task that hangs stays; use prefork where that matters"
        )
        limits = {
            "WORKER_MAX_TASKS_PER_CHILD": worker.max_tasks_per_child,
            "WORKER_MAX_MEMORY_PER_CHILD": worker.max_memory_per_child,
        }
        if given := [name for name, limit in limits.items() if limit]:
            yield f"{' and '.join(given)} only work with WORKER_POOL=prefork"


def _find_unknown(from_file: Mapping[str, str]) -> Iterator[str]:
    """Warnings about variables in `.env` that nothing reads."""
    for name in from_file:
        known = name in VARIABLES or name.removesuffix("_FILE") in SECRETS
        # Compose reads these itself.
        if known or name in REMOVED_LIMITS or name.startswith(("COMPOSE_", "DOCKER_")):
            continue
        guess = get_close_matches(name, VARIABLES, n=1)
        hint = f"did you mean {guess[0]}?" if guess else "variables for your own tasks belong in .env.tasks"
        yield f"{name} in .env is read by nothing in Stalk: {hint}"
