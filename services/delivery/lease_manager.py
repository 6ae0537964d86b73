"""The lease manager: the thread that renews leases, tells Redis what became of deliveries, and sweeps dead workers'.

It has a connection of its own, so that neither a busy task nor a broken consumer keeps it from renewing.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from celery.utils.log import get_logger
from redis import Redis
from redis.exceptions import NoScriptError, RedisError

from services.broker import scripts
from services.broker.client import UNREACHABLE, describe_server
from services.broker.keys import DEAD_LETTER, DEAD_LETTER_KEYS, SCHEDULED_KEYS, UNACKED_KEYS, get_scheduled_fields
from services.broker.outages import Outage
from services.delivery import sweeper
from services.delivery.unacked import PendingUpdates, Rejection, UnackedDeliveries, clock

logger = get_logger(__name__)

Command = tuple[scripts.Script, Sequence[str], list[Any]]

# While Redis is away: often enough to renew at once when it is back, too seldom to be a burden.
RETRY_SECONDS = 0.5
# How long the end of a process waits for Redis to take its deliveries back; a lease later others take them anyway.
CLOSE_SECONDS = 5.0
# A lease that ends now has ended a moment from now: one sweep instead of two.
SLACK_SECONDS = 0.002
# A task that asks to be run later waits twice as long each time: first as long as whoever has to give way needs, at
# last as seldom as costs nothing.
FIRST_REQUEUE_SECONDS = 0.1
LONGEST_REQUEUE_SECONDS = 60
# What lua/reject.lua returns when there are too many dead letters.
NOT_KEPT = -1


class LeaseManager:
    """Keeps the leases of the deliveries that this process has from one broker."""

    def __init__(
        self, deliveries: UnackedDeliveries, client: Redis, on_dead_letters: Callable[[list[int]], None]
    ) -> None:
        self._deliveries, self._client = deliveries, client
        self._on_dead_letters = on_dead_letters
        self._steps = scripts.as_json(deliveries.rules.priority_steps)
        # By `clock`: when leases are renewed, and when something is due before that.
        self._renew_at = self._sweep_at = clock()
        self._outage = Outage("lease", logger.warning)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it runs. It may have ended: a process can run one worker after the other."""
        self._deliveries.closing = False
        if self._thread is None or not self._thread.is_alive():
            self._renew_at = self._sweep_at = clock()
            self._thread = threading.Thread(target=self._run, name="lease-manager", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Tell Redis what there is to tell, and end the thread. Waits for CLOSE_SECONDS at most."""
        with self._deliveries.changed:
            self._deliveries.closing = True
            self._deliveries.changed.notify_all()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    # The thread.

    def _run(self) -> None:
        deliveries = self._deliveries
        while not (deliveries.closing and deliveries.is_idle):
            with deliveries.changed:
                while not self._is_due():
                    deliveries.changed.wait(self._seconds_until_due())
            try:
                self._do_what_is_due()
            except Exception as error:  # whatever it is: when this thread ends, so do all leases
                self._log_failure(error)
                self._pause()
            else:
                self._log_recovery()

    def _pause(self) -> None:
        """Wait before the next try, unless the process begins to end meanwhile."""
        deliveries, closing = self._deliveries, self._deliveries.closing
        with deliveries.changed:
            deliveries.changed.wait_for(lambda: deliveries.closing != closing, RETRY_SECONDS)

    def _is_due(self) -> bool:
        if self._deliveries.closing and (self._deliveries.is_idle or self._deliveries.ack_due()):
            return True
        return self._deliveries.is_urgent or self._seconds_until_due() <= 0

    def _seconds_until_due(self) -> float:
        ack = self._deliveries.ack_due()
        moments = [self._renew_at, self._sweep_at, *([] if ack is None else [ack])]
        return max(0.0, min(moments) - clock())

    def _do_what_is_due(self) -> None:
        """Send updates, renew, sweep. Where one of them fails the others are tried all the same, renewal above all."""
        problems: list[Exception] = []
        try:
            self._deliveries.leases.connect()
        except (RedisError, OSError) as error:
            # Redis may have no room for one connection more, and still serve the other one.
            problems.append(error)
        for step in (self._send_pending, self._renew_if_due, self._sweep_if_due):
            try:
                step()
            except UNREACHABLE:
                raise
            except Exception as error:
                problems.append(error)
        if problems:
            raise problems[0]

    def _renew_if_due(self) -> None:
        if clock() >= self._renew_at:
            self._deliveries.renew()
            self._renew_at = clock() + self._deliveries.rules.renewal
            # Whoever renews sweeps as well: a sweep leaves the mark that renewals have run unbroken.
            self._sweep_at = clock()

    def _sweep_if_due(self) -> None:
        if clock() >= self._sweep_at:
            self._sweep()

    # Updates.

    def _send_pending(self) -> None:
        if pending := self._deliveries.take_pending():
            self._send(pending)

    def _send(self, pending: PendingUpdates) -> None:
        """Tell Redis what became of deliveries, in one round trip; what it refuses is sent again."""
        commands = self._commands(pending)
        try:
            replies = self._run_scripts([command for command, _ in commands])
        except BaseException:
            self._deliveries.rollback(pending)
            raise
        done, refused, problem = PendingUpdates(), PendingUpdates(), None
        letters: list[int] = []
        for reply, (_, update) in zip(replies, commands, strict=True):
            if isinstance(reply, Exception):
                refused.add(update)
                problem = reply
            else:
                done.add(update)
                letters += self._read_reply(reply, update)
        self._deliveries.commit(done)
        self._deliveries.rollback(refused)
        if done.postponements:
            soonest = min(postponement.due for postponement in done.postponements)
            self._sweep_within(max(0.0, soonest - sweeper.unix_time()))
        if letters:
            self._report_dead_letters(letters)
        if problem:
            raise problem

    def _read_reply(self, reply: Any, update: PendingUpdates) -> list[int]:
        """The dead letters that came of an update and whose failure nobody has reported yet."""
        if update.later_requeues:
            letter, seconds = reply
            self._sweep_within(float(seconds))
            return [int(letter)] if letter else []
        if update.rejections and reply == NOT_KEPT:
            self._log_not_kept(update.rejections[0])
            return []
        unreported = update.crashes or (update.rejections and not update.rejections[0].reported)
        return [int(reply)] if reply and unreported else []

    def _sweep_within(self, seconds: float) -> None:
        self._sweep_at = min(self._sweep_at, clock() + seconds + SLACK_SECONDS)

    def _commands(self, pending: PendingUpdates) -> list[tuple[Command, PendingUpdates]]:
        """The commands for `pending`, each with its part of it."""
        commands: list[tuple[Command, PendingUpdates]] = []
        rules, with_dead_letters = self._deliveries.rules, [*UNACKED_KEYS, *DEAD_LETTER_KEYS]
        if pending.acks:
            commands.append(((scripts.ACK, UNACKED_KEYS, pending.acks), PendingUpdates(acks=pending.acks)))
        if pending.requeues:
            # What was claimed first is taken first again.
            arguments: list[Any] = [self._steps, *reversed(pending.requeues)]
            commands.append(((scripts.REQUEUE, UNACKED_KEYS, arguments), PendingUpdates(requeues=pending.requeues)))
        for crash in pending.crashes:
            arguments = [self._steps, rules.max_deliveries, DEAD_LETTER, crash.tag, _encode(crash.detail)]
            commands.append(((scripts.CRASH, with_dead_letters, arguments), PendingUpdates(crashes=[crash])))
        for later in pending.later_requeues:
            waits = FIRST_REQUEUE_SECONDS, LONGEST_REQUEUE_SECONDS
            arguments = [rules.max_requeues, DEAD_LETTER, later.tag, *waits, *get_scheduled_fields(later.task_id)]
            keys = [*with_dead_letters, *SCHEDULED_KEYS]
            commands.append(((scripts.REQUEUE_LATER, keys, arguments), PendingUpdates(later_requeues=[later])))
        for one in pending.rejections:
            detail = _encode(one.detail)
            arguments = [one.tag, one.reason, detail, DEAD_LETTER, int(one.reported), rules.dead_letters_max]
            commands.append(((scripts.REJECT, with_dead_letters, arguments), PendingUpdates(rejections=[one])))
        for late in pending.postponements:
            arguments = [late.tag, repr(late.due), _encode(late.token), *get_scheduled_fields(late.task_id)]
            keys = [*UNACKED_KEYS, *SCHEDULED_KEYS]
            commands.append(((scripts.POSTPONE, keys, arguments), PendingUpdates(postponements=[late])))
        return commands

    def _run_scripts(self, commands: list[Command]) -> list[Any]:
        """The replies, errors among them. Raises redis' ConnectionError and TimeoutError."""
        replies = self._run_pipeline(commands)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            # Redis was restarted, or its scripts were flushed. All updates are idempotent.
            for script in scripts.ALL:
                self._client.script_load(script.text)
            replies = self._run_pipeline(commands)
        return replies

    def _run_pipeline(self, commands: list[Command]) -> list[Any]:
        pipe = self._client.pipeline(transaction=False)
        for script, keys, arguments in commands:
            pipe.evalsha(script.sha, len(keys), *keys, *arguments)
        return list(pipe.execute(raise_on_error=False))

    # Deliveries of dead workers.

    def _sweep(self) -> None:
        found = sweeper.sweep(self._client, self._deliveries.rules)
        sweeper.requeue_overdue(self._client, found.stock, self._deliveries.rules.priority_steps)
        if found.requeued:
            logger.warning("lease: %d tasks of workers that are gone go back to their queues", found.requeued)
        if found.dead_letters or found.unreported:
            self._report_dead_letters(sorted({*found.dead_letters, *found.unreported}))
        self._sweep_at = self._renew_at
        if found.next_in is not None:
            self._sweep_within(found.next_in)

    def _report_dead_letters(self, letters: list[int]) -> None:
        """Have the failure of their tasks reported; where that fails, the next sweep finds them again."""
        try:
            self._on_dead_letters(letters)
        except Exception:  # a listener's error must not end this thread
            logger.exception("lease: the failures of the tasks of dead letters %s cannot be reported", letters)

    # Log lines.

    def _log_failure(self, error: Exception) -> None:
        purpose = f"take acks and renewals ({len(self._deliveries)} held)"
        logged = self._outage.record_failure(error, describe_server(self._client), purpose)
        if logged and not isinstance(error, RedisError | OSError):
            logger.error("lease: an unexpected error; it is tried again", exc_info=error)

    def _log_not_kept(self, one: Rejection) -> None:
        logger.warning(
            "dead letter: a task that has failed is not kept, because there are %d (WORKER_DEAD_LETTERS_MAX): %s: %s",
            self._deliveries.rules.dead_letters_max,
            one.reason,
            one.detail,
        )

    def _log_recovery(self) -> None:
        if self._outage.record_recovery():
            self._renew_at = clock()


def _encode(text: str) -> bytes:
    """Text out of a message as bytes: JSON can spell half a character, which UTF-8 cannot."""
    return text.encode(errors="backslashreplace")
