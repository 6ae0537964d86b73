"""The task that does nothing but tell when it starts. Imports nothing of ours: it runs in nodes of every kind."""

import os
from threading import get_ident

from celery import shared_task

from benchmarks.cost.starts import recorder


@shared_task(name="cost.nothing")
def nothing() -> None:
    """Start and end."""
    recorder(os.getpid(), get_ident()).record()
