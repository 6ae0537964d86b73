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

import sys
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any
from urllib.parse import parse_qsl

import redis
from billiard.exceptions import SoftTimeLimitExceeded
from celery import bootsteps, states
from celery.backends import redis as stock
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from kombu.utils.encoding import bytes_to_str
from redis.exceptions import NoPermissionError

from config.redis_url import TLS_FILES
from services.broker import scripts
from services.broker.client import require_set
from services.broker.retry import (
    LONGEST_PAUSE_SECONDS,
    RetryState,
    ignore_soft_time_limit,
    is_retrying,
    retry_commands,
    run_with_retry,
)
from services.results.chord_deduplication import CHORD_END_SCRIPT, CHORD_PART_SCRIPT, dispatch_chord, run_key, set_run
from services.results.client import RetryingClient

logger = get_logger(__name__)

# States that end a run. A task that reports its progress is still running, and its soft time limit is its own.
ENDS = states.READY_STATES | {states.RETRY}
# As Celery's own for a producer, up to the longest pause.
PUBLISH_RETRY = {"interval_start": 0, "interval_step": 0.2, "interval_max": LONGEST_PAUSE_SECONDS}


class ResultsStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Bootstep that makes this process, and the children that it will have, a worker that waits for its results."""

    def create(self, worker: Any) -> None:
        RetryState.in_worker = True
        # What a task publishes, its own retry among it, waits as well: three tries would turn a retry into a FAILURE.
        worker.app.conf.task_publish_retry_policy = {**PUBLISH_RETRY, "max_retries": None}


class ResultStore:
    """Mixed into both of Celery's Redis backends."""

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
                self.client.run_once(scripts.STORE_RETRY, [self.get_key_for_task(task_id)], arguments)  # type: ignore[attr-defined]
            except NoPermissionError:
                # Here nobody may run scripts: in Celery's way, in two steps.
                super(ResultStore, self)._store_result(task_id, result, state, traceback, request, **options)  # type: ignore[misc]

        run_with_retry(attempt, lambda: self.client)  # type: ignore[attr-defined]
        return result

    def _get_result_meta(self, result: Any, state: str, traceback: Any, request: Any, **options: Any) -> Any:
        meta = super()._get_result_meta(result, state, traceback, request, **options)  # type: ignore[misc]
        if state in (states.FAILURE, states.REVOKED):
            # By this an earlier try knows that a later one has ended (lua/store_retry.lua).
            meta["retries"] = getattr(request, "retries", None) or 0
        return meta

    def on_chord_part_return(self, request: Any, state: str, result: Any, **options: Any) -> None:
        """Count a part of a chord, and send its body after the last one."""
        with (
            retry_commands(f"the chord's part of {_name(request)}[{request.id}]"),
            ignore_soft_time_limit(),
            dispatch_chord(),
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
        """Try as often as Celery does; once where the client retries, which has done so already."""
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
            set_run(run.decode())
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
        with dispatch_chord():
            return super().chord_error_from_stack(*arguments, **options)  # type: ignore[misc]


class ResultBackend(ResultStore, stock.RedisBackend):  # type: ignore[misc]
    """For redis://, rediss:// and redis+socket:// URLs."""


class SentinelResultBackend(ResultStore, stock.SentinelBackend):  # type: ignore[misc]
    """For sentinel:// URLs."""


# Celery looks a URL's scheme up here first, of redis+socket:// the part before the plus.
BACKENDS = {
    "redis": f"{__name__}:ResultBackend",
    "rediss": f"{__name__}:ResultBackend",
    "sentinel": f"{__name__}:SentinelResultBackend",
}


def _name(request: Any) -> str:
    return str(getattr(request, "task", None) or "task")
