"""Celery's worker, consumer and request, where a delivery begins and ends."""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import Celery, Task, signals
from celery.app.trace import fast_trace_task, trace_task_ret
from celery.apps.worker import Worker as CeleryWorker
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.exceptions import (
    CPendingDeprecationWarning,
    MaxRetriesExceededError,
    Reject,
    Retry,
    TaskRevokedError,
    TimeLimitExceeded,
    WorkerLostError,
)
from celery.exceptions import Ignore as IgnoreTask
from celery.states import FAILURE
from celery.utils.imports import symbol_by_name
from celery.utils.log import get_logger
from celery.utils.time import maybe_iso8601, maybe_make_aware
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.consumer import consumer as celery_consumer
from celery.worker.consumer.consumer import CANCEL_TASKS_BY_DEFAULT, CONNECTION_ERROR, CONNECTION_RETRY
from celery.worker.request import Request as CeleryRequest
from kombu.utils.objects import cached_property
from redis.exceptions import RedisError

from config import Settings
from config.redis_url import mask_passwords
from services.broker.client import UNREACHABLE, connect, describe_server, format_error, require_set
from services.broker.outages import Outage
from services.delayed import rate_limits
from services.delayed.rate_limits import NEVER, Rate, Turn
from services.delivery import registry
from services.delivery.channel import Channel
from services.delivery.claim import Tag
from services.delivery.no_ack import NoAckDeliveries
from services.delivery.unacked import REJECTED, RETRIES, RETRIES_EXHAUSTED, UNDECODABLE, UNKNOWN_TASK, UnackedDeliveries
from services.pool import child_guard, failures, time_limits
from services.pool.batches import BatchPool
from services.pool.time_limits import Limits

logger = get_logger(__name__)

# What is due sooner is kept in the worker's own timer, which is exact; what is due later waits in Redis.
LONGEST_TIMER_SECONDS = 1.0
# When a task comes again whose token Redis has refused, for want of memory or of rights: seldom enough to cost little.
REFUSED_SECONDS = 5.0
# What Celery raises at a header or an option that is not what it should be: it believes all of them. Left to
# themselves, these errors end the worker, and then the next one.
UNUSABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class Stalk(Celery):  # type: ignore[misc]
    """A Celery application whose tasks are delivered by services/delivery."""

    amqp_cls = "services.delivery.connection:AMQP"
    control_cls = "services.control.mailbox:Control"

    # None in an application that is configured by hand.
    settings: Settings | None = None
    # Of a run for which neither task nor message has any.
    time_limits = Limits()

    @cached_property  # type: ignore[untyped-decorator]
    def Worker(self) -> Any:  # noqa: N802 - Celery's name
        self.require_broker(self.conf.broker_read_url)
        return self.subclass_with_self("services.worker.worker:Worker")

    @cached_property  # type: ignore[untyped-decorator]
    def Beat(self) -> Any:  # noqa: N802 - Celery's name
        self.require_broker(self.conf.broker_write_url)
        return self.subclass_with_self("celery.apps.beat:Beat")

    @cached_property  # type: ignore[untyped-decorator]
    def redbeat_conf(self) -> Any:
        """RedBeat's settings, for which it asks before it does anything."""
        # Only here: few processes need RedBeat, which takes 2 MB and a tenth of a second.
        from services.beat import entries

        return entries.configure(self)

    @cached_property  # type: ignore[untyped-decorator]
    def redbeat_redis(self) -> Any:
        """RedBeat's client; its own URL parser knows neither sockets nor sentinels."""
        if not self.settings:
            raise AttributeError("an application without settings leaves it to RedBeat")
        # What somebody has written there may not be UTF-8.
        options = {"decode_responses": True, "encoding_errors": "surrogateescape"}
        return connect(self.settings.broker_url, self.settings, **options)

    def _connection(self, url: str, **options: Any) -> Any:
        self.require_broker(url)
        return super()._connection(url, **options)

    def require_broker(self, url: str) -> None:
        """Raise NotSet where Celery would look for years for a host that is not there."""
        if self.settings:
            require_set(url, self.settings)


