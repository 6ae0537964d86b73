"""Flower as we serve it: nobody comes in without a login, a true health check, state that survives a kill.

Flower stays Flower: this module subclasses it and gives it options. What its own start-up reads (the FLOWER_*
variables, the command line, flowerconfig.py) is never run, so only the validated settings count.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import pickle
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from math import inf
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from celery import Celery
from celery.events import EventReceiver
from flower import events, inspector, urls
from flower.api.control import ControlHandler
from flower.api.tasks import GetQueueLengths
from flower.app import Flower
from flower.options import options
from flower.views.broker import BrokerView
from flower.views.tasks import TaskView
from flower.views.workers import WorkerView
from redis.exceptions import RedisError
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.ioloop import IOLoop, PeriodicCallback
from tornado.simple_httpclient import SimpleAsyncHTTPClient
from tornado.web import OutputTransform, RedirectHandler, RequestHandler, StaticFileHandler, stream_request_body

from config import ConfigError, Settings
from config.redis_url import mask_passwords
from services.broker.client import connect
from services.broker.outages import Outage
from services.broker.queue_lengths import known_queues, waiting
from services.flower.logins import Door, Refusal

logger = logging.getLogger(__name__)

# Silence after which Redis is sent a PING, and how many may stay without answer before the connection is given up.
PING_SECONDS = 2
MISSED_PINGS = 5
# Younger than this, the last sign of life makes the health check say OK.
HEARD_WITHIN_SECONDS = 5.0
RECONNECT_SECONDS = 2.0
# Events that wait for Flower's loop. When it cannot follow, the receiver stops reading and Redis drops the
# connection at its client-output-buffer-limit: events are lost, memory is not.
MAX_WAITING_EVENTS = 10_000
TIDY_SECONDS = 5.0
# A worker that did not answer an inspection, busy with a solo task, is asked again after this.
INSPECT_AGAIN_SECONDS = 30.0
BEAT_SECONDS = 5.0
# No other site may show Flower in a frame and have a stop button clicked unseen, and nothing that a task's name or
# arguments smuggle into a page can load from, or tell, another host. Flower's own pages have scripts and styles
# inside, hence 'unsafe-inline'.
HEADERS = {
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
}
STATIC = Path(urls.settings["static_path"]).resolve()
# Nodes refuse "Restart Pool", and say what to do instead (services/control/pool_commands.py). Who may not change limits
# is still shown the fields for them (flower 2.2).
# Flower shortens ids below 768 pixels only, and whole ones push a task's worker out of a laptop's window. On a phone
# the names of a worker's settings and tasks push their values out (flower 2.2).
STYLE = b"""
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
"""
# The button for time limits takes a node's refusal for HTML, fails over it, and nobody sees anything (flower 2.2).
UNSEEN, SEEN = b"$(data.responseText).text()", b"data.responseText"


def serve(
    app: Celery,
    settings: Settings,
    *,
    address: str = "0.0.0.0",  # noqa: S104 - the container's border is the border
    port: int = 8080,
    database: str = "/var/lib/flower/flower.db",
    heartbeat: Callable[[], None] | None = None,
) -> None:
    """Serve Flower on `address` and `port` until SIGTERM or SIGINT.

    `app` comes from services.app.create_app, and is Flower's alone from here on: it is given transport options
    of its own. What Flower knows is kept in the file `database`. `heartbeat` is called every few seconds while
    Flower answers HTTP requests, whether Redis is there or not.

    Raises ConfigError when there is no login, or the port or the database cannot be used.
    """
    if not settings.flower.basic_auth.get_secret_value():
        raise ConfigError(
            ["FLOWER_BASIC_AUTH is not set: set it to user:password, because whoever sees Flower can stop workers"]
        )
    check_writable(Path(database))
    set_up_logging(settings.tasks.log_level)
    app.conf.broker_transport_options = own_transport_options(app)
    app.set_default()
    server = Server(app, settings, set_options(settings, address, port, database))
    server.listen(port)
    server.run(address, port, heartbeat)


def own_transport_options(app: Celery) -> dict[str, Any]:
    """Transport options for a consumer that notices a silent Redis."""
    return {**app.conf.broker_transport_options, "health_check_interval": PING_SECONDS}


def set_options(settings: Settings, address: str, port: int, database: str) -> str:
    """Set every option of Flower's that we do not leave at its default, and return Flower's inner login.

    Flower compares logins as text and refuses those that are not ASCII (flower 2.2). It gets a random one, which
    `Server` puts into the requests that have come in.
    """
    inner = f"flower:{secrets.token_urlsafe(32)}"
    options.basic_auth = [inner]
    options.address, options.port = address.strip("[]"), port
    options.url_prefix = settings.flower.url_prefix
    options.persistent, options.db = True, database
    options.state_save_interval = settings.flower.save_every * 1000
    # Flower's own order begins with the name, which fills a phone and hides the state and the way to the task.
    options.tasks_columns = "state,uuid,name,received,runtime,worker"
    options.max_tasks = settings.flower.max_tasks
    options.max_workers = settings.flower.max_workers
    options.purge_offline_workers = settings.flower.offline_after
    return inner


def set_up_logging(level: str) -> None:
    """Log to standard error, unless the caller has set up logging already."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(processName)s %(message)s")
    # Where its connection comes and goes, the outage has lines of its own.
    logging.getLogger("kombu.mixins").setLevel(logging.WARNING)
    # The pages ask every second: a line for each request would drown the rest.
    logging.getLogger("tornado.access").setLevel(logging.DEBUG if level == "debug" else logging.WARNING)


