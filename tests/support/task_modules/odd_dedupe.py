"""Nodes that do not run a redelivered task again when it has succeeded."""

from __future__ import annotations

from celery import current_app

current_app.conf.worker_deduplicate_successful_tasks = True
