"""Nodes that do not run a redelivered task again when it has succeeded."""

from celery import current_app

current_app.conf.worker_deduplicate_successful_tasks = True