def stop_on_signals(loop: asyncio.AbstractEventLoop) -> None:
    """Leave the loop on SIGTERM and SIGINT; one that comes before it runs ends it at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, loop.stop)


def host_to_ask(address: str) -> str:
    """The host of a URL that reaches what listens on `address` of this machine."""
    bare = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.strip("[]"), address.strip("[]"))  # noqa: S104
    return f"[{bare}]" if ":" in bare else bare


def check_writable(database: Path) -> None:
    """Raise ConfigError when `database` could not be saved."""
    try:
        write(temporary(database), b"")
        temporary(database).unlink()
    except OSError as error:
        raise ConfigError(
            [f"{database}: Flower cannot write there ({error.strerror}); make its directory writable for this user"]
        ) from None


def temporary(database: Path) -> Path:
    """Where the state is written before it takes the place of the last one."""
    return database.with_name(f"{database.name}.new")


def write(path: Path, content: bytes) -> None:
    """Write to the disk itself, for the owner's eyes only: task arguments are nobody else's business."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@stream_request_body
class Refused(RequestHandler):  # type: ignore[misc]
    """The answer to everybody who is not let in, given before a request's body is read."""

    def initialize(self, refusal: Refusal) -> None:
        self._refusal = refusal

    def prepare(self) -> None:
        self.set_status(self._refusal.status)
        if self._refusal.status == 401:
            # Without the charset browsers may send a password that is not ASCII in another encoding.
            self.set_header("WWW-Authenticate", 'Basic realm="Flower", charset="UTF-8"')
        self.finish(f"{self._refusal.sentence}\n")

    def data_received(self, chunk: bytes) -> None:
        """Drop what is still on its way."""

    def check_xsrf_cookie(self) -> None:
        """There is nothing to forge yet."""


class Healthcheck(RequestHandler):  # type: ignore[misc]
    """OK while events can arrive; costs no connection."""

    application: Server

    def get(self) -> None:
        if self.application.events.hears_redis:
            self.write("OK")
        else:
            self.set_status(503)
            self.write("Flower receives no events: Redis does not answer.\n")

    head = get


