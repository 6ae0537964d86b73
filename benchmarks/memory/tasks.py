"""The task that benchmarks send, named by CELERY_IMPORTS."""

from celery import shared_task

NOOP = "benchmarks.noop"


@shared_task(name=NOOP)
def noop() -> int:
    """Do nothing, so that what is measured is the stack's own; return something, so that there is a result."""
    return 1
