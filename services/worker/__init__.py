"""Celery's worker: consumer, request, shutdown, memory, heartbeat."""