class QueueLengths:
    """What Flower calls a broker: queue lengths, read over the connection that the project itself uses.

    Flower's own has no TLS options, no database on a socket, and one sentinel only (flower 2.2).
    """

    def __init__(self, server: Server) -> None:
        self._server = server

    async def queues(self, names: list[str]) -> list[dict[str, Any]]:
        """Name and length of every queue on the broker: a queue that no worker takes from fills up unseen."""
        found: list[dict[str, Any]] = await self._server.blocking_runner.run(
            "broker.queues", self._server.broker_uri, self._read, names, connection_errors=(RedisError, OSError)
        )
        return found

    def _read(self, names: list[str]) -> list[dict[str, Any]]:
        settings = self._server.stack
        with connect(settings.broker_url, settings, decode_responses=True) as client:
            everything = sorted({*names, *known_queues(client, self._server.capp)})
            return [{"name": name, "messages": count} for name, count in waiting(client, everything).items()]


class QueueTable(QueueLengths):
    """Queue lengths with the two columns that are left on a phone; Flower fills them for RabbitMQ (flower 2.2)."""

    async def queues(self, names: list[str]) -> list[dict[str, Any]]:
        # Nodes change their queues unasked. Their answers take a second, so the next look has them.
        self._server.update_workers()
        return [
            queue | {"messages_ready": queue["messages"], "consumers": self._server.consumers(queue["name"])}
            for queue in await super().queues(names)
        ]


class BrokerPage(BrokerView):  # type: ignore[misc]
    def get_broker(self) -> QueueLengths:
        return QueueTable(self.application)


class QueueLengthsApi(GetQueueLengths):  # type: ignore[misc]
    def get_broker(self) -> QueueLengths:
        return QueueLengths(self.application)


class WithoutButtons:
    """A page that shows buttons only to those whose requests they send are not refused."""

    request: HTTPServerRequest

    def render(self, *names: str, **values: Any) -> None:
        super().render(*names, **values | {"read_only": not self.request.visitor.may_act})  # type: ignore[misc]


class WorkerPage(WithoutButtons, WorkerView):  # type: ignore[misc]
    """Flower's page of a worker."""


class TaskPage(WithoutButtons, TaskView):  # type: ignore[misc]
    """Flower's page of a task."""


class SaysWhy:
    """What asks a worker to do something: one that has not answered yet has given no reason (flower 2.2)."""

    def error_reason(self, name: str, answers: Any) -> str:
        if answers:
            return str(super().error_reason(name, answers))  # type: ignore[misc]
        return "it has not answered, and may do it later: with a solo pool when its task has ended"


def pages(prefix: str) -> list[Any]:
    """The pages that take the place of Flower's, and whatever of its own asks a worker to do something."""
    return [
        (f"{prefix}/healthcheck", Healthcheck),
        (f"{prefix}/worker/(.+)", WorkerPage),
        (f"{prefix}/task/(.+)", TaskPage),
        (f"{prefix}/broker", BrokerPage),
        (f"{prefix}/api/queues/length", QueueLengthsApi),
        *(
            (prefix + pattern, type(handler.__name__, (SaysWhy, handler), {}))
            for pattern, handler, *_ in (route for route in urls.handlers if isinstance(route, tuple))
            if issubclass(handler, ControlHandler)
        ),
    ]


@cache
def changed_files() -> dict[Path, bytes]:
    """Those of Flower's files that we change."""
    style, script = STATIC / "css" / "flower.css", STATIC / "js" / "flower.js"
    return {style: style.read_bytes() + STYLE, script: script.read_bytes().replace(UNSEEN, SEEN)}


class StaticFiles(StaticFileHandler):  # type: ignore[misc]
    """Flower's files, some of them changed."""

    @classmethod
    def get_content(cls, abspath: str, start: int | None = None, end: int | None = None) -> Any:
        changed = changed_files().get(Path(abspath).resolve())
        return super().get_content(abspath, start, end) if changed is None else changed[start:end]

    def get_content_size(self) -> int:
        changed = changed_files().get(Path(self.absolute_path).resolve())
        return int(super().get_content_size()) if changed is None else len(changed)


class SafeHeaders(OutputTransform):  # type: ignore[misc]
    """Puts HEADERS on every answer, whichever handler gives it."""

    def transform_first_chunk(
        self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, HTTPHeaders, bytes]:
        headers.update(HEADERS)
        return status_code, headers, chunk


