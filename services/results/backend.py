"""Results: no message is acknowledged before its task's result is stored.

Celery tries once or for 20 s and gives up (celery 5.7, measured with a Redis that was killed, frozen or full): a
prefork node then acknowledges the message without a result, a threads node keeps message and thread for ever, a solo
node runs the task again and again. Inside a worker, whatever stores a result, or a chord's part of it, is repeated
here until Redis takes it; the acknowledgement comes after it, so a worker that dies or is stopped meanwhile gives the
task back. Everywhere else, and for everything else, such as `AsyncResult.get`, this backend is Celery's own.

A result that Redis refuses for what it is becomes a FAILURE with the reason, as with Celery. Limits: a prefork task
whose result has been waiting until its hard time limit ends as if it had run for so long, and a Redis that is so full
of results that nothing is left of its headroom (services/broker/headroom.py) takes none until some expire or
REDIS_MAXMEMORY is raised.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any
from urllib.parse import parse_qsl

import redis
from billiard.exceptions import SoftTimeLimitExceeded
from celery import bootsteps, states
from celery.app.task import Task
from celery.backends import redis as stock
from celery.utils.log import get_logger
from celery.worker import request as stock_request
from celery.worker import state as worker_state
from kombu.utils.encoding import bytes_to_str
from redis.client import Pipeline
from redis.exceptions import NoPermissionError

from config.redis_url import TLS_FILES
from services.broker import headroom, scripts
from services.broker.client import require_set
from services.broker.retry import (
    LONGEST_PAUSE_SECONDS,
    RetryState,
    ignore_soft_time_limit,
    is_retrying,
    retry_commands,
    run_with_retry,
)
from services.results.chord_dispatch import dispatching, this_run

logger = get_logger(__name__)

# States that end a run. A task that reports its progress is still running, and its soft time limit is its own.
ENDS = states.READY_STATES | {states.RETRY}
# As Celery's own for a producer, up to the longest pause.
PUBLISH_RETRY = {"interval_start": 0, "interval_step": 0.2, "interval_max": LONGEST_PAUSE_SECONDS}

# A complete chord is dispatched by every part that comes back and finds it so, the last one or one that is run again.
# With Celery's script only the first may, until its right to it expires: it may have died over it, or never have got
# the answer, and whoever comes meanwhile is acknowledged and never comes back (celery 5.7). That the body is enqueued
# once is seen to in services/results/chord_dispatch.py, under a name for this run of the chord, which lives until its
# end.
RIGHT = "redis.call('SET', ckey, claim_token, 'NX', 'EX', claim_expires)"
ANSWER = "return {readycount, totaldiff, size, claimed}"
RUN = """
if claimed == 0 then
    return {readycount, totaldiff, size, claimed, ''}
end
redis.call('SET', KEYS[7], claim_token, 'NX')
if expires > 0 then
    redis.call('EXPIRE', KEYS[7], expires)
end
return {readycount, totaldiff, size, claimed, redis.call('GET', KEYS[7])}
"""
CHORD_PART_SCRIPT = stock.CHORD_PART_RETURN_LUA.replace(RIGHT, RIGHT.replace("'NX', ", "")).replace(ANSWER, RUN)
END = "redis.call('DEL', jkey, tkey, skey, dkey)"
CHORD_END_SCRIPT = stock.CHORD_CLEANUP_LUA.replace(END, END.replace("dkey)", "dkey, KEYS[6])"))


class ResultsStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Bootstep that makes this process, and the children that it will have, a worker that waits for its results."""

    def create(self, worker: Any) -> None:
        RetryState.in_worker = True
        # What a task publishes, its own retry among it, waits as well: three tries would turn a retry into a FAILURE.
        worker.app.conf.task_publish_retry_policy = {**PUBLISH_RETRY, "max_retries": None}
        # On the class, because a task may have another base class than the application's.
        Task.Request = Request


