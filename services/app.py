"""The Celery application: `celery -A services.app …` and `from services.app import app`."""

from celery import Celery

from config import Settings, exit_on_mistakes, load
from config.celery import build_celery_configuration, derive_soft_limit
from services.application import Stalk
from services.broker.client import require_tls_files
from services.broker.keys import BEAT_PREFIX, DEFAULT_QUEUE
from services.commands.celery_cli import Gate
from services.control import pool_commands, task_commands  # noqa: F401 - commands of `celery inspect` and `control`
from services.dead_letters.reporter import ReportFailuresStep
from services.pool import overtime
from services.pool.time_limits import Limits
from services.results import backend
from services.task_modules import find_task_modules
from services.worker import heartbeat, memory, shutdown


def create_app(settings: Settings) -> Celery:
    """The application for these settings.

    Raises ConfigError when BEAT_SCHEDULE names an entry that does not exist, and for TLS files that cannot be used.
    """
    # Not at the top of the module, where a mistake in an entry would be a traceback.
    from services.schedule import beat_schedule

    require_tls_files(settings)
    app = Stalk("stalk", set_as_current=True)
    app.conf.update(build_celery_configuration(settings))
    app.conf.update(
        imports=find_task_modules(settings.tasks.imports),
        task_default_queue=DEFAULT_QUEUE,
        beat_schedule=beat_schedule(settings.beat.schedule),
        beat_scheduler="services.beat.scheduler:LockedScheduler",
        # RedBeat gets its connection from Stalk.redbeat_redis; without these two it warns.
        redbeat_redis_url=settings.broker_url.mask(),
        redbeat_redis_options={},
        redbeat_key_prefix=BEAT_PREFIX,
    )
    app.loader.override_backends = backend.BACKENDS
    app.steps["worker"].update(
        (
            heartbeat.HeartbeatStep,
            backend.ResultsStep,
            shutdown.SoftShutdownStep,
            ReportFailuresStep,
            overtime.OvertimeStep,
            memory.TimerStep,
            memory.FreezeStep,
        )
    )
    app.user_options["preload"].add(Gate())
    app.settings = settings
    # Not as Celery's settings: it would give both to a task that has one of its own, and refuse the pair (celery 5.7).
    app.time_limits = Limits(settings.tasks.time_limit, derive_soft_limit(settings.tasks))
    return app


with exit_on_mistakes():
    app = create_app(load())
