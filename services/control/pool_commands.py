"""Remote control of a node, where Celery's commands fail, do nothing, or leave a node that runs nothing."""

from __future__ import annotations

from typing import Any

from celery.worker import control as celery_control
from celery.worker.control import control_command

from services.pool import child_guard

# As WORKER_CONCURRENCY: a mistyped number must not fill the machine with processes.
MOST_PROCESSES = 1000


@control_command()  # type: ignore[untyped-decorator]
def pool_restart(state: Any, **_: Any) -> Any:
    """Refuse to restart the execution pool: `shutdown` ends the node in order, and its supervisor starts it again."""
    return celery_control.nok(
        "a pool is not restarted under its tasks: shut the node down ('Shut Down' in Flower, or celery control "
        "shutdown), and who started it, Supervisor in the stack, starts it again"
    )


@control_command(args=[("n", int)], signature="[N=1]")  # type: ignore[untyped-decorator]
def pool_grow(state: Any, n: int = 1, **_: Any) -> Any:
    """Grow pool by n processes."""
    return _refusal(state, n) or _above(state, n) or celery_control.pool_grow(state, n)


@control_command(args=[("n", int)], signature="[N=1]")  # type: ignore[untyped-decorator]
def pool_shrink(state: Any, n: int = 1, **_: Any) -> Any:
    """Shrink pool by n processes that run nothing; one stays."""
    return _refusal(state, n) or _below(state, n) or _shrink(state, n)


@control_command(args=[("max", int), ("min", int)], signature="[max [min]]")  # type: ignore[untyped-decorator]
def autoscale(state: Any, max: int | None = None, min: int | None = None, **_: Any) -> Any:
    """Modify autoscale settings."""
    autoscaler = state.consumer.controller.autoscaler
    if not autoscaler:
        return celery_control.nok("this node does not autoscale: set WORKER_AUTOSCALE")
    most = autoscaler.max_concurrency if max is None else max
    least = autoscaler.min_concurrency if min is None else min
    if not MOST_PROCESSES >= most >= least >= 1:
        return celery_control.nok(f"max={most} min={least} is no range of 1 to {MOST_PROCESSES} processes")
    return celery_control.autoscale(state, max, min)


@control_command()  # type: ignore[untyped-decorator]
def disable_events(state: Any, **_: Any) -> Any:
    """Tell worker(s) to stop sending task-related events."""
    dispatcher = state.consumer.event_dispatcher
    if dispatcher is not None and not dispatcher.groups:
        # No group is named, which means all of them; Celery would find none to take out (celery 5.7).
        dispatcher.groups |= {"worker", "task"}
    return celery_control.disable_events(state)


def _shrink(state: Any, n: int) -> Any:
    size = state.consumer.pool.num_processes
    try:
        return celery_control.pool_shrink(state, n)
    except ValueError:
        # Some may be gone all the same, and a node must not take tasks for those (celery 5.7).
        gone = size - state.consumer.pool.num_processes
        state.consumer._update_prefetch_count(-gone)
        return celery_control.nok(f"the pool has shrunk by {gone}: its other processes run tasks, so try again later")


def _refusal(state: Any, n: int) -> Any:
    """Why a pool has the size that it has; None where it can have another one."""
    if not child_guard.forks(state.consumer.pool):
        return celery_control.nok("only a prefork pool grows and shrinks: set WORKER_CONCURRENCY or WORKER_PROCESSES")
    if state.consumer.controller.autoscaler:
        return celery_control.nok("this node autoscales: change its autoscale range instead")
    return None if n >= 1 else celery_control.nok(f"{n} is no number of processes: give 1 or more")


def _above(state: Any, n: int) -> Any:
    size = state.consumer.pool.num_processes
    if size + n <= MOST_PROCESSES:
        return None
    return celery_control.nok(f"the pool has {size} of at most {MOST_PROCESSES} processes: grow it by less than {n}")


def _below(state: Any, n: int) -> Any:
    # Without any, the node would keep for ever what it has taken from its queues.
    size = state.consumer.pool.num_processes
    if n < size:
        return None
    return celery_control.nok(f"the pool has {size} process(es), of which one has to stay: shut the node down instead")
