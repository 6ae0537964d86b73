"""A task fails with whatever it raises, in every pool alike: SystemExit, KeyboardInterrupt or CancelledError too.

Celery takes what is no Exception for the end of a process, and runs the task again (celery 5.7). A task that raises
WorkerShutdown or WorkerTerminate fails with it, and its node stops: requeued, it would stop one node after another.
"""

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
def _make_class(kind: type[BaseException]) -> type[Exception]:
    """An Exception with the name of a class that is none: errors are stored, logged and raised in clients by name."""

    def reduce(self: Exception) -> Any:
        return _make_exception, (kind, self.args)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce__": reduce, "kind": kind}
    return type(kind.__name__, (Exception,), names)


def _make_exception(kind: type[BaseException], arguments: tuple[Any, ...]) -> Exception:
    error: Exception = _make_class(kind)(*arguments)  # type: ignore[arg-type]  # a class is hashable
    return error


def convert_error(error: BaseException) -> Exception:
    """The error itself, or an Exception in its place where Celery would take it for the end of a process."""
    if isinstance(error, Exception) and not isinstance(error, MemoryError):
        return error
    arguments = error.args
    # Only arguments are stored: the text of a class with a __str__ of its own becomes one.
    with suppress(Exception):
        if (text := str(error)) != BaseException.__str__(error):
            arguments = (text,)
    return _make_exception(type(error), arguments).with_traceback(error.__traceback__)


def stop_node_for(error: BaseException) -> None:
    """Stop this node if the error of its task asks for it."""
    kind = getattr(error, "kind", type(error))
    if kind is WorkerShutdown:
        worker_state.should_stop = EX_OK
    elif kind is WorkerTerminate:
        worker_state.should_terminate = EX_FAILURE


def is_cold_shutdown(error: BaseException) -> bool:
    """Whether this ends a task's run in a cold shutdown (services/broker/retry.py), and is not the task's own error."""
    return isinstance(error, WorkerTerminate) and worker_state.should_terminate is not None


def unwrap_error(problem: ExceptionInfo) -> BaseException:
    """The error that a pool reports, without the traceback that a child has wrapped around it."""
    error: BaseException = problem.exception
    return error.exc if isinstance(error, ExceptionWithTraceback) else error


def wrap_tasks(tasks: Iterable[Any]) -> None:
    """Make these tasks fail with whatever they raise. Called like functions they raise it as it is."""
    for task in tasks:
        if not hasattr(task.run, "converts_errors"):
            task.run = _wrap(task, task.run)


def _wrap(task: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        try:
            return run(*arguments, **keywords)
        except Exception:
            raise
        except BaseException as error:
            # A signal that ends this child of a pool raises SystemExit.
            if is_cold_shutdown(error) or terminate_handler_fired() or task.request.called_directly:
                raise
            raise convert_error(error) from error.__cause__

    wrapper.converts_errors = True  # type: ignore[attr-defined]
    return wrapper


def run_in_node(run: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task in the node's own process; an error that leaves Celery's code is returned, as a child reports it."""
    try:
        return run(*arguments)
    except BaseException as error:  # hooks and receivers of signals run in there as well
        if is_cold_shutdown(error):
            raise
        return ExceptionInfo()
