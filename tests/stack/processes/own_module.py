"""A task module as a user adds one: copied into services/tasks/, and found there by itself. It tells what it sees."""

import os

from celery import shared_task

import config

WORD = "old"


@shared_task
def word() -> str:
    """Return what this module said when it was loaded."""
    return WORD


@shared_task
def variable(name: str) -> str:
    """Return a variable of .env.tasks."""
    return config.variable(name, "not set")


@shared_task
def secret(name: str) -> str:
    """Return a secret of .env.tasks, or of the file that it names."""
    return config.secret(name)


@shared_task
def names() -> list[str]:
    """Return the names of all variables that a task sees."""
    return sorted(os.environ)
