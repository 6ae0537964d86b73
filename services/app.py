"""The Celery application: `celery -A services.app …` and `from services.app import app`."""

from __future__ import annotations

import sys

from celery import Celery

from config import ConfigError, Settings, load
from config.celery import celery_configuration, soft_limit
from services.application import Stalk
from services.broker.client import require_tls_files
from services.broker.keys import BEAT_PREFIX, DEFAULT_QUEUE
from services.commands.celery_cli import Gate
from services.dead_letters.reporter import TellStep
from services.pool import overtime
from services.pool.time_limits import Limits
from services.results import backend
from services.task_modules import find_task_modules
from services.worker import heartbeat, memory, shutdown

CONFIGURATION_EXIT_CODE = 2


def create_app(settings: Settings) -> Celery:
    """The application for these settings.

    Raises ConfigError when BEAT_SCHEDULE names an entry that does not exist, and for files of TLS that cannot be used.
    """
    # Only here, where an entry that is refused is said to be without a traceback.
    from services.schedule import beat_schedule

    require_tls_files(settings)
    app = Stalk("stalk", set_as_current=True)
    app.conf.update(celery_configuration(settings))
    app.conf.update(
        imports=find_task_modules(settings.tasks.imports),
        task_default_queue=DEFAULT_QUEUE,
        beat_schedule=beat_schedule(settings.beat.schedule),
        beat_scheduler="services.beat.scheduler:LockedScheduler",
        # RedBeat gets its connection from Stalk.redbeat_redis; without these two it warns.
        redbeat_redis_url=settings.broker_url.masked(),
        redbeat_redis_options={},
        redbeat_key_prefix=BEAT_PREFIX,
    )
    app.loader.override_backends = backend.BACKENDS
    app.steps["worker"].update(
        (
            heartbeat.HeartbeatStep,
            backend.ResultsStep,
            shutdown.SoftShutdownStep,
            TellStep,
            overtime.OvertimeStep,
            memory.TimerStep,
            memory.FreezeStep,
        )
    )
    app.user_options["preload"].add(Gate())
    app.settings = settings
    # Not as Celery's settings: it would give both to a task that has one of its own, and refuse the pair (celery 5.7).
    app.time_limits = Limits(settings.tasks.time_limit, soft_limit(settings.tasks))
    return app


def loaded() -> Celery:
    """The application for this process's environment; prints each mistake and exits with 2 instead of a traceback."""
    try:
        return create_app(load())
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(CONFIGURATION_EXIT_CODE)


app = loaded()