class Worker(CeleryWorker):  # type: ignore[misc]
    """A worker that runs only what it still holds, and gives back everything at its end."""

    def on_before_init(self, **keywords: Any) -> None:
        super().on_before_init(**keywords)
        # Before the pool forks.
        child_guard.create_table()

    def setup_defaults(
        self, time_limit: float | None = None, soft_time_limit: float | None = None, **options: Any
    ) -> None:
        super().setup_defaults(**options)
        # A pool that had limits of its own would put them beside those of a task that gives one of them.
        self.app.time_limits = time_limits.complete(Limits(time_limit, soft_time_limit), self.app.time_limits)

    def setup_includes(self, includes: Any) -> None:
        super().setup_includes(includes)
        # All tasks are there now, and the pool has not forked.
        failures.guard(self.app.tasks.values())

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = super().stats()
        if isinstance(self.pool, PreforkPool):
            hard, soft = self.app.time_limits
            found["pool"]["timeouts"] = (soft or 0, hard or 0)
        # A socket's URL is the host's name to kombu, and the sentinels' password an option (kombu 5.7).
        found["broker"] = mask_passwords(found["broker"])
        return found

    def _process_task(self, req: Any) -> None:
        if not req.deliveries.hand_to_pool(req.tag):
            logger.warning("%s[%s] is not started: it was given back, or its lease was lost", req.name, req.id)
            _forget(req)
            self._release_place()
            return
        try:
            result = req.execute_guarded(self.pool)
        except TaskRevokedError:
            self._release_place()
        except UNUSABLE as error:
            if req.deliveries.has_started(req.tag):
                _escaped(req, error)
            else:
                _forget(req)
                req.deliveries.reject(req.tag, UNDECODABLE, f"it cannot be run: {error!r}")
            self._release_place()
        except BaseException as error:
            # A solo task ran in there, and Celery has no end for it.
            _escaped(req, error)
            raise
        else:
            future = getattr(result, "f", None)
            if isinstance(future, Future):
                future.add_done_callback(partial(_look_after, req))

    def _release_place(self) -> None:
        if self.semaphore is not None:
            self._quick_release()

    def on_stopped(self) -> None:
        super().on_stopped()
        if registry.close():
            self.leave_rates()

    def leave_rates(self) -> None:
        """Leave to other nodes what waits for a token of this one."""
        mine = self.consumer.own_rates() if self.consumer else {}
        if not any(mine.values()) or not self.app.settings:
            return
        try:
            options = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), rate_limits.LEAVING_SECONDS)
            with connect(self.app.settings.broker_url, self.app.settings, **options) as client:
                rate_limits.leave(client, filter(None, mine.values()))
        except (RedisError, OSError) as error:
            logger.warning("rate limits: what waits keeps its time: %s", format_error(error))


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """A consumer that drops no message: what it cannot make a task of becomes a dead letter."""

    pool: Any

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        # Messages under no lease that a connection has left, and that the pool does not have yet.
        self._kept: list[Any] = []
        # At each reconnect, of a setting that is explicit here (config/celery.py). Celery resets filters at its start.
        warnings.filterwarnings("ignore", re.escape(CANCEL_TASKS_BY_DEFAULT), CPendingDeprecationWarning)
        self._rates_settled = False
        self._tokens = Outage("rate limits", logger.warning)
        super().__init__(*arguments, **keywords)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        _say_away(exc, self.conninfo.as_uri())
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
            self._say_what_is_not_kept()
        for task in self.app.tasks.values():
            task.Request = _request_class(task.Request)
        # Celery's own strategy takes the pool's method from here too; DeliveredRequest does not use it.
        pool, self.pool = self.pool, BatchPool(self.pool, self.app.time_limits)
        try:
            super().update_strategies()
        finally:
            self.pool = pool

    def _say_what_is_not_kept(self) -> None:
        tasks = self.app.tasks.values()
        for name in sorted(task.name for task in tasks if not task.acks_late):
            logger.warning("%s has acks_late=False: what runs of it is lost when its worker dies", name)
        if not isinstance(self.pool, PreforkPool):
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
            if problem := _problem(message):
                return self._reject(message, problem)
            headers, deliveries = message.headers, _deliveries_of(message)
            if isinstance(deliveries, NoAckDeliveries):
                # What stands there is its sender's, and may be anything; it has no second start.
                headers.update(delivery_count=1, requeue_count=0)
            if (count := headers.get("delivery_count", 1)) > 1:
                logger.warning("%s[%s]: delivery %s", headers.get("task"), headers.get("id"), count)
            # A task that has been revoked is Celery's at once: nobody would remember it when it is due.
            here_to_stay = headers.get("task") not in self.strategies or headers["id"] in worker_state.revoked
            if not here_to_stay and isinstance(deliveries, UnackedDeliveries) and (turn := self._turn_of(message)):
                return deliveries.postpone(message.delivery_tag, turn.due, headers["id"], turn.token)
            return self._handled(handle, message)

        def receive_kept() -> None:
            while self._kept:
                on_task_received(self._kept.pop())

        self.call_soon(receive_kept)
        if not self._rates_settled:
            # When this node takes part in what comes back.
            self.call_soon(self._settle_rates)
        return on_task_received

    def _turn_of(self, message: Any) -> Turn | None:
        """When a task comes again that has to wait in Redis: for its ETA, or for a token of its rate."""
        eta = _moment(message, "eta", self.app)
        if eta > time.time() + LONGEST_TIMER_SECONDS:
            return Turn(eta, "")
        if not (rate := self.rate_of(message.headers["task"])):
            return None
        expires = _moment(message, "expires", self.app)
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
            if _deliveries_of(message).is_in_pool(message.delivery_tag):
                # A solo pool has run it in there.
                raise
            return self._dead_letter(message, UNDECODABLE, f"no task can be made of it: {error!r}")

    def on_close(self) -> None:
        # Celery forgets what waits, as it comes again; but not what is under no lease.
        limited = [request for bucket in self.task_buckets.values() if bucket for request, _ in bucket.contents]
        for request in {*worker_state.scheduled_requests, *worker_state.reserved_requests, *limited}:
            if isinstance(request.deliveries, NoAckDeliveries) and not request.deliveries.is_in_pool(request.tag):
                self._kept.append(request.message)
        # The pool goes on with what it has, and acknowledges it over the next connection: flushing would forget it.
        pool, self.pool = self.pool, None
        try:
            super().on_close()
        finally:
            self.pool = pool
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
        _deliveries_of(message).reject(message.delivery_tag, reason, detail)