class DaemonThreads(ThreadPoolExecutor):
    """A daemon thread for each call, because one that waits for Redis must not keep the process from leaving.

    Flower itself bounds how many run at the same time.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing to wait for."""


class Receiver(EventReceiver):  # type: ignore[misc]
    """Captures events, and notices when Redis falls silent: kombu looks only with an event loop (kombu 5.7)."""

    heard = -inf
    _next_ping = 0.0
    _pubsub: Any = None

    @contextmanager
    def establish_connection(self) -> Iterator[Any]:
        # ConsumerMixin would open a second connection, and try for ever.
        yield self.connection

    def on_consume_ready(self, connection: Any, channel: Any, consumers: Any, **kwargs: Any) -> None:
        super().on_consume_ready(connection, channel, consumers, **kwargs)
        self._pubsub = channel.subclient

    def on_iteration(self) -> None:
        """Called after each event, and every second without one."""
        now = monotonic()
        if not self._pubsub.subscribed:
            return
        if now >= self._next_ping:
            self._next_ping = now + PING_SECONDS
            if self._pubsub.health_check_response_counter >= MISSED_PINGS:
                raise ConnectionError(f"no answer for {PING_SECONDS * MISSED_PINGS} s")
            self._pubsub.check_health()
        if not self._pubsub.health_check_response_counter:
            self.heard = now


class Events(events.Events):  # type: ignore[misc]
    """The thread that receives events, and the state that they make."""

    def __init__(self, capp: Celery, io_loop: IOLoop, broker: str = "") -> None:
        self._file = Path(options.db)
        self._receiver: Receiver | None = None
        self._outage = Outage("events", logger.warning)
        self._where = f"Redis at {broker}"
        self._room = threading.BoundedSemaphore(MAX_WAITING_EVENTS)
        self._unsaved = False
        self._slow = False
        # When each worker, and each process that sends tasks, was last heard.
        self.seen: dict[str, float] = {}
        super().__init__(
            capp,
            io_loop,
            db=options.db,
            persistent=options.persistent,
            state_save_interval=options.state_save_interval,
            enable_events=options.enable_events,
            max_tasks_in_memory=options.max_tasks,
            max_workers_in_memory=options.max_workers,
        )
        # Flower renews only the limit on tasks in a state that it has read back (flower 2.2).
        self.state.max_workers_in_memory = self.state.workers.limit = options.max_workers
        self.state.workers.update()

    @property
    def hears_redis(self) -> bool:
        """Whether events can arrive now."""
        receiver = self._receiver
        return receiver is not None and monotonic() - receiver.heard < HEARD_WITHIN_SECONDS

    def run(self) -> None:
        """Receive events for ever; Flower's own loop waits twice as long after each failure, without end."""
        while True:
            try:
                self._receive()
            except Exception as error:
                self._outage.record_failure(error, self._where, "send events, which are missed until then")
            self._receiver = None
            sleep(RECONNECT_SECONDS)

    def _receive(self) -> None:
        with self.capp.connection_for_read() as connection:
            connection.connect()
            self._outage.record_recovery()
            self._receiver = Receiver(connection, handlers={"*": self.on_event}, app=self.capp)
            self._receiver.capture(limit=None, timeout=None, wakeup=True)

    def on_event(self, event: dict[str, Any]) -> None:
        self._room.acquire()
        self.io_loop.add_callback(self._take, event)

    def _take(self, event: dict[str, Any]) -> None:
        self._room.release()
        self._unsaved = self._unsaved or event["type"] != "worker-heartbeat"
        self.seen[event["hostname"]] = monotonic()
        self.state.event(event)

    def gone(self, inspected: set[str]) -> set[str]:
        """The names to forget: silent for too long, and the most silent where there are too many."""
        now, state = monotonic(), self.state
        # Of those that an earlier Flower has known the last heartbeat tells who is more silent.
        for name in sorted({*state.workers, *state.counter, *inspected}, key=self.last_heartbeat):
            self.seen.setdefault(name, now)
        silent = sorted(self.seen, key=self.seen.__getitem__)
        excess = set(silent[: max(0, len(silent) - options.max_workers)])
        late = {name for name in silent if now - self.seen[name] >= options.purge_offline_workers}
        return {name for name in excess | late if not self.is_worker_alive(name)}

    def last_heartbeat(self, name: str) -> float:
        """When a worker said so, in its own time; 0 when nothing is known of it."""
        worker = self.state.workers.data.get(name)
        return max(worker.heartbeats, default=0.0) if worker else 0.0

    def is_worker_alive(self, name: str) -> bool:
        worker = self.state.workers.data.get(name)
        return worker is not None and bool(worker.alive)

    def forget(self, names: set[str]) -> None:
        """Remove every trace of `names`, apart from the tasks that they ran."""
        state = self.state
        for name in names:
            for place in (self.seen, state.workers, state.counter):
                place.pop(name, None)
            if name in state.tasks_by_worker and not state.tasks_by_worker[name]:
                del state.tasks_by_worker[name]
        state.metrics.remove_workers(names)

    def load_state(self) -> events.EventsState | None:
        """What the last Flower knew, or None; an unreadable file is moved aside."""
        try:
            state, counter = pickle.loads(self._file.read_bytes())  # noqa: S301 - our own file
            state.counter.update(counter)
            return state
        except FileNotFoundError:
            return None
        except Exception as error:
            aside = self._file.replace(f"{self._file}.unreadable")
            logger.error("%s cannot be read (%r): starting empty, the file is now %s", self._file, error, aside)
            return None

    def save_state(self) -> None:
        """Write what is new, whole or not at all: Flower's own leaves parts behind when it is killed."""
        if not self._unsaved:
            return
        started = monotonic()
        try:
            write(temporary(self._file), pickle.dumps((self.state, dict(self.state.counter))))
            temporary(self._file).replace(self._file)
            self._unsaved = False
        except Exception as error:
            logger.error("%s cannot be saved (%r): a restart now loses the last tasks", self._file, error)
        self._judge_saving(monotonic() - started)

    def _judge_saving(self, took: float) -> None:
        """Say so, once, when saving takes so long that it is felt on the pages."""
        if took * 1000 > self.state_save_interval / 10 and not self._slow:
            self._slow = True
            logger.warning(
                "saving takes %.1f s, every %d s: lower FLOWER_MAX_TASKS or raise FLOWER_STATE_SAVE_INTERVAL",
                took,
                self.state_save_interval / 1000,
            )


