"""A task fails with whatever ends it, in every pool alike: SystemExit, KeyboardInterrupt or asyncio.CancelledError too.

Celery takes what is no Exception for the end of a process: the task is run again (celery 5.7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any

from billiard.common import terminate_handler_fired
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import WorkerShutdown, WorkerTerminate

# By these Celery says that the node is to stop.
STOPS = (WorkerShutdown, WorkerTerminate)


@cache
def _class_for(kind: type[BaseException]) -> type[Exception]:
    """An Exception by the name of a class that is none: by its name it is stored, logged and told to clients."""

    def reduce(self: Exception) -> Any:
        return _failure, (kind, self.args)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce__": reduce}
    return type(kind.__name__, (Exception,), names)


def _failure(kind: type[BaseException], arguments: tuple[Any, ...]) -> Exception:
    made: Exception = _class_for(kind)(*arguments)  # type: ignore[arg-type]  # a class is hashable
    return made


def as_failure(error: BaseException) -> Exception:
    """The error itself, or what Celery can tell for a failure where it would take the error for a process's end."""
    if isinstance(error, Exception) and not isinstance(error, MemoryError):
        return error
    return _failure(type(error), error.args).with_traceback(error.__traceback__)


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
        except (Exception, *STOPS):
            raise
        except BaseException as error:
            # A signal that ends this child of a pool raises SystemExit.
            if terminate_handler_fired() or task.request.called_directly:
                raise
            raise as_failure(error) from None

    guarded.unguarded = run  # type: ignore[attr-defined]
    return guarded


def run_here(run: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task in the node's own process; an error that leaves Celery's code is returned, as a child reports it."""
    try:
        return run(*arguments)
    except STOPS:
        raise
    except BaseException:  # hooks and receivers of signals run in there as well
        return ExceptionInfo()