def _is_of_no_outage(record: logging.LogRecord) -> bool:
    """Whether a line of Celery's is to be logged. It has one for each try to connect, and Stalk one a minute."""
    said: Any = record.args or ()
    if record.msg == CONNECTION_ERROR:
        _say_away(said[1], said[0])
    return record.msg != CONNECTION_ERROR and CONNECTION_RETRY not in said


def _say_away(error: Exception, url: str) -> None:
    Channel.outage.record_failure(error, f"Redis at {url}", "give tasks")


celery_consumer.logger.addFilter(_is_of_no_outage)


class LeaseLostError(TaskRevokedError):  # type: ignore[misc]
    """A task is not started, because somebody else may have it by now."""


class DeliveredRequest(CeleryRequest):  # type: ignore[misc]
    """Mixed into the class of a task's requests, between it and Celery's."""

    acknowledged: bool
    _exhausted = ""
    # How the process that ran it has died; "" when it has not, or when this is no death that counts.
    _death = ""
    _recalled = False

    @cached_property  # type: ignore[untyped-decorator]
    def deliveries(self) -> UnackedDeliveries | NoAckDeliveries:
        return _deliveries_of(self.message)

    @property
    def tag(self) -> str:
        return str(self.message.delivery_tag)

    def execute_guarded(self, pool: Any) -> Any:
        """Have the pool run it; a child starts it only while it is still ours.

        In place of execute_using_pool, which Celery makes for each task with the limits that it had at the node's
        start. Raises TaskRevokedError.
        """
        if self.revoked():
            raise TaskRevokedError(self.id)
        if self.chord and self.app.conf.worker_deduplicate_successful_tasks:
            # It may have stored its result and died before its chord had counted it: Celery would not run it again.
            self.request_dict["delivery_info"] = self.delivery_info | {"redelivered": False}
        hard, soft = time_limits.effective(Limits(*self.time_limits), self.task, self.app.time_limits)
        trace = fast_trace_task if self.app.use_fast_trace_task else trace_task_ret
        target, *first = *child_guard.guard(pool, self.deliveries, self.tag), trace
        result = pool.apply_async(
            target,
            args=(*first, self.type, self.id, self.request_dict, self.body, self.content_type, self.content_encoding),
            accept_callback=self.on_accepted,
            timeout_callback=self.on_timeout,
            callback=self.on_returned,
            error_callback=self.on_failure,
            soft_timeout=soft,
            timeout=hard,
            correlation_id=self.id,
        )
        # Celery's terminate() asks for it.
        self._apply_result = weakref.ref(result) if result is not None else None
        return result

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """Its task is about to run in process `pid`. Raises TaskRevokedError if it must not and can be kept from it."""
        here = pid == os.getpid()
        # A pool of threads takes more than it runs when it is given more.
        if here and self.revoked():
            raise TaskRevokedError(self.id)
        if not self.deliveries.start(self.tag, here=here) and here:
            _forget(self)
            raise LeaseLostError(f"{self.name}[{self.id}] is not started: its lease was lost")
        super().on_accepted(pid, time_accepted)

    def on_returned(self, answer: Any) -> None:
        """It has run, or an error of Celery's own or of a hook's has ended its run."""
        if isinstance(answer, ExceptionInfo):
            self.on_failure(answer)
        else:
            self.on_success(answer)

    def on_failure(self, exc_info: Any, *arguments: Any, **keywords: Any) -> Any:
        error = failures.error_of(exc_info)
        if isinstance(error, WorkerLostError):
            self._death = "the process that ran it died"
        elif isinstance(error, TimeLimitExceeded):
            self._death = f"it ran into its hard time limit: {error!r}"
        elif isinstance(error, child_guard.LeaseRanOut):
            self._recalled = True
            logger.warning("%s[%s] is not started: its lease ran out before a child got to it", self.name, self.id)
        elif not self._already_cancelled and not self._already_revoked:
            # A child has reported it before it left, so it is the task's own (billiard 4.3).
            error = exc_info.exception = failures.as_failure(error)
            failures.stop_node_for(error)
        if _retries_exhausted(self, error):
            self._exhausted = repr(error)
        return super().on_failure(exc_info, *arguments, **keywords)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Its time is over. Celery tells of a hard limit here, after on_failure has, and of what is going to run again.

        Only the hooks of the task are left to be called (celery 5.7).
        """
        if soft or worker_state.should_terminate:
            super().on_timeout(soft, timeout)
            return
        logger.error("Hard time limit (%ss) exceeded for %s[%s]", timeout, self.name, self.id)
        if self.task.acks_late and not self.task.acks_on_timeout:
            return
        try:
            raise TimeLimitExceeded(timeout)
        except TimeLimitExceeded as error:
            told = error, self.id, self.args, self.kwargs, ExceptionInfo()
        self.task.on_failure(*told)
        self.task.after_return(FAILURE, *told)

    def cancel(self, pool: Any, *arguments: Any, **options: Any) -> None:
        """End its run in a cold shutdown; in a pool of this process it ends with that, and goes back."""
        if isinstance(pool, PreforkPool):
            super().cancel(pool, *arguments, **options)

    def acknowledge(self) -> None:
        """It is done; or its last retry has failed, and it becomes a dead letter."""
        if self._exhausted and not self.acknowledged and self.deliveries.keeps_as_dead_letter(RETRIES):
            self.deliveries.reject(self.tag, RETRIES_EXHAUSTED, self._exhausted, reported=True)
            self.acknowledged = True
            return
        super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        """It was not done: its process has died, it was recalled or stopped, or its task has rejected it."""
        if self.acknowledged:
            return
        if not requeue:
            self.deliveries.reject(self.tag, REJECTED, "rejected by its task", reported=True)
        elif worker_state.should_terminate is None and not self._recalled:
            if self._death:
                self.deliveries.record_crash(self.tag, self._death)
            else:
                self.deliveries.requeue_later(self.tag, self.id)
        # What is left goes back, and does not count.
        super().reject(requeue)


def _request_class(given: Any) -> type:
    """The class of a task's requests, with deliveries mixed in."""
    base = symbol_by_name(given)
    if issubclass(base, DeliveredRequest):
        return base  # type: ignore[no-any-return]
    return type(base.__name__, (base, DeliveredRequest), {"__module__": base.__module__})


