"""Nodes that do not run again what was redelivered after it had succeeded."""

from __future__ import annotations

from celery import current_app

current_app.conf.worker_deduplicate_successful_tasks = True
