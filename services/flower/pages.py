"""The pages and API routes that differ from Flower's own."""

from typing import Any

from flower import urls
from flower.api.control import ControlHandler, TaskTimout
from flower.api.tasks import GetQueueLengths
from flower.views.broker import BrokerView
from flower.views.tasks import TasksView, TaskView
from flower.views.workers import WorkerView
from redis.exceptions import RedisError
from tornado.escape import xhtml_escape
from tornado.httputil import HTTPServerRequest

from services.broker.client import connect
from services.broker.queue_lengths import known_queues, waiting
from services.flower.health import HealthcheckHandler

# Added to Flower's pages (flower 2.2). Nodes refuse "Restart Pool", and say what to do instead
# (services/control/pool_commands.py). Flower's read-only mode takes the buttons for limits and leaves their fields.
# Whole ids push the last columns of a task out of a laptop's window, and on a phone the names of a worker's settings
# and tasks push their values out.
STYLE = b"""<style>
#worker-pool-restart { display: none; }
.worker-limits-table:not(:has(button)) :is(th, td):not(:first-child) { display: none; }
@media (max-width: 1599.98px) {
  .task-uuid-full { display: none; }
  .task-uuid-short { display: inline; }
}
@media (max-width: 767.98px) {
  #tab-tasks .table:first-of-type { min-width: 0; }
  #tab-tasks .table:first-of-type td:first-child { overflow-wrap: anywhere; }
  #tab-config td:first-child { min-width: 9rem; overflow-wrap: anywhere; }
}
</style>
</head>"""


class QueueLengths:
    """Reads the lengths of queues over the connection that all of Stalk uses, in place of Flower's broker client.

    Flower's has no TLS options, no database on a socket, and one sentinel only (flower 2.2).
    """

    def __init__(self, server: Any) -> None:
        self._server = server

    async def queues(self, names: list[str]) -> list[dict[str, Any]]:
        """Return name and length of every queue on the broker, also of those that no worker takes from."""
        found: list[dict[str, Any]] = await self._server.blocking_runner.run(
            "broker.queues", self._server.broker_uri, self._read, names, connection_errors=(RedisError, OSError)
        )
        return found

    def _read(self, names: list[str]) -> list[dict[str, Any]]:
        settings = self._server.stack_settings
        with connect(settings.broker_url, settings, decode_responses=True) as client:
            everything = sorted({*names, *known_queues(client, self._server.capp)})
            return [{"name": name, "messages": count} for name, count in waiting(client, everything).items()]


class QueueTable(QueueLengths):
    """Adds the two columns that a phone shows, which Flower fills for RabbitMQ only (flower 2.2)."""

    async def queues(self, names: list[str]) -> list[dict[str, Any]]:
        # A node may have changed its queues. The answers take a second: the next request of this page shows them.
        self._server.update_workers()
        count = self._server.inspector.count_consumers
        return [
            queue | {"messages_ready": queue["messages"], "consumers": count(queue["name"])}
            for queue in await super().queues(names)
        ]


class BrokerHandler(BrokerView):  # type: ignore[misc]
    def get_broker(self) -> QueueLengths:
        return QueueTable(self.application)


class QueueLengthsHandler(GetQueueLengths):  # type: ignore[misc]
    def get_broker(self) -> QueueLengths:
        return QueueLengths(self.application)


class PageMixin:
    """Renders a page of Flower with STYLE, and in read-only mode for the read-only login."""

    request: HTTPServerRequest

    def render(self, *names: str, **values: Any) -> None:
        super().render(*names, **values | {"read_only": not self.request.user.can_write})  # type: ignore[misc]

    def render_string(self, template_name: str, **values: Any) -> bytes:
        page: bytes = super().render_string(template_name, **values)  # type: ignore[misc]
        return page.replace(b"</head>", STYLE)


class WorkerHandler(PageMixin, WorkerView):  # type: ignore[misc]
    """Flower's page of a worker."""


class TaskHandler(PageMixin, TaskView):  # type: ignore[misc]
    """Flower's page of a task."""


class TasksHandler(PageMixin, TasksView):  # type: ignore[misc]
    """Flower's page of all tasks."""


class ControlMixin:
    """Explains why a command failed when the worker has not answered; Flower says "Unknown reason" (flower 2.2)."""

    def error_reason(self, name: str, replies: Any) -> str:
        if replies:
            return str(super().error_reason(name, replies))  # type: ignore[misc]
        return "it has not answered, and may do it later: with a solo pool when its task has ended"


class TimeLimitHandler(ControlMixin, TaskTimout):  # type: ignore[misc]
    def write(self, chunk: Any) -> None:
        """Write an error as HTML for Flower's page, whose script shows no other here (flower 2.2)."""
        if self.get_status() >= 400 and "X-Requested-With" in self.request.headers:
            self.set_header("Content-Type", "text/html; charset=UTF-8")
            chunk = f"<p>{xhtml_escape(chunk)}</p>"
        super().write(chunk)


def build_handlers(prefix: str) -> list[Any]:
    """The routes that take precedence over Flower's, and its control routes with better error messages."""
    return [
        (f"{prefix}/healthcheck", HealthcheckHandler),
        (f"{prefix}/worker/(.+)", WorkerHandler),
        (f"{prefix}/task/(.+)", TaskHandler),
        (f"{prefix}/tasks", TasksHandler),
        (f"{prefix}/broker", BrokerHandler),
        (f"{prefix}/api/queues/length", QueueLengthsHandler),
        (f"{prefix}/api/task/timeout/(.+)", TimeLimitHandler),
        *(
            (prefix + pattern, type(handler.__name__, (ControlMixin, handler), {}))
            for pattern, handler, *_ in (route for route in urls.handlers if isinstance(route, tuple))
            if issubclass(handler, ControlHandler)
        ),
    ]
