"""Report the failure of a dead letter's task to whoever waits for it.

Its result is stored as FAILURE, its errbacks run, its chord and the later links of its chain fail. All that may happen
twice, when a process dies over it.
"""

import os
import threading
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any

from celery import Celery, bootsteps
from celery.exceptions import BackendError
from celery.states import SUCCESS
from celery.utils.log import get_logger
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError

from services.broker import messages, scripts
from services.broker.client import connect
from services.broker.keys import DEAD_LETTER, DEAD_LETTERS_UNTOLD
from services.broker.outages import Outage
from services.dead_letters import DeadLetter
from services.delivery import registry

logger = get_logger(__name__)

# Longer than a report takes, with Celery's retries while the result backend is away; then another process may do it.
REPORT_SECONDS = 60
# What a fork waits for a report: one that takes longer waits for Redis, and no lock is held over that.
FORK_SECONDS = 1.0
# What is raised while Redis is away; RuntimeError by Celery's result backend, when it gives up (celery 5.7).
UNAVAILABLE = (OperationalError, BackendError, RedisError, OSError, RuntimeError)


class ForkGuard(threading.local):
    """Keeps the pool from forking while another thread is inside Celery to report a failure.

    What is locked at that moment stays locked in the child, which has no thread to unlock it: kombu has a lock for each
    of its cached properties (kombu 5.7), and a child that needs one would wait until the hard time limit of its task.
    """

    lock = threading.Lock()
    # Whether this thread, which forks, has it.
    locked = False

    def acquire(self) -> None:
        self.locked = ForkGuard.lock.acquire(timeout=FORK_SECONDS)

    def release(self) -> None:
        if self.locked:
            ForkGuard.lock.release()

    def renew(self) -> None:
        ForkGuard.lock = threading.Lock()


_guard = ForkGuard()
os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_guard.renew)


class FailureReporter:
    """Stores FAILURE for the tasks of dead letters, as Celery does it for a task that has failed."""

    def __init__(self, app: Celery, client: Redis, hostname: str | None = None) -> None:
        self._app, self._client, self._hostname = app, client, hostname

    def report(self, ids: Iterable[int]) -> None:
        """Report the failure of these dead letters' tasks, but for those that another process is reporting.

        Raises one of UNAVAILABLE; what was not reported is reported when this is called with its id again.
        """
        numbers = list(ids)
        if not numbers:
            return
        taken = scripts.TAKE_UNREPORTED(self._client, [DEAD_LETTERS_UNTOLD], [DEAD_LETTER, REPORT_SECONDS, *numbers])
        letters = list(zip(*(taken[part::4] for part in range(4)), strict=True))
        for done, (number, raw, reason, detail) in enumerate(letters):
            try:
                # Taken for each letter anew: many take longer than a fork waits.
                with ForkGuard.lock:
                    self._report_one(raw, DeadLetter(reason.decode(), detail.decode(errors="replace"), int(number)))
            except UNAVAILABLE:
                self._give_up(int(number) for number, *_ in letters[done:])
                raise
            self._client.srem(DEAD_LETTERS_UNTOLD, int(number))

    def _give_up(self, ids: Iterable[int]) -> None:
        """Let another process report them at once."""
        with self._client.pipeline(transaction=False) as pipe:
            for number in ids:
                pipe.hdel(f"{DEAD_LETTER}{number}", "telling_since")
            pipe.execute()

    def _report_one(self, raw: bytes, error: DeadLetter) -> None:
        message = messages.parse(raw, self._app.conf.accept_content)
        reason, detail, number = error.args
        logger.error("dead letter %d: %s[%s]: %s: %s", number, message.task, message.id, reason, detail)
        if not message.id:
            return
        try:
            self._store_failure(message, error)
        except UNAVAILABLE:
            raise
        except Exception:  # Celery raises whatever the options of a sender lead to, each time again
            logger.exception("dead letter %d: the failure of %s could not be reported", number, message.id)

    def _store_failure(self, message: messages.TaskMessage, error: DeadLetter) -> None:
        task = self._app.tasks.get(message.task)
        backend = task.backend if task else self._app.backend
        if backend.get_state(message.id) == SUCCESS:
            # Another copy of the message was executed.
            return
        # Stored also for a task that ignores its result: the later links of its chain may be waited for.
        request = messages.build_context(message, hostname=self._hostname)
        backend.mark_as_failure(message.id, error, request=request, store_result=True)
        if self._app.conf.worker_send_task_events:
            with self._app.events.default_dispatcher(hostname=self._hostname) as dispatcher:
                dispatcher.send("task-failed", uuid=message.id, name=message.task, exception=repr(error))


class ReportFailuresStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Bootstep that reports from a thread of its own, because whoever parks a message cannot wait for a report."""

    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        client = connect(worker.app.settings.broker_url, worker.app.settings)
        reporter = FailureReporter(worker.app, client, worker.hostname)
        backend = f"the results at {worker.app.settings.result_url.mask()}"
        parked: SimpleQueue[list[int]] = SimpleQueue()
        arguments = (parked, reporter, backend)
        threading.Thread(target=_report_parked, args=arguments, name="dead-letter-reporter", daemon=True).start()
        registry.add_dead_letter_listener(parked.put)


def _report_parked(parked: SimpleQueue[list[int]], reporter: FailureReporter, backend: str) -> None:
    """Report what is parked, for ever."""
    outage = Outage("dead letter", logger.warning)
    while True:
        ids = set(parked.get())
        while not parked.empty():
            ids |= set(parked.get())
        try:
            reporter.report(sorted(ids))
        except UNAVAILABLE as error:
            # The next sweep that finds them unreported calls again.
            outage.record_failure(error, backend, f"take that {len(ids)} tasks have failed")
        else:
            outage.record_recovery()
