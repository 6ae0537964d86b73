"""The keeper: the thread that tells Redis what became of deliveries, renews leases, and sweeps those of the dead.

It has a connection of its own, so that neither a busy task nor a broken consumer keeps it from renewing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from celery.utils.log import get_logger
from redis import Redis, exceptions
from redis.exceptions import NoScriptError, RedisError

from services.broker import scripts
from services.broker.client import place
from services.broker.keys import DEAD, DEAD_LETTER, HELD, SCHEDULED, SCHEDULED_MESSAGES, scheduled_fields
from services.broker.outages import Outage
from services.delivery import sweeper
from services.delivery.start_marks import StartMarks
from services.delivery.unacked import Holder, Rejection, Work, clock

logger = get_logger(__name__)

Command = tuple[scripts.Script, Sequence[str], list[Any]]
News = tuple[scripts.Script, Sequence[str], list[Any], Work]

# While Redis is away: often enough to renew at once when it is back, too seldom to be a burden.
RETRY_SECONDS = 0.5
# How long the end of a process waits for Redis to take back what it held; a lease later others take it anyway.
CLOSE_SECONDS = 5.0
# A lease that ends now has ended a moment from now: one more look instead of two.
SLACK_SECONDS = 0.002
# There is no connection; everything else is an answer, and says nothing about the next command's.
AWAY = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)
# A task that asks to be run later waits twice as long each time: first as long as whoever has to give way needs, at
# last as seldom as costs nothing.
FIRST_REQUEUE_SECONDS = 0.1
LONGEST_REQUEUE_SECONDS = 60
# What lua/reject.lua answers when there are too many dead letters.
NOT_KEPT = -1


class Keeper:
    """Keeps the leases of one holder."""

    def __init__(self, holder: Holder, client: Redis, on_dead_letters: Callable[[list[int]], None]) -> None:
        self._holder, self._client = holder, client
        self._on_dead_letters = on_dead_letters
        self._steps = scripts.as_json(holder.rules.priority_steps)
        self._mark = StartMarks(client)
        holder.confirm, holder.mark_started, holder.prepare_marks = self._confirm, self._mark.send, self._prepare_marks
        # By `clock`: when leases are renewed, and when something is due before that.
        self._renew_at = self._sweep_at = clock()
        self._outage = Outage("lease", logger.warning)
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Tell Redis what there is to tell, and end. Waits for CLOSE_SECONDS at most."""
        with self._holder.changed:
            self._holder.closing = True
            self._holder.changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def _prepare_marks(self) -> None:
        """Connect for marks, if need be. Where that fails it is the thread that tries again, and complains."""
        with suppress(RedisError, OSError):
            self._mark.connect()

    # The thread.

    def _run(self) -> None:
        holder = self._holder
        while not (holder.closing and holder.idle):
            with holder.changed:
                while not self._due():
                    holder.changed.wait(self._patience())
            try:
                self._turn()
            except Exception as error:  # whatever it is: when this thread ends, so do all leases
                self._complain(error)
                self._pause()
            else:
                self._recovered()

    def _pause(self) -> None:
        """Before the next try. An end that begins meanwhile does not wait for that."""
        holder, closing = self._holder, self._holder.closing
        with holder.changed:
            holder.changed.wait_for(lambda: holder.closing != closing, RETRY_SECONDS)

    def _due(self) -> bool:
        if self._holder.closing and (self._holder.idle or self._holder.ack_due()):
            return True
        return self._holder.urgent or self._patience() <= 0

    def _patience(self) -> float:
        """Seconds until there is something to do."""
        ack = self._holder.ack_due()
        moments = [self._renew_at, self._sweep_at, *([] if ack is None else [ack])]
        return max(0.0, min(moments) - clock())

    def _turn(self) -> None:
        """Tell Redis everything that is due. What fails keeps nothing else from being told, least of all a renewal."""
        problems: list[Exception] = []
        try:
            self._mark.connect()
        except (RedisError, OSError) as error:
            # Redis may have no room for one connection more, and still hear what the other one says.
            problems.append(error)
        for step in (self._tell, self._renew_if_due, self._sweep_if_due):
            try:
                step()
            except AWAY:
                raise
            except Exception as error:
                problems.append(error)
        if problems:
            raise problems[0]

    def _tell(self) -> None:
        if work := self._holder.take_work():
            self._settle(work)

    def _renew_if_due(self) -> None:
        if clock() >= self._renew_at:
            self._renew()

    def _sweep_if_due(self) -> None:
        if clock() >= self._sweep_at:
            self._sweep()

    def _settle(self, work: Work) -> None:
        """Say what became of deliveries, in one round trip; what Redis refuses is said again."""
        news = self._news(work)
        try:
            answers = self._ask([(script, keys, arguments) for script, keys, arguments, _ in news])
        except BaseException:
            self._holder.unsettled(work)
            raise
        done, refused, letters, problem = Work(), Work(), [], None
        for answer, (_, _, _, part) in zip(answers, news, strict=True):
            if isinstance(answer, Exception):
                refused.add(part)
                problem = answer
                continue
            done.add(part)
            if part.requeues:
                letter, seconds = answer
                self._sweep_at = min(self._sweep_at, clock() + float(seconds) + SLACK_SECONDS)
                letters += [int(letter)] if letter else []
            elif answer == NOT_KEPT and part.rejections:
                self._say_not_kept(part.rejections[0])
            elif answer and (part.crashes or (part.rejections and not part.rejections[0].told)):
                letters.append(int(answer))
        self._holder.settled(done)
        self._holder.unsettled(refused)
        self._wake_for(done)
        if letters:
            self._tell_of(letters)
        if problem:
            raise problem

    def _wake_for(self, done: Work) -> None:
        """Sweep when the first of what was postponed is due."""
        if done.postponements:
            soonest = min(postponement.due for postponement in done.postponements)
            self._sweep_at = min(self._sweep_at, clock() + max(0.0, soonest - sweeper.unix_time()) + SLACK_SECONDS)

    def _news(self, work: Work) -> list[News]:
        """The commands for `work`, each with its part of it."""
        news: list[News] = []
        if work.acks:
            news.append((scripts.ACK, HELD, work.acks, Work(acks=work.acks)))
        if work.returns:
            # What was claimed first is taken first again.
            arguments: list[Any] = [self._steps, *reversed(work.returns)]
            news.append((scripts.RESTORE, HELD, arguments, Work(returns=work.returns)))
        most = self._holder.rules.max_deliveries
        for crash in work.crashes:
            arguments = [self._steps, most, DEAD_LETTER, crash.tag, _bytes(crash.detail)]
            news.append((scripts.CRASH, [*HELD, *DEAD], arguments, Work(crashes=[crash])))
        for asked in work.requeues:
            most_requeues, fields = self._holder.rules.max_requeues, scheduled_fields(asked.task_id)
            arguments = [most_requeues, DEAD_LETTER, asked.tag, FIRST_REQUEUE_SECONDS, LONGEST_REQUEUE_SECONDS, *fields]
            keys = [*HELD, *DEAD, SCHEDULED, SCHEDULED_MESSAGES]
            news.append((scripts.REQUEUE, keys, arguments, Work(requeues=[asked])))
        for one in work.rejections:
            most_letters = self._holder.rules.dead_letters_max
            arguments = [one.tag, one.reason, _bytes(one.detail), DEAD_LETTER, int(one.told), most_letters]
            news.append((scripts.REJECT, [*HELD, *DEAD], arguments, Work(rejections=[one])))
        for late in work.postponements:
            arguments = [late.tag, repr(late.due), _bytes(late.token), *scheduled_fields(late.task_id)]
            keys = [*HELD, SCHEDULED, SCHEDULED_MESSAGES]
            news.append((scripts.POSTPONE, keys, arguments, Work(postponements=[late])))
        return news

    def _ask(self, commands: list[Command]) -> list[Any]:
        """The answers, errors among them. Raises redis' ConnectionError and TimeoutError."""
        answers = self._send(commands)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            # Redis has been restarted, or its scripts flushed. Everything in here can be said twice.
            for script in scripts.ALL:
                self._client.script_load(script.text)
            answers = self._send(commands)
        return answers

    def _send(self, commands: list[Command]) -> list[Any]:
        pipe = self._client.pipeline(transaction=False)
        for script, keys, arguments in commands:
            pipe.evalsha(script.sha, len(keys), *keys, *arguments)
        return list(pipe.execute(raise_on_error=False))

    # Leases.

    def _renew(self) -> None:
        started, others = self._holder.leased()
        if started or others:
            self._ask_renewal(started, others)
        self._renew_at = clock() + self._holder.rules.renewal
        # Whoever renews sweeps as well: it leaves the mark that renewals have run unbroken.
        self._sweep_at = clock()

    def _ask_renewal(self, started: list[str], others: list[str]) -> None:
        tags, since = [*started, *others], clock()
        lost = scripts.RENEW(self._client, HELD, [self._holder.rules.lease, len(started), *tags])
        for held in self._holder.renewed(tags, map(bytes.decode, lost), since):
            if held.started:
                logger.warning("lease: %s was lost while its task runs; it may run again elsewhere", held.tag)
            else:
                logger.warning("lease: %s was lost before its task was started; it is not started", held.tag)

    def _confirm(self, tag: str) -> bool:
        """Whether Redis still has `tag` for us; also renews it."""
        try:
            self._ask_renewal([], [tag])
        except (RedisError, OSError):
            return False
        return self._holder.holds(tag)

    def _sweep(self) -> None:
        found = sweeper.sweep(self._client, self._holder.rules)
        sweeper.restore_overdue(self._client, found.stock, self._holder.rules.priority_steps)
        if found.restored:
            logger.warning("lease: %d tasks of workers that are gone go back to their queues", found.restored)
        if found.parked or found.untold:
            self._tell_of(sorted({*found.parked, *found.untold}))
        self._sweep_at = self._renew_at
        if found.next_in is not None:
            self._sweep_at = min(self._renew_at, clock() + found.next_in + SLACK_SECONDS)

    def _tell_of(self, letters: list[int]) -> None:
        """Have their tasks told; those that could not be told are found by the next sweep."""
        try:
            self._on_dead_letters(letters)
        except Exception:  # a listener's troubles, such as results that cannot be stored, are not this thread's
            logger.exception("lease: the tasks of the dead letters %s could not be told", letters)

    # What it says.

    def _complain(self, error: Exception) -> None:
        said = self._outage.goes_on(error, place(self._client), f"take acks and renewals ({len(self._holder)} held)")
        if said and not isinstance(error, RedisError | OSError):
            logger.error("lease: a mistake of ours or of a listener's; it is tried again", exc_info=error)

    def _say_not_kept(self, one: Rejection) -> None:
        logger.warning(
            "dead letter: a task that has failed is not kept, because there are %d (WORKER_DEAD_LETTERS_MAX): %s: %s",
            self._holder.rules.dead_letters_max,
            one.reason,
            one.detail,
        )

    def _recovered(self) -> None:
        if self._outage.over():
            self._renew_at = clock()


def _bytes(text: str) -> bytes:
    """What somebody wrote into a message: JSON can spell half a character, which UTF-8 cannot."""
    return text.encode(errors="backslashreplace")
