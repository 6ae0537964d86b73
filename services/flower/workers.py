"""What Flower knows of workers: it inspects new ones, and forgets those that have been offline for long."""

from math import inf
from time import monotonic
from typing import Any

from celery import Celery
from flower import inspector
from flower.options import options
from tornado.ioloop import IOLoop

from config.redis_url import mask_passwords
from services.flower.events import Events

# A worker that did not answer an inspection, busy with a solo task, is asked again after this.
INSPECT_AGAIN_SECONDS = 30.0


class Inspector(inspector.Inspector):  # type: ignore[misc]
    """Flower's inspector of workers; it masks the passwords that stock Celery workers report (celery 5.7)."""

    def __init__(self, io_loop: IOLoop, app: Celery, events: Events) -> None:
        super().__init__(io_loop, app, options.inspect_timeout / 1000)
        self._events = events
        self._asked: set[str] = set()
        self._next_inspection = -inf

    def _on_update(self, workername: str, method: str, response: Any) -> None:
        super()._on_update(workername, method, mask_passwords(response))

    def refresh(self) -> None:
        """Forget workers that have been offline for too long, and inspect new ones."""
        offline = self._events.find_offline(set(self.workers))
        self._events.forget(offline)
        for name in offline:
            self.workers.pop(name, None)
        self._asked &= set(self._events.last_seen)
        unknown = set(self._events.list_alive()) - set(self.workers)
        if unknown - self._asked or (unknown and monotonic() >= self._next_inspection):
            self._asked |= unknown
            self._next_inspection = monotonic() + INSPECT_AGAIN_SECONDS
            self.inspect()

    def count_consumers(self, queue: str) -> int | None:
        """Count the nodes that take tasks from `queue`; None until every node has reported its queues."""
        reported = [self.workers.get(name, {}).get("active_queues") for name in self._events.list_alive()]
        if None in reported:
            return None
        return sum(any(each["name"] == queue for each in queues) for queues in reported)
