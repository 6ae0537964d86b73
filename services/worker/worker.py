"""Celery's worker: it starts only tasks that still have a lease, and requeues all that it has at its end."""

from concurrent.futures import Future
from functools import partial
from typing import Any

from celery.apps.worker import Worker as CeleryWorker
from celery.exceptions import TaskRevokedError
from celery.utils.log import get_logger
from redis.exceptions import RedisError

from config.redis_url import mask_passwords
from services.broker.client import connect, format_error
from services.delayed import rate_limits
from services.delivery import registry
from services.delivery.unacked import UNDECODABLE
from services.pool import child_guard, failures, process_context, time_limits
from services.pool.time_limits import Limits
from services.worker.dead_letter_rules import INVALID_TASK_ERRORS
from services.worker.request import discard, handle_escaped_error, handle_thread_end

logger = get_logger(__name__)


class Worker(CeleryWorker):  # type: ignore[misc]
    """A worker that starts only tasks with a lease, and loses none at its end."""

    def on_before_init(self, **keywords: Any) -> None:
        super().on_before_init(**keywords)
        # Before the pool forks.
        child_guard.create_table()

    def setup_defaults(
        self, time_limit: float | None = None, soft_time_limit: float | None = None, **options: Any
    ) -> None:
        super().setup_defaults(**options)
        # Not given to the pool, which would add its own soft limit to a task that has only a hard one.
        self.app.time_limits = time_limits.add_missing(Limits(time_limit, soft_time_limit), self.app.time_limits)

    def setup_includes(self, includes: Any) -> None:
        super().setup_includes(includes)
        # All tasks are imported now, and the pool has not forked.
        failures.wrap_tasks(self.app.tasks.values())

    def on_start(self) -> None:
        if child_guard.forks(self.pool):
            # The pool is there, and has not forked.
            self.pool.options["context"] = process_context.make_context()
        super().on_start()

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = super().stats()
        if child_guard.forks(self.pool):
            hard, soft = self.app.time_limits
            found["pool"]["timeouts"] = (soft or 0, hard or 0)
        # A socket's URL is the host's name to kombu, and the sentinels' password an option (kombu 5.7).
        found["broker"] = mask_passwords(found["broker"])
        return found

    def _process_task(self, req: Any) -> None:
        if not req.deliveries.hand_to_pool(req.tag):
            logger.warning("%s[%s] is not started: it was requeued, or its lease was lost", req.name, req.id)
            discard(req)
            self._release_slot()
            return
        try:
            result = req.execute_with_lease(self.pool)
        except TaskRevokedError:
            self._release_slot()
        except INVALID_TASK_ERRORS as error:
            if req.deliveries.has_started(req.tag):
                handle_escaped_error(req, error)
            else:
                discard(req)
                req.deliveries.reject(req.tag, UNDECODABLE, f"it cannot be run: {error!r}")
            self._release_slot()
        except BaseException as error:
            # A solo pool has run the task, and Celery does not handle this error.
            handle_escaped_error(req, error)
            raise
        else:
            future = getattr(result, "f", None)
            if isinstance(future, Future):
                future.add_done_callback(partial(handle_thread_end, req))

    def _release_slot(self) -> None:
        if self.semaphore is not None:
            self._quick_release()

    def on_stopped(self) -> None:
        super().on_stopped()
        if registry.close():
            self.requeue_rate_limited()

    def requeue_rate_limited(self) -> None:
        """Requeue what waits for a token of this node, for other nodes."""
        rates = list(filter(None, self.consumer.get_rates().values())) if self.consumer else []
        if not rates or not self.app.settings:
            return
        try:
            options = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), rate_limits.STOP_SECONDS)
            with connect(self.app.settings.broker_url, self.app.settings, **options) as client:
                rate_limits.requeue_of_stopping_node(client, rates)
        except (RedisError, OSError) as error:
            logger.warning("rate limits: waiting tasks are not requeued, and keep their times: %s", format_error(error))
