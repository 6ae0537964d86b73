"""A dead letter's task is told that it has failed, so that nobody waits for it in vain.

Errbacks run, a chord errs, the later links of a chain fail. It may happen twice when a process dies over it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from queue import Empty, SimpleQueue
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
from services.delivery import registry

logger = get_logger(__name__)

# Longer than telling takes, with Celery's patience for a result backend that is away; then somebody else does it.
TELLING_SECONDS = 60
# What a fork waits for whoever tells: a letter that takes longer waits for Redis, and nobody holds a lock over that.
FORK_SECONDS = 1.0
# What is raised while Redis is away; RuntimeError by Celery's result backend, when it gives up (celery 5.7).
AWAY = (OperationalError, BackendError, RedisError, OSError, RuntimeError)


class ForkGuard(threading.local):
    """Keeps the pool from forking while another thread tells of a dead letter, and is inside Celery for that.

    What is locked at that moment stays locked in the child, which has no thread to unlock it: kombu has a lock for each
    of its cached properties (kombu 5.7), and a child that needs one would wait until the hard time limit of its task.
    """

    lock = threading.Lock()
    # Whether this thread, which forks, has it.
    locked = False

    def begin(self) -> None:
        self.locked = ForkGuard.lock.acquire(timeout=FORK_SECONDS)

    def end(self) -> None:
        if self.locked:
            ForkGuard.lock.release()


def _renew() -> None:
    ForkGuard.lock = threading.Lock()


_guard = ForkGuard()
os.register_at_fork(before=_guard.begin, after_in_parent=_guard.end, after_in_child=_renew)


class DeadLetter(Exception):
    """A task will not run, or not again: its message is kept as dead letter `id`.

    Its arguments are reason, detail and id. A client that has no Stalk gets them in a class of the same name.
    """

    @property
    def reason(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        reason, detail, number = self.args
        return f"{reason}: {detail} (dead letter {number})"


class Teller:
    """Tells tasks that they have failed."""

    def __init__(self, app: Celery, client: Redis, hostname: str | None = None) -> None:
        self._app, self._client, self._hostname = app, client, hostname

    def tell(self, ids: Iterable[int]) -> None:
        """Store FAILURE for the tasks of these dead letters, as far as nobody else is about to.

        Raises one of AWAY; what was not told is told when it is asked for again.
        """
        numbers = list(ids)
        if not numbers:
            return
        taken = scripts.TAKE_UNREPORTED(self._client, [DEAD_LETTERS_UNTOLD], [DEAD_LETTER, TELLING_SECONDS, *numbers])
        letters = list(zip(*(taken[part::4] for part in range(4)), strict=True))
        for done, (number, raw, reason, detail) in enumerate(letters):
            try:
                # For each anew: many letters take longer than a fork waits.
                with ForkGuard.lock:
                    self._tell_one(int(number), raw, reason.decode(), detail.decode(errors="replace"))
            except AWAY:
                self._leave(int(number) for number, *_ in letters[done:])
                raise
            self._client.srem(DEAD_LETTERS_UNTOLD, int(number))

    def _leave(self, ids: Iterable[int]) -> None:
        """Let somebody else tell them."""
        with self._client.pipeline(transaction=False) as pipe:
            for number in ids:
                pipe.hdel(f"{DEAD_LETTER}{number}", "telling_since")
            pipe.execute()

    def _tell_one(self, number: int, raw: bytes, reason: str, detail: str) -> None:
        message = messages.parse(raw, self._app.conf.accept_content)
        logger.error("dead letter %d: %s[%s]: %s: %s", number, message.task, message.id, reason, detail)
        if not message.id:
            return
        try:
            self._fail(message, DeadLetter(reason, detail, number))
        except AWAY:
            raise
        except Exception:  # whatever options that somebody has sent make of Celery, again and again
            logger.exception("dead letter %d: those who wait for %s could not be told", number, message.id)

    def _fail(self, message: messages.TaskMessage, error: DeadLetter) -> None:
        task = self._app.tasks.get(message.task)
        backend = task.backend if task else self._app.backend
        if backend.get_state(message.id) == SUCCESS:
            # Another copy of it came to its end, and told everybody.
            return
        # Stored also for a task that ignores its result: the later links of its chain may be waited for.
        request = messages.build_context(message, hostname=self._hostname)
        backend.mark_as_failure(message.id, error, request=request, store_result=True)
        if self._app.conf.worker_send_task_events:
            with self._app.events.default_dispatcher(hostname=self._hostname) as dispatcher:
                dispatcher.send("task-failed", uuid=message.id, name=message.task, exception=repr(error))


class TellStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Bootstep that tells from a thread of its own: whoever parks a letter cannot wait for that."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        self._news: SimpleQueue[list[int]] = SimpleQueue()
        super().__init__(worker, **options)

    def start(self, worker: Any) -> None:
        client = connect(worker.app.settings.broker_url, worker.app.settings)
        teller = Teller(worker.app, client, worker.hostname)
        where = f"the results at {worker.app.settings.result_url.masked()}"
        threading.Thread(target=self._run, args=(teller, where), name="dead-letter-teller", daemon=True).start()
        registry.add_dead_letter_listener(self._news.put)

    def _run(self, teller: Teller, where: str) -> None:
        outage = Outage("dead letter", logger.warning)
        while True:
            ids = set(self._news.get())
            try:
                while True:
                    ids |= set(self._news.get_nowait())
            except Empty:
                pass
            try:
                teller.tell(sorted(ids))
            except AWAY as error:
                # The next sweep that sees them asks again.
                outage.record_failure(error, where, f"take that {len(ids)} tasks have failed")
            else:
                outage.record_recovery()