def _retries_exhausted(request: Any, error: BaseException) -> bool:
    """Whether a task has failed for the last time that its max_retries allows."""
    if isinstance(error, Retry | Reject | IgnoreTask | WorkerLostError):
        return False
    retries, most = request.request_dict.get("retries") or 0, request.task.max_retries
    return isinstance(error, MaxRetriesExceededError) or (most is not None and 0 < retries >= most)


def _look_after(request: Any, future: Future[Any]) -> None:
    """See to a thread of the pool that has ended."""
    if not future.cancelled() and (error := future.exception()):
        _escaped(request, error)


def _escaped(request: Any, error: BaseException) -> None:
    """An error has left a task's run without an end that Celery knows of: the result could not be stored, for one."""
    _forget(request)
    if failures.is_stop(error):
        request.deliveries.requeue([request.tag])
    elif not isinstance(error, TaskRevokedError):
        logger.error("%s[%s] ended with an error of Celery's own: %r", request.name, request.id, error)
        request.deliveries.record_crash(request.tag, repr(error))


def _deliveries_of(message: Any) -> UnackedDeliveries | NoAckDeliveries:
    """Who keeps the lease of a message."""
    return message.channel.deliveries if isinstance(message.delivery_tag, Tag) else NoAckDeliveries()


def _forget(request: Any) -> None:
    """Take a request that will not run out of Celery's books."""
    worker_state.task_ready(request)


