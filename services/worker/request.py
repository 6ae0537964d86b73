"""Celery's request: it marks its delivery as started, and acknowledges, requeues or rejects it at its end."""

import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import Task
from celery.app.trace import fast_trace_task, trace_task_ret
from celery.exceptions import TaskRevokedError, TimeLimitExceeded, WorkerLostError
from celery.states import FAILURE
from celery.utils.imports import symbol_by_name
from celery.utils.log import get_logger
from celery.worker import request as celery_request
from celery.worker import state as worker_state
from kombu.utils.objects import cached_property

from services.delivery.no_ack import NoAckDeliveries, deliveries_of
from services.delivery.unacked import REJECTED, RETRIES, RETRIES_EXHAUSTED, UnackedDeliveries
from services.pool import child_guard, failures, time_limits
from services.pool.time_limits import Limits
from services.worker.dead_letter_rules import is_last_retry

logger = get_logger(__name__)


class LeaseLostError(TaskRevokedError):  # type: ignore[misc]
    """A task is not started, because another node may have it by now."""


class Request(celery_request.Request):  # type: ignore[misc]
    """A task that this node has received."""

    acknowledged: bool
    # The error of its last retry; "" when that has not failed.
    _last_error = ""
    # How the process that ran it has died; "" when it has not, or when that does not count.
    _death = ""
    # Whether a child did not start it, because its lease had expired.
    _lease_expired = False
    # Acknowledgement or rejection, for when on_failure has stored the failure; None outside of on_failure.
    _deferred: list[Callable[[], None]] | None = None

    @cached_property  # type: ignore[untyped-decorator]
    def deliveries(self) -> UnackedDeliveries | NoAckDeliveries:
        """The deliveries that its own is one of."""
        return deliveries_of(self.message)

    @property
    def tag(self) -> str:
        return str(self.message.delivery_tag)

    def execute_with_lease(self, pool: Any) -> Any:
        """Have the pool run it; a child starts it only while its lease lasts.

        Used in place of execute_using_pool, which has the time limits that the task had when the node started.
        Raises TaskRevokedError.
        """
        if self.revoked():
            raise TaskRevokedError(self.id)
        if self.chord and self.app.conf.worker_deduplicate_successful_tasks:
            # It may have stored its result, and died before its chord had counted it: Celery would not run it again.
            self.request_dict["delivery_info"] = self.delivery_info | {"redelivered": False}
        hard, soft = time_limits.resolve(Limits(*self.time_limits), self.task, self.app.time_limits)
        trace = fast_trace_task if self.app.use_fast_trace_task else trace_task_ret
        target, *first = *child_guard.get_runner(pool, self.deliveries, self.tag), trace
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
        # For Celery's terminate().
        self._apply_result = weakref.ref(result) if result is not None else None
        return result

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """Mark it as started in process `pid`. Raises TaskRevokedError where it must not, and has not, started."""
        here = pid == os.getpid()
        # In a pool of threads it may have waited for a thread.
        if here and self.revoked():
            raise TaskRevokedError(self.id)
        if not self.deliveries.start(self.tag, here=here) and here:
            discard(self)
            raise LeaseLostError(f"{self.name}[{self.id}] is not started: its lease was lost")
        super().on_accepted(pid, time_accepted)

    def on_returned(self, outcome: Any) -> None:
        """Handle what the pool returns: a result, or an error of Celery's own code or of a hook."""
        if isinstance(outcome, ExceptionInfo):
            self.on_failure(outcome)
        else:
            self.on_success(outcome)

    def on_failure(self, exc_info: Any, *arguments: Any, **keywords: Any) -> Any:
        """Store the failure, then acknowledge or reject the message.

        When a child has died, Celery acknowledges first, and then stores the WorkerLostError (celery 5.7).
        """
        self._classify(exc_info)
        deferred: list[Callable[[], None]] = []
        self._deferred = deferred
        try:
            return super().on_failure(exc_info, *arguments, **keywords)
        finally:
            self._deferred = None
            for settle in deferred:
                settle()

    def _classify(self, exc_info: Any) -> None:
        """Note whether this failure is a crash that counts, and whether it was the last retry."""
        error = failures.unwrap_error(exc_info)
        if isinstance(error, WorkerLostError):
            self._death = "the process that ran it died"
        elif isinstance(error, TimeLimitExceeded):
            self._death = f"it ran into its hard time limit: {error!r}"
        elif isinstance(error, child_guard.LeaseExpired):
            self._lease_expired = True
            logger.warning("%s[%s] is not started: its lease ran out before a child got to it", self.name, self.id)
        elif not self._already_cancelled and not self._already_revoked:
            # A child has reported it, and did not die of it, so it is the task's own error (billiard 4.3).
            error = exc_info.exception = failures.convert_error(error)
            failures.stop_node_for(error)
        if is_last_retry(error, self.request_dict.get("retries"), self.task.max_retries):
            self._last_error = repr(error)

    def _success_was_stored(self) -> Any:
        """Whether a success is stored after which the task need not run again.

        A part of a chord runs again: its child may have died before the chord had counted it, or before it had sent
        the body. Celery would acknowledge it, and the body would never be sent (celery 5.7).
        """
        return False if self.chord else super()._success_was_stored()

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Call the task's hooks after a hard time limit.

        Celery calls this after on_failure has stored the failure, and would store it again, even where the task is
        going to run again (celery 5.7).
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
            failure = error, self.id, self.args, self.kwargs, ExceptionInfo()
        self.task.on_failure(*failure)
        self.task.after_return(FAILURE, *failure)

    def cancel(self, pool: Any, *arguments: Any, **options: Any) -> None:
        """End its run in a cold shutdown; in a pool without children it ends with the process, and is requeued."""
        if child_guard.forks(pool):
            super().cancel(pool, *arguments, **options)

    def acknowledge(self) -> None:
        """Acknowledge the message; inside on_failure, when the failure is stored."""
        self._defer(self._acknowledge)

    def _acknowledge(self) -> None:
        if self._last_error and not self.acknowledged and self.deliveries.keeps_as_dead_letter(RETRIES):
            self.deliveries.reject(self.tag, RETRIES_EXHAUSTED, self._last_error, reported=True)
            self.acknowledged = True
            return
        super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        """Requeue the message or make it a dead letter; inside on_failure, when the failure is stored."""
        self._defer(partial(self._reject, requeue))

    def _reject(self, requeue: bool) -> None:
        if self.acknowledged:
            return
        if not requeue:
            self.deliveries.reject(self.tag, REJECTED, "rejected by its task", reported=True)
        elif worker_state.should_terminate is None and not self._lease_expired:
            if self._death:
                self.deliveries.record_crash(self.tag, self._death)
            else:
                self.deliveries.requeue_later(self.tag, self.id)
        # In a cold shutdown the message is requeued with all that this process has, and that does not count.
        super().reject(requeue)

    def _defer(self, settle: Callable[[], None]) -> None:
        if self._deferred is None:
            settle()
        else:
            self._deferred.append(settle)


def set_request_class(task: Task) -> None:
    """Make this the class of a task's requests; a class of the task's own gets it as a base."""
    own = symbol_by_name(task.Request)
    if own is celery_request.Request:
        task.Request = Request
    elif not issubclass(own, Request):
        task.Request = type(own.__name__, (own, Request), {"__module__": own.__module__})


def handle_thread_end(request: Any, future: Future[Any]) -> None:
    """Handle an error that has left the run of a request in a pool of threads."""
    if not future.cancelled() and (error := future.exception()):
        handle_escaped_error(request, error)


def handle_escaped_error(request: Any, error: BaseException) -> None:
    """Requeue a request whose run ended with an error that Celery does not handle: no result can be stored, say."""
    discard(request)
    if failures.is_cold_shutdown(error):
        request.deliveries.requeue([request.tag])
    elif not isinstance(error, TaskRevokedError):
        logger.error("%s[%s] ended with an error of Celery's own: %r", request.name, request.id, error)
        request.deliveries.record_crash(request.tag, repr(error))


def discard(request: Any) -> None:
    """Remove a request that will not run from Celery's sets of requests."""
    worker_state.task_ready(request)
