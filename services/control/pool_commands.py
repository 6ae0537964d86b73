"""Remote control commands about pools and events, where Celery's own fail, do nothing, or leave no process."""

from typing import Any

from celery.worker import control as celery_control
from celery.worker.control import control_command

from services.pool import child_guard

# As for WORKER_CONCURRENCY: a mistyped number must not fill the machine with processes.
MAX_PROCESSES = 1000


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
    if refusal := _refuse(state, n):
        return refusal
    size = state.consumer.pool.num_processes
    if size + n > MAX_PROCESSES:
        how = f"grow it by less than {n}"
        return celery_control.nok(f"the pool has {size} of at most {MAX_PROCESSES} processes: {how}")
    return celery_control.pool_grow(state, n)


@control_command(args=[("n", int)], signature="[N=1]")  # type: ignore[untyped-decorator]
def pool_shrink(state: Any, n: int = 1, **_: Any) -> Any:
    """Shrink pool by n processes that run nothing; one stays."""
    if refusal := _refuse(state, n):
        return refusal
    size = state.consumer.pool.num_processes
    if n >= size:
        # A node without processes would keep for ever what it has taken from its queues.
        how = "shut the node down instead"
        return celery_control.nok(f"the pool has {size} process(es), of which one has to stay: {how}")
    try:
        return celery_control.pool_shrink(state, n)
    except ValueError:
        # Some processes may have ended all the same, and the node must not take tasks for those (celery 5.7).
        gone = size - state.consumer.pool.num_processes
        state.consumer._update_prefetch_count(-gone)
        return celery_control.nok(f"the pool has shrunk by {gone}: its other processes run tasks, so try again later")


@control_command(args=[("max", int), ("min", int)], signature="[max [min]]")  # type: ignore[untyped-decorator]
def autoscale(state: Any, max: int | None = None, min: int | None = None, **_: Any) -> Any:
    """Modify autoscale settings."""
    autoscaler = state.consumer.controller.autoscaler
    if not autoscaler:
        return celery_control.nok("this node does not autoscale: set WORKER_AUTOSCALE")
    highest = autoscaler.max_concurrency if max is None else max
    lowest = autoscaler.min_concurrency if min is None else min
    if not MAX_PROCESSES >= highest >= lowest >= 1:
        return celery_control.nok(f"max={highest} min={lowest} is no range of 1 to {MAX_PROCESSES} processes")
    return celery_control.autoscale(state, max, min)


@control_command()  # type: ignore[untyped-decorator]
def disable_events(state: Any, **_: Any) -> Any:
    """Tell worker(s) to stop sending task-related events."""
    dispatcher = state.consumer.event_dispatcher
    if dispatcher is not None and not dispatcher.groups:
        # An empty set means all groups, and Celery would find none to remove (celery 5.7).
        dispatcher.groups |= {"worker", "task"}
    return celery_control.disable_events(state)


def _refuse(state: Any, n: int) -> Any:
    """The error for a pool whose size cannot be changed by n; None where it can."""
    if not child_guard.forks(state.consumer.pool):
        return celery_control.nok("only a prefork pool grows and shrinks: set WORKER_CONCURRENCY or WORKER_PROCESSES")
    if state.consumer.controller.autoscaler:
        return celery_control.nok("this node autoscales: change its autoscale range instead")
    return None if n >= 1 else celery_control.nok(f"{n} is no number of processes: give 1 or more")