class RetryingClient(headroom.Client):
    """A client that repeats a command while this thread has patience."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        return run_with_retry(partial(super().execute_command, *args, **options), lambda: self)

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        return RetryingTransaction(self.connection_pool, self.response_callbacks, transaction, shard_hint)

    def run(self, script: scripts.Script, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        return run_with_retry(partial(self.run_once, script, keys, arguments), lambda: self)

    def run_once(self, script: scripts.Script, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """Run a script without patience. Raises redis.exceptions.RedisError."""
        return super().run(script, keys, arguments)


class RetryingTransaction(headroom.Transaction):
    """The same for a transaction: all of it or nothing."""

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands = list(self.command_stack)

        def attempt() -> list[Any]:
            # A pipeline forgets its commands when it fails.
            self.command_stack = list(commands)
            return super(RetryingTransaction, self).execute(raise_on_error)

        return run_with_retry(attempt, lambda: self)


class Stored:
    """What both of Celery's Redis backends become."""

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **options: Any
    ) -> Any:
        """Store a state; in a worker, return when Redis has it.

        Raises, as Celery's does, for a result that cannot be stored, which becomes a FAILURE. A FAILURE that cannot
        be stored either is logged: raised, it would stop a node or make it run the task for ever.
        """
        store = partial(super().store_result, task_id, result, state, traceback, request, **options)  # type: ignore[misc]
        with retry_commands(f"{state} of {_name(request)}[{task_id}]"):
            while True:
                try:
                    return store()
                except SoftTimeLimitExceeded:
                    # The limit is for the task, and the task has ended.
                    if state not in ENDS:
                        raise
                except Exception as error:
                    stopping = worker_state.should_terminate is not None
                    if state not in states.EXCEPTION_STATES or stopping or not RetryState.in_worker:
                        raise
                    logger.critical("results: %s of %s can never be stored: %r", state, task_id, error)
                    return result

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **options: Any
    ) -> Any:
        if state != states.RETRY or request is None:
            return super()._store_result(task_id, result, state, traceback, request, **options)  # type: ignore[misc]
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        stored = self.encode(meta | {"task_id": bytes_to_str(task_id)})  # type: ignore[attr-defined]
        arguments = [stored, int(self.expires or 0), request.retries or 0]  # type: ignore[attr-defined]

        def attempt() -> None:
            try:
                self.client.run_once(scripts.RETRY, [self.get_key_for_task(task_id)], arguments)  # type: ignore[attr-defined]
            except NoPermissionError:
                # Here nobody may run scripts: in Celery's way, in two steps.
                super(Stored, self)._store_result(task_id, result, state, traceback, request, **options)  # type: ignore[misc]

        run_with_retry(attempt, lambda: self.client)  # type: ignore[attr-defined]
        return result

    def _get_result_meta(self, result: Any, state: str, traceback: Any, request: Any, **options: Any) -> Any:
        meta = super()._get_result_meta(result, state, traceback, request, **options)  # type: ignore[misc]
        if state in (states.FAILURE, states.REVOKED):
            # By this an earlier try knows that a later one has ended (lua/retry.lua).
            meta["retries"] = getattr(request, "retries", None) or 0
        return meta

    def on_chord_part_return(self, request: Any, state: str, result: Any, **options: Any) -> None:
        """Count a part of a chord, and send its body after the last one."""
        with (
            retry_commands(f"the chord's part of {_name(request)}[{request.id}]"),
            ignore_soft_time_limit(),
            dispatching(),
        ):
            super().on_chord_part_return(request, state, result, **options)  # type: ignore[misc]

    def apply_chord(self, *arguments: Any, **options: Any) -> None:
        """Save what a chord needs of its header; a chord that a task sends is part of it, and waits."""
        with retry_commands("a chord's header"):
            super().apply_chord(*arguments, **options)  # type: ignore[misc]

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Save how many parts a chord has; in a worker, return when Redis has it."""
        with retry_commands(f"the size of chord {group_id}"):
            super().set_chord_size(group_id, chord_size)  # type: ignore[misc]

    def ensure(self, fun: Callable[..., Any], args: Any, **policy: Any) -> Any:
        """Celery's own twenty tries; one where the client has patience, whose last word is the last."""
        if is_retrying():
            policy["max_retries"] = 0
        return super().ensure(fun, args, **policy)  # type: ignore[misc]

    def _params_from_url(self, url: str, defaults: dict[str, Any]) -> dict[str, Any]:
        parameters: dict[str, Any] = super()._params_from_url(url, defaults)  # type: ignore[misc]
        if url.startswith("rediss://"):
            # Celery decodes the paths once more, and finds no file with a percent sign in its name (celery 5.7).
            query = dict(parse_qsl(url.partition("?")[2]))
            parameters |= {name: query[name] for name in TLS_FILES if name in query}
        return parameters

    def _create_client(self, **options: Any) -> Any:
        if settings := getattr(self.app, "settings", None):  # type: ignore[attr-defined]
            require_set(self.app.conf.result_backend, settings)  # type: ignore[attr-defined]
        return super()._create_client(**options)  # type: ignore[misc]

    def _get_client(self) -> type[redis.Redis]:
        return RetryingClient

    @cached_property
    def _chord_part_return_script(self) -> Callable[..., Any]:
        script = self.client.register_script(CHORD_PART_SCRIPT)  # type: ignore[attr-defined]

        def count(keys: list[Any], **options: Any) -> Any:
            *answer, run = [*script(keys=[*keys, run_key(keys[0])], **options), b""][:5]
            this_run(run.decode())
            return answer

        return count

    @cached_property
    def _chord_cleanup_script(self) -> Callable[..., Any]:
        script = self.client.register_script(CHORD_END_SCRIPT)  # type: ignore[attr-defined]

        def end(keys: list[Any], **options: Any) -> Any:
            error = sys.exc_info()[1]
            if error is not None and not isinstance(error, Exception):
                # This process is stopped while the body waits: whoever runs the part again sends it. Celery would
                # delete the chord.
                return 1
            return script(keys=[*keys, run_key(keys[1])], **options)

        return end

    def chord_error_from_stack(self, *arguments: Any, **options: Any) -> Any:
        """Tell everybody who waits for a chord that it has failed; what that sends is no body."""
        with dispatching():
            return super().chord_error_from_stack(*arguments, **options)  # type: ignore[misc]