def _problem(message: Any) -> str:
    """Why no task can be made of a message; "" when one can."""
    headers = message.headers
    try:
        payload = message.payload
    except Exception as error:  # whatever a decoder raises at what somebody has sent
        return f"its body cannot be decoded: {error!r}"
    if not isinstance(headers, dict):
        return f"its headers are {type(headers).__name__}, not an object"
    fields = headers if "task" in headers else payload
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), str) for name in ("task", "id")):
        return "it has no task and id"
    # A pool of processes learns it when the task runs, and ends.
    if not _are_limits(fields.get("timelimit")):
        return f"its time limits are {fields['timelimit']!r}, not two numbers"
    # The first version of Celery's protocol has all of it in the body.
    return "" if fields is payload else _body_problem(payload)


def _body_problem(payload: Any) -> str:
    if isinstance(payload, dict):
        return ""
    shape = [type(part) for part in payload] if isinstance(payload, list | tuple) else []
    types = (list | tuple, dict, dict | None)
    if len(shape) != len(types) or not all(map(issubclass, shape, types)):
        return "its body is not a list of arguments, keywords and options"
    return ""


def _are_limits(found: Any) -> bool:
    """Whether Celery can take this for a hard and a soft time limit."""
    if not found:
        return True
    return isinstance(found, list) and len(found) == 2 and all(isinstance(limit, int | float | None) for limit in found)


def _moment(message: Any, name: str, app: Any) -> float:
    """A time that a task has, "eta" or "expires", as Unix time."""
    try:
        return float(maybe_make_aware(maybe_iso8601(message.headers.get(name)), app.timezone).timestamp())
    except (AttributeError, ValueError, TypeError, OverflowError):
        # There is none, or Celery will say what is wrong with it.
        return NEVER