class Inspector(inspector.Inspector):  # type: ignore[misc]
    """What workers tell about themselves, without the passwords in it: Celery's own workers tell them (celery 5.7)."""

    def _on_update(self, workername: str, method: str, response: Any) -> None:
        super()._on_update(workername, method, mask_passwords(response))


class Server(Flower):  # type: ignore[misc]
    """Flower behind a login."""

    pool_executor_cls = DaemonThreads

    def __init__(self, app: Celery, settings: Settings, inner_login: str) -> None:
        self.stack = settings
        self.broker_uri = settings.broker_url.mask()
        self.prefix = f"/{settings.flower.url_prefix}" if settings.flower.url_prefix else ""
        self._door = Door(settings.flower, self.prefix)
        self._inner_login = "Basic " + base64.b64encode(inner_login.encode()).decode()
        self._next_inspection = -inf
        self._inspected: set[str] = set()
        loop = IOLoop.current()
        stop_on_signals(loop.asyncio_loop)
        under_prefix = {"static_url_prefix": f"{self.prefix}/static/", "login_url": f"{self.prefix}/login"}
        own = {"static_handler_class": StaticFiles, **under_prefix}
        super().__init__(options, app, Events(app, loop, self.broker_uri), loop, **urls.settings | own)
        self.add_transform(SafeHeaders)
        self.inspector = Inspector(loop, app, options.inspect_timeout / 1000)
        self.add_handlers(".*", pages(self.prefix))
        to_prefix = {"url": f"{self.prefix}/", "permanent": False}
        self.add_handlers(".*", [(path, RedirectHandler, to_prefix) for path in ("/", self.prefix) if self.prefix])

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        """Tornado asks here before anything else, for every method and path."""
        if request.path == f"{self.prefix}/healthcheck":
            return super().find_handler(request, **kwargs)
        try:
            request.visitor = self._door.admit(request)
        except Refusal as refusal:
            return self.get_handler_delegate(request, Refused, {"refusal": refusal})
        request.headers["Authorization"] = self._inner_login
        return super().find_handler(request, **kwargs)

    def log_request(self, handler: RequestHandler) -> None:
        request, status = handler.request, handler.get_status()
        visitor = getattr(request, "visitor", None)
        if visitor and self._door.acts(request):
            logger.info("%r has asked for %s %s, answered %d", visitor.name, request.method, request.path, status)
        # Probes ask every few seconds, and Redis's absence has its own line.
        probed = isinstance(handler, Healthcheck)
        # Browsers send the login only after they have been asked for it; a wrong one is worth a line.
        asked = status == 401 and isinstance(handler, Refused) and "Authorization" not in request.headers
        if not (probed or asked):
            super().log_request(handler)

    def listen(self, port: int) -> None:
        """Take the port, or raise ConfigError."""
        try:
            self.start_http_server()
        except OSError as error:
            raise ConfigError(
                [f"Flower cannot listen on port {port} ({error.strerror}): stop what uses it, or set FLOWER_PORT"]
            ) from None

    def run(self, address: str, port: int, heartbeat: Callable[[], None] | None) -> None:
        """Serve until a signal, then save."""
        periodic(self.tidy, TIDY_SECONDS)
        if heartbeat:
            url = f"http://{host_to_ask(address)}:{port}{self.prefix}/healthcheck"
            periodic(Pulse(url, heartbeat).beat, BEAT_SECONDS)
        logger.info("Flower listens on port %d%s, broker %s", port, self.prefix, self.broker_uri)
        # Flower's own start() asks all workers about themselves, and warns four times when there are none yet.
        self.events.start()
        self.started = True
        self.io_loop.start()
        logger.info("Flower leaves")
        self.stop()

    def tidy(self) -> None:
        """Forget workers that are gone, and ask new ones about themselves."""
        gone = self.events.gone(set(self.workers))
        self.events.forget(gone)
        for name in gone:
            self.workers.pop(name, None)
        self._inspected &= set(self.events.seen)
        unknown = {name for name in self.events.state.workers if self.events.is_worker_alive(name)} - set(self.workers)
        if unknown - self._inspected or (unknown and monotonic() >= self._next_inspection):
            self._inspected |= unknown
            self._next_inspection = monotonic() + INSPECT_AGAIN_SECONDS
            self.update_workers()

    def consumers(self, queue: str) -> int | None:
        """How many nodes take tasks from `queue`; None as long as one has not said from where it does."""
        alive = [name for name in self.events.state.workers if self.events.is_worker_alive(name)]
        taken = [self.workers.get(name, {}).get("active_queues") for name in alive]
        if None in taken:
            return None
        return sum(any(each["name"] == queue for each in queues) for queues in taken)

    def purge_offline_worker_metrics(self) -> None:
        """Flower asks for it with each scrape."""
        self.tidy()


class Pulse:
    """Asks Flower over HTTP whether it lives, as a client would, and passes that on."""

    def __init__(self, url: str, heartbeat: Callable[[], None]) -> None:
        self._url = url
        self._heartbeat = heartbeat
        self._client = SimpleAsyncHTTPClient(force_instance=True)

    async def beat(self) -> None:
        try:
            answer = await self._client.fetch(self._url, raise_error=False, request_timeout=BEAT_SECONDS)
            if answer.code in (200, 503):
                self._heartbeat()
        except Exception as error:
            logger.warning("no heartbeat: %s", error)


def periodic(callback: Callable[[], Any], seconds: float) -> None:
    """Call `callback` now and then every so many seconds."""
    PeriodicCallback(callback, seconds * 1000).start()
    IOLoop.current().add_callback(callback)
