"""A task fails with whatever ends it, in every pool alike: SystemExit, KeyboardInterrupt or asyncio.CancelledError too.

Celery takes what is no Exception for the end of a process: the task is run again (celery 5.7). A task that raises
WorkerShutdown or WorkerTerminate fails with it, and its node stops: given back, it would stop one node after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, wraps
from typing import Any

from billiard.common import terminate_handler_fired
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.platforms import EX_FAILURE, EX_OK
from celery.worker import state as worker_state


@cache
def _class_for(kind: type[BaseException]) -> type[Exception]:
    """An Exception by the name of a class that is none: by its name it is stored, logged and told to clients."""

    def reduce(self: Exception) -> Any:
        return _failure, (kind, self.args)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce__": reduce, "kind": kind}
    return type(kind.__name__, (Exception,), names)


def _failure(kind: type[BaseException], arguments: tuple[Any, ...]) -> Exception:
    made: Exception = _class_for(kind)(*arguments)  # type: ignore[arg-type]  # a class is hashable
    return made


def as_failure(error: BaseException) -> Exception:
    """The error itself, or what Celery can tell for a failure where it would take the error for a process's end."""
    if isinstance(error, Exception) and not isinstance(error, MemoryError):
        return error
    arguments = error.args
    # What its class says with other words would be lost: arguments are all that is stored.
    with suppress(Exception):
        if (text := str(error)) != BaseException.__str__(error):
            arguments = (text,)
    return _failure(type(error), arguments).with_traceback(error.__traceback__)


def stop_node_for(error: BaseException) -> None:
    """Stop the node whose task has asked for it."""
    kind = getattr(error, "kind", type(error))
    if kind is WorkerShutdown:
        worker_state.should_stop = EX_OK
    elif kind is WorkerTerminate:
        worker_state.should_terminate = EX_FAILURE


def is_stop(error: BaseException) -> bool:
    """Whether this is not the task's own, but ends its run in a cold shutdown (services/broker/retry.py)."""
    return isinstance(error, WorkerTerminate) and worker_state.should_terminate is not None


def error_of(problem: ExceptionInfo) -> BaseException:
    """The error that a pool reports, out of what a child has put around it."""
    error: BaseException = problem.exception
    return error.exc if isinstance(error, ExceptionWithTraceback) else error


def guard(tasks: Iterable[Any]) -> None:
    """Have these tasks fail with whatever they raise. Tasks that are called like functions raise it as it is."""
    for task in tasks:
        if not hasattr(task.run, "unguarded"):
            task.run = _guarded(task, task.run)


def _guarded(task: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def guarded(*arguments: Any, **keywords: Any) -> Any:
        try:
            return run(*arguments, **keywords)
        except Exception:
            raise
        except BaseException as error:
            # A signal that ends this child of a pool raises SystemExit.
            if is_stop(error) or terminate_handler_fired() or task.request.called_directly:
                raise
            raise as_failure(error) from error.__cause__

    guarded.unguarded = run  # type: ignore[attr-defined]
    return guarded


def run_here(run: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task in the node's own process; an error that leaves Celery's code is returned, as a child reports it."""
    try:
        return run(*arguments)
    except BaseException as error:  # hooks and receivers of signals run in there as well
        if is_stop(error):
            raise
        return ExceptionInfo()
