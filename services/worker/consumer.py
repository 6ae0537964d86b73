"""Celery's consumer: it drops no message, and has what waits for a time or a rate do so in Redis."""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

from celery import Task, signals
from celery.exceptions import CPendingDeprecationWarning
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.consumer import consumer as celery_consumer
from celery.worker.consumer.consumer import CANCEL_TASKS_BY_DEFAULT, CONNECTION_ERROR, CONNECTION_RETRY
from redis.exceptions import RedisError

from services.broker.client import UNREACHABLE, describe_server, format_error
from services.broker.outages import Outage
from services.delayed import rate_limits
from services.delayed.rate_limits import NEVER, Rate, Turn
from services.delivery.channel import Channel
from services.delivery.no_ack import NoAckDeliveries, deliveries_of
from services.delivery.unacked import UNDECODABLE, UNKNOWN_TASK, UnackedDeliveries
from services.pool import child_guard
from services.pool.batches import BatchPool
from services.worker import request
from services.worker.message_check import UNUSABLE, find_problem, read_time

logger = get_logger(__name__)

# What is due sooner is kept in the worker's own timer, which is exact; what is due later waits in Redis.
LONGEST_TIMER_SECONDS = 1.0
# When a task comes again whose token Redis has refused, for want of memory or of rights: seldom enough to cost little.
REFUSED_SECONDS = 5.0


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """A consumer that drops no message: what it cannot make a task of becomes a dead letter."""

    pool: Any

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        # Messages under no lease that a connection has left, and that the pool does not have yet.
        self._no_ack_messages: list[Any] = []
        # At each reconnect, of a setting that is explicit here (config/celery.py). Celery resets filters at its start.
        warnings.filterwarnings("ignore", re.escape(CANCEL_TASKS_BY_DEFAULT), CPendingDeprecationWarning)
        # Celery has a line for each try to connect, and Stalk one a minute.
        celery_consumer.logger.addFilter(_is_logged)
        self._rates_settled = False
        self._tokens = Outage("rate limits", logger.warning)
        super().__init__(*arguments, **keywords)
        self.pool = BatchPool(self.pool, self.app.time_limits)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        _log_outage(exc, self.conninfo.as_uri())
        super().on_connection_error_after_connected(exc)

    def connect(self) -> Any:
        connection = super().connect()
        Channel.outage.record_recovery()
        if self.restart_count:
            # Said once: the outage has lines of its own, and Redis may come and go.
            for step in ("connection", "mingle"):
                logging.getLogger(f"celery.worker.consumer.{step}").setLevel(logging.WARNING)
        return connection

    def update_strategies(self) -> None:
        if not self.restart_count:
            self._warn_of_weak_tasks()
        for task in self.app.tasks.values():
            request.use_for(task)
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

    def own_rates(self) -> dict[str, Rate | None]:
        """The rate of every task here; None for those without a limit."""
        return {name: self.rate_of(name) for name in tuple(self.app.tasks)}

    def rate_of(self, name: str) -> Rate | None:
        """How often a task may start; None: as often as anybody likes. A strategy of its own knows no rates."""
        bucket = None if self.disable_rate_limits else self.task_buckets[name]
        if not bucket or bucket.fill_rate <= 0 or self.app.tasks[name].Strategy != Task.Strategy:
            return None
        shared = self.app.settings and self.app.settings.worker.rate_limit_scope == rate_limits.SHARED
        return Rate.of(name, bucket.fill_rate, "" if shared else self.hostname)

    def _settle_rates(self) -> None:
        """Bring back what waits for a rate that a task had before this node started, or for one without this node."""
        try:
            found = rate_limits.settle(self.connection.default_channel._commands, self.own_rates())
        except UNREACHABLE:
            raise
        except (RedisError, ValueError, IndexError) as error:
            # Of the latter two one that somebody else has written.
            logger.error("rate limits: what waits keeps its time: %s", format_error(error))
        else:
            for name, count in found.items():
                logger.info("rate limits: %d of %s that waited are back in their queues, for new times", count, name)
        self._rates_settled = True

    def create_task_handler(self, *arguments: Any, **keywords: Any) -> Any:
        handle = super().create_task_handler(*arguments, **keywords)

        def on_task_received(message: Any) -> Any:
            if problem := find_problem(message):
                return self._reject(message, problem)
            headers, deliveries = message.headers, deliveries_of(message)
            if isinstance(deliveries, NoAckDeliveries):
                # What stands there is its sender's, and may be anything; it has no second start.
                headers.update(delivery_count=1, requeue_count=0)
            if (count := headers.get("delivery_count", 1)) > 1:
                logger.warning("%s[%s]: delivery %s", headers.get("task"), headers.get("id"), count)
            # A task that has been revoked is Celery's at once: nobody would remember it when it is due.
            stays_here = headers.get("task") not in self.strategies or headers["id"] in worker_state.revoked
            if not stays_here and isinstance(deliveries, UnackedDeliveries) and (turn := self._turn_of(message)):
                return deliveries.postpone(message.delivery_tag, turn.due, headers["id"], turn.token)
            return self._handled(handle, message)

        def receive_no_ack_messages() -> None:
            while self._no_ack_messages:
                on_task_received(self._no_ack_messages.pop())

        self.call_soon(receive_no_ack_messages)
        if not self._rates_settled:
            # When this node takes part in what comes back.
            self.call_soon(self._settle_rates)
        return on_task_received

    def _turn_of(self, message: Any) -> Turn | None:
        """When a task comes again that has to wait in Redis: for its ETA, or for a token of its rate."""
        eta = read_time(message, "eta", self.app)
        if eta > time.time() + LONGEST_TIMER_SECONDS:
            return Turn(eta, "")
        if not (rate := self.rate_of(message.headers["task"])):
            return None
        expires = read_time(message, "expires", self.app)
        if NEVER < expires < time.time():
            # Celery discards it.
            return None
        start = message.headers["delivery_count"]
        try:
            turn = rate.take(message.channel._commands, message.delivery_info or {}, start, eta, expires)
        except UNREACHABLE:
            raise
        except RedisError as error:
            self._tokens.record_failure(error, describe_server(message.channel.client), f"give tokens to {rate.task}")
            return Turn(time.time() + REFUSED_SECONDS, "")
        self._tokens.record_recovery()
        return turn

    def _has_token(self, request: Any) -> bool:
        """Whether it came by way of `_turn_of`: broadcasts do not, nor does the first version of the protocol."""
        leased = isinstance(request.deliveries, UnackedDeliveries)
        return leased and "task" in request.message.headers and bool(self.rate_of(request.name))

    def _limit_task(self, request: Any, bucket: Any, tokens: int) -> Any:
        if self._has_token(request):
            return self._limit_move_to_pool(request)
        return super()._limit_task(request, bucket, tokens)

    def _limit_post_eta(self, request: Any, bucket: Any, tokens: int) -> Any:
        if self._has_token(request):
            return self.apply_eta_task(request)
        return super()._limit_post_eta(request, bucket, tokens)

    def call_soon_ack(self, p: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Acknowledge or reject at once: all that is done here is to tell the deliveries, which any thread may.

        Celery puts it off to the next turn of its loop, and a solo pool may run several tasks before that.
        """
        return p(*args, **kwargs)

    def _handled(self, handle: Callable[[Any], Any], message: Any) -> Any:
        try:
            return handle(message)
        except UNUSABLE as error:
            if deliveries_of(message).is_in_pool(message.delivery_tag):
                # A solo pool has run it in there.
                raise
            return self._dead_letter(message, UNDECODABLE, f"no task can be made of it: {error!r}")

    def on_close(self) -> None:
        # Celery forgets what waits, as it comes again; but not what is under no lease.
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
            # Celery asks here for its mailbox of commands, too.
            logger.error("control: a command cannot be decoded: %r", exc)
            return
        self._dead_letter(message, UNDECODABLE, f"its body cannot be decoded: {exc!r}")

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._reject(message, "it is not a task")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._reject(message, f"it is not a valid task: {exc!r}", exc)

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._dead_letter(message, UNKNOWN_TASK, f"no task of this name is registered here: {exc}")
        # The first version of Celery's protocol has them in the body.
        fields = message.headers if "task" in message.headers else message.payload
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=fields["task"], id=fields["id"])

    def _reject(self, message: Any, problem: str, error: Exception | None = None) -> None:
        self._dead_letter(message, UNDECODABLE, problem)
        signals.task_rejected.send(sender=self, message=message, exc=error)

    def _dead_letter(self, message: Any, reason: str, detail: str) -> None:
        deliveries_of(message).reject(message.delivery_tag, reason, detail)


def _is_logged(record: logging.LogRecord) -> bool:
    """Whether a line of Celery's consumer is logged."""
    said: Any = record.args or ()
    if record.msg == CONNECTION_ERROR:
        _log_outage(said[1], said[0])
    return record.msg != CONNECTION_ERROR and CONNECTION_RETRY not in said


def _log_outage(error: Exception, url: str) -> None:
    Channel.outage.record_failure(error, f"Redis at {url}", "give tasks")
