"""Celery's consumer: it drops no message, and postpones tasks in Redis that wait for their ETA or their rate limit."""

import logging
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

from celery import Task, signals
from celery.exceptions import CPendingDeprecationWarning
from celery.utils.log import get_logger
from celery.utils.time import maybe_iso8601, maybe_make_aware
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.consumer import consumer as celery_consumer
from celery.worker.consumer.consumer import CANCEL_TASKS_BY_DEFAULT, CONNECTION_ERROR, CONNECTION_RETRY
from redis.exceptions import RedisError

from services.broker.client import UNREACHABLE, describe_server, format_error
from services.broker.outages import Outage
from services.delayed import rate_limits
from services.delayed.rate_limits import NEVER, Delay, Rate
from services.delivery.channel import Channel
from services.delivery.no_ack import NoAckDeliveries, deliveries_of
from services.delivery.unacked import UNDECODABLE, UNKNOWN_TASK, UnackedDeliveries
from services.pool import child_guard
from services.pool.batches import BatchPool
from services.worker import request
from services.worker.dead_letter_rules import INVALID_TASK_ERRORS, find_problem

logger = get_logger(__name__)

# What is due sooner waits in the worker's own timer, which is exact; what is due later waits in Redis.
LONGEST_TIMER_SECONDS = 1.0
# Delay of a task whose token Redis refuses, being full or for want of rights: long enough to cost little.
REFUSED_SECONDS = 5.0


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """A consumer that drops no message: one that is no task it can run becomes a dead letter."""

    pool: Any

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        # Messages under no lease that were received over a connection that is gone, and did not get to the pool.
        self._no_ack_messages: list[Any] = []
        # Celery warns at each reconnect of a setting that is explicit here (config/celery.py). It has reset the filters
        # of warnings by now.
        warnings.filterwarnings("ignore", re.escape(CANCEL_TASKS_BY_DEFAULT), CPendingDeprecationWarning)
        # Celery logs each try to connect, and Stalk one line a minute.
        celery_consumer.logger.addFilter(_is_logged)
        self._are_rates_checked = False
        self._token_outage = Outage("rate limits", logger.warning)
        super().__init__(*arguments, **keywords)
        self.pool = BatchPool(self.pool, self.app.time_limits)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        _log_outage(exc, self.conninfo.as_uri())
        super().on_connection_error_after_connected(exc)

    def connect(self) -> Any:
        connection = super().connect()
        Channel.outage.record_recovery()
        if self.restart_count:
            # These were logged at the start: the outage has lines of its own, and Redis may come and go.
            for step in ("connection", "mingle"):
                logging.getLogger(f"celery.worker.consumer.{step}").setLevel(logging.WARNING)
        return connection

    def update_strategies(self) -> None:
        if not self.restart_count:
            self._warn_of_weak_tasks()
        for task in self.app.tasks.values():
            request.set_request_class(task)
        super().update_strategies()

    def _warn_of_weak_tasks(self) -> None:
        tasks = self.app.tasks.values()
        for name in sorted(task.name for task in tasks if not task.acks_late):
            logger.warning("%s has acks_late=False: what runs of it is lost when its worker dies", name)
        if not child_guard.forks(self.pool):
            own = sorted(task.name for task in tasks if task.time_limit or task.soft_time_limit)
            logger.warning(
                "time limits are not enforced in this pool (prefork enforces them); tasks with limits of their own: %s",
                ", ".join(own) or "none",
            )

    def get_rates(self) -> dict[str, Rate | None]:
        """The rate limit of every task here; None for those without one."""
        return {name: self.get_rate(name) for name in tuple(self.app.tasks)}

    def get_rate(self, name: str) -> Rate | None:
        """The rate limit of a task; None where it has none. A task with a strategy of its own has none."""
        bucket = None if self.disable_rate_limits else self.task_buckets[name]
        if not bucket or bucket.fill_rate <= 0 or self.app.tasks[name].Strategy != Task.Strategy:
            return None
        shared = self.app.settings and self.app.settings.worker.rate_limit_scope == rate_limits.SHARED
        return Rate.per_second(name, bucket.fill_rate, "" if shared else self.hostname)

    def _requeue_outdated(self) -> None:
        """Requeue tasks that wait for a rate which they had before this node started, or for a rate without it."""
        try:
            found = rate_limits.requeue_outdated(self.connection.default_channel._commands, self.get_rates())
        except UNREACHABLE:
            raise
        except (RedisError, ValueError, IndexError) as error:
            # The latter two for a key that another program has written.
            logger.error("rate limits: waiting tasks are not requeued, and keep their times: %s", format_error(error))
        else:
            for name, count in found.items():
                logger.info("rate limits: %d tasks %s that waited are requeued, and take new tokens", count, name)
        self._are_rates_checked = True

    def create_task_handler(self, *arguments: Any, **keywords: Any) -> Any:
        handle = super().create_task_handler(*arguments, **keywords)

        def on_task_received(message: Any) -> Any:
            if problem := find_problem(message):
                return self._reject(message, problem)
            headers, deliveries = message.headers, deliveries_of(message)
            if isinstance(deliveries, NoAckDeliveries):
                # Its sender may have written anything there; such a message has no second delivery.
                headers.update(delivery_count=1, requeue_count=0)
            if (count := headers.get("delivery_count", 1)) > 1:
                logger.warning("%s[%s]: delivery %s", headers.get("task"), headers.get("id"), count)
            # A revoked task is discarded at once: when it is due its revocation may be forgotten.
            stays_here = headers.get("task") not in self.strategies or headers["id"] in worker_state.revoked
            if not stays_here and isinstance(deliveries, UnackedDeliveries) and (delay := self._find_delay(message)):
                return deliveries.postpone(message.delivery_tag, delay.due, headers["id"], delay.token)
            return self._handle(handle, message)

        def receive_no_ack_messages() -> None:
            while self._no_ack_messages:
                on_task_received(self._no_ack_messages.pop())

        self.call_soon(receive_no_ack_messages)
        if not self._are_rates_checked:
            # Later, when this node receives what is requeued.
            self.call_soon(self._requeue_outdated)
        return on_task_received

    def _find_delay(self, message: Any) -> Delay | None:
        """Until when a task has to wait in Redis: for its ETA, or for a token of its rate; None when it need not."""
        eta = self._parse_time(message, "eta")
        if eta > time.time() + LONGEST_TIMER_SECONDS:
            return Delay(eta)
        if not (rate := self.get_rate(message.headers["task"])):
            return None
        expires = self._parse_time(message, "expires")
        if NEVER < expires < time.time():
            # Celery discards it.
            return None
        start = message.headers["delivery_count"]
        try:
            delay = rate.take_token(message.channel._commands, message.delivery_info or {}, start, eta, expires)
        except UNREACHABLE:
            raise
        except RedisError as error:
            purpose = f"give tokens to {rate.task}"
            self._token_outage.record_failure(error, describe_server(message.channel.client), purpose)
            return Delay(time.time() + REFUSED_SECONDS)
        self._token_outage.record_recovery()
        return delay

    def _parse_time(self, message: Any, name: str) -> float:
        """The header "eta" or "expires" of a task as Unix time; NEVER where it has none."""
        try:
            return float(maybe_make_aware(maybe_iso8601(message.headers.get(name)), self.app.timezone).timestamp())
        except (AttributeError, ValueError, TypeError, OverflowError):
            # There is none, or Celery will report what is wrong with it.
            return NEVER

    def _has_token(self, request: Any) -> bool:
        """Whether `_find_delay` has taken its token: not for broadcasts, nor for the first version of the protocol."""
        is_leased = isinstance(request.deliveries, UnackedDeliveries)
        return is_leased and "task" in request.message.headers and bool(self.get_rate(request.name))

    def _limit_task(self, request: Any, bucket: Any, tokens: int) -> Any:
        if self._has_token(request):
            return self._limit_move_to_pool(request)
        return super()._limit_task(request, bucket, tokens)

    def _limit_post_eta(self, request: Any, bucket: Any, tokens: int) -> Any:
        if self._has_token(request):
            return self.apply_eta_task(request)
        return super()._limit_post_eta(request, bucket, tokens)

    def call_soon_ack(self, p: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Acknowledge or reject at once: that only changes the unacknowledged deliveries, which any thread may do.

        Celery waits for the next turn of its loop, and a solo pool may run several tasks before that.
        """
        return p(*args, **kwargs)

    def _handle(self, handle: Callable[[Any], Any], message: Any) -> Any:
        try:
            return handle(message)
        except INVALID_TASK_ERRORS as error:
            if deliveries_of(message).is_in_pool(message.delivery_tag):
                # A solo pool has run the task inside of `handle`.
                raise
            return self._dead_letter(message, UNDECODABLE, f"no task can be made of it: {error!r}")

    def on_close(self) -> None:
        # Celery forgets the requests that wait, because they are redelivered; those under no lease are not.
        limited = [one for bucket in self.task_buckets.values() if bucket for one, _ in bucket.contents]
        for one in {*worker_state.scheduled_requests, *worker_state.reserved_requests, *limited}:
            if isinstance(one.deliveries, NoAckDeliveries) and not one.deliveries.is_in_pool(one.tag):
                self._no_ack_messages.append(one.message)
        super().on_close()
        channel = getattr(self.task_consumer, "channel", None)
        if channel is not None and channel.delivers:
            channel.deliveries.requeue_channel(channel.number)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        if not message.channel.delivers:
            # Celery calls this for remote control commands as well.
            logger.error("control: a command cannot be decoded: %r", exc)
            return
        self._dead_letter(message, UNDECODABLE, f"its body cannot be decoded: {exc!r}")

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._reject(message, "it is not a task")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._reject(message, f"it is not a valid task: {exc!r}", exc)

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._dead_letter(message, UNKNOWN_TASK, f"no task of this name is registered here: {exc}")
        # The first version of Celery's protocol has the fields in the body.
        fields = message.headers if "task" in message.headers else message.payload
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=fields["task"], id=fields["id"])

    def _reject(self, message: Any, problem: str, error: Exception | None = None) -> None:
        self._dead_letter(message, UNDECODABLE, problem)
        signals.task_rejected.send(sender=self, message=message, exc=error)

    def _dead_letter(self, message: Any, reason: str, detail: str) -> None:
        deliveries_of(message).reject(message.delivery_tag, reason, detail)


def _is_logged(record: logging.LogRecord) -> bool:
    """Filter the lines of Celery's consumer: an error of its connection is logged as an outage."""
    arguments: Any = record.args or ()
    if record.msg == CONNECTION_ERROR:
        _log_outage(arguments[1], arguments[0])
    return record.msg != CONNECTION_ERROR and CONNECTION_RETRY not in arguments


def _log_outage(error: Exception, url: str) -> None:
    Channel.outage.record_failure(error, f"Redis at {url}", "give tasks")