def run_key(results: bytes | str) -> str:
    """The key for the name of a chord's run, beside that of its parts' results."""
    return bytes_to_str(results).removesuffix(".j") + ".run"  # type: ignore[no-any-return]


class ResultBackend(Stored, stock.RedisBackend):  # type: ignore[misc]
    """For redis://, rediss:// and redis+socket:// URLs."""


class SentinelResultBackend(Stored, stock.SentinelBackend):  # type: ignore[misc]
    """For sentinel:// URLs."""


# Celery looks a URL's scheme up here first, of redis+socket:// the part before the plus.
BACKENDS = {
    "redis": f"{__name__}:ResultBackend",
    "rediss": f"{__name__}:ResultBackend",
    "sentinel": f"{__name__}:SentinelResultBackend",
}


class Request(stock_request.Request):  # type: ignore[misc]
    """A task in a node's hands, whose failure is acknowledged after it is stored.

    Celery's acknowledges first what a dead child leaves behind, and then stores the WorkerLostError (celery 5.7).
    """

    _held: list[Callable[[], None]] | None = None

    def _success_was_stored(self) -> Any:
        """What is stored of a success, if the task is at its end with that.

        A part of a chord is not: its child may have died before the chord had counted it, or before it had sent the
        body. It runs again; Celery would acknowledge it, and nobody would send the body (celery 5.7).
        """
        return False if self.chord else super()._success_was_stored()

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        held: list[Callable[[], None]] = []
        self._held = held
        try:
            return super().on_failure(exc_info, send_failed_event, return_ok)
        finally:
            self._held = None
            for end in held:
                end()

    def acknowledge(self) -> None:
        """Take the message off Redis, or do so at the end of on_failure."""
        self._end(super().acknowledge)

    def reject(self, requeue: bool = False) -> None:
        """Give the message back, or drop it; at the end of on_failure if that is what is going on."""
        self._end(partial(super().reject, requeue=requeue))

    def _end(self, end: Callable[[], None]) -> None:
        if self._held is None:
            end()
        else:
            self._held.append(end)


def _name(request: Any) -> str:
    return str(getattr(request, "task", None) or "task")
