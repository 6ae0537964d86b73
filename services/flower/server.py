"""Flower behind a login, with a health check that follows Redis, and with state that survives a kill.

Flower stays Flower: this package subclasses it and sets its options. What its own start-up reads (the FLOWER_*
variables, the command line, flowerconfig.py) is never read, so only the validated settings count.
"""

import base64
import logging
import os
import secrets
import signal
from collections.abc import Callable
from typing import Any

from celery import Celery
from flower import urls
from flower.app import Flower
from flower.options import options
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.ioloop import IOLoop, PeriodicCallback
from tornado.web import OutputTransform, RedirectHandler, RequestHandler

from config import ConfigError, Settings
from services.flower.events import PING_SECONDS, Events, StateFile
from services.flower.health import HEARTBEAT_SECONDS, HealthcheckHandler, LivenessProbe
from services.flower.logins import AccessDenied, AccessDeniedHandler, Authenticator
from services.flower.pages import build_handlers
from services.flower.workers import Inspector

logger = logging.getLogger(__name__)

# How often offline workers are forgotten and new ones inspected.
REFRESH_SECONDS = 5.0
# No other site may show Flower in a frame and have a stop button clicked unseen, and nothing that a task's name or
# arguments smuggle into a page can load from, or tell, another host. Flower's own pages have scripts and styles
# inside, hence 'unsafe-inline'.
SECURITY_HEADERS = {
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
}


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

    `app` comes from services.app.create_app; its transport options are changed here, so use it for nothing else.
    Flower's state is kept in the file `database`. `heartbeat` is called every few seconds while Flower answers HTTP
    requests, whether Redis is there or not. Ends the process with 0.

    Raises ConfigError when there is no login, or the port or the database cannot be used.
    """
    if not settings.flower.basic_auth.get_secret_value():
        raise ConfigError(
            ["FLOWER_BASIC_AUTH is not set: set it to user:password, because whoever sees Flower can stop workers"]
        )
    StateFile(database).check_writable()
    set_up_logging(settings.tasks.log_level)
    # Redis is pinged by events.Receiver at this interval.
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, "health_check_interval": PING_SECONDS}
    app.set_default()
    server = Server(app, settings, set_options(settings, address, port, database))
    server.listen(port)
    server.run(address, port, heartbeat)


def set_options(settings: Settings, address: str, port: int, database: str) -> str:
    """Set every option of Flower's that differs from its default, and return Flower's inner login.

    Flower compares logins as text and refuses those that are not ASCII (flower 2.2). It gets a random one, which
    `Server` puts into each request that has been authenticated.
    """
    inner = f"flower:{secrets.token_urlsafe(32)}"
    options.basic_auth = [inner]
    options.address, options.port = address.strip("[]"), port
    options.url_prefix = settings.flower.url_prefix
    options.persistent, options.db = True, database
    options.state_save_interval = settings.flower.save_every * 1000
    # Flower's own order begins with the name, which fills a phone and hides the state and the link to the task.
    options.tasks_columns = "state,uuid,name,received,runtime,worker"
    options.max_tasks = settings.flower.max_tasks
    options.max_workers = settings.flower.max_workers
    options.purge_offline_workers = settings.flower.offline_after
    return inner


def set_up_logging(level: str) -> None:
    """Log to standard error, unless the caller has set up logging already."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(processName)s %(message)s")
    # kombu logs each try to reconnect; services.broker.outages logs an outage once.
    logging.getLogger("kombu.mixins").setLevel(logging.WARNING)
    # The pages ask every second: a line for each request would hide the others.
    logging.getLogger("tornado.access").setLevel(logging.DEBUG if level == "debug" else logging.WARNING)


class SecurityHeaders(OutputTransform):  # type: ignore[misc]
    """Adds SECURITY_HEADERS to every answer, whichever handler gives it."""

    def transform_first_chunk(
        self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, HTTPHeaders, bytes]:
        headers.update(SECURITY_HEADERS)
        return status_code, headers, chunk


class Server(Flower):  # type: ignore[misc]
    """Flower's web application behind a login."""

    # Threads: for the five requests and eight inspections that Flower runs at the same time, and the rest (flower 2.2).
    # Fewer than that, and pages would wait for inspections while Redis is away.
    max_workers = 16

    def __init__(self, app: Celery, settings: Settings, inner_login: str) -> None:
        self.stack_settings = settings
        self.broker_uri = settings.broker_url.mask()
        self.prefix = f"/{settings.flower.url_prefix}" if settings.flower.url_prefix else ""
        self._authenticator = Authenticator(settings.flower, self.prefix)
        self._inner_login = "Basic " + base64.b64encode(inner_login.encode()).decode()
        loop = IOLoop.current()
        for number in (signal.SIGTERM, signal.SIGINT):
            # A signal that comes before the loop runs ends it at once.
            loop.asyncio_loop.add_signal_handler(number, loop.asyncio_loop.stop)
        under_prefix = {"static_url_prefix": f"{self.prefix}/static/", "login_url": f"{self.prefix}/login"}
        super().__init__(options, app, Events(app, loop, self.broker_uri), loop, **urls.settings | under_prefix)
        self.add_transform(SecurityHeaders)
        self.inspector = Inspector(loop, app, self.events)
        self.add_handlers(".*", build_handlers(self.prefix))
        to_prefix = {"url": f"{self.prefix}/", "permanent": False}
        self.add_handlers(".*", [(path, RedirectHandler, to_prefix) for path in ("/", self.prefix) if self.prefix])

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        """Authenticate a request: Tornado calls this before anything else, for every method and path."""
        if request.path == f"{self.prefix}/healthcheck":
            return super().find_handler(request, **kwargs)
        try:
            request.user = self._authenticator.authenticate(request)
        except AccessDenied as error:
            return self.get_handler_delegate(request, AccessDeniedHandler, {"error": error})
        request.headers["Authorization"] = self._inner_login
        return super().find_handler(request, **kwargs)

    def log_request(self, handler: RequestHandler) -> None:
        """Log who changed something, and every request but probes and the first one of a browser without a login."""
        request, status = handler.request, handler.get_status()
        user = getattr(request, "user", None)
        if user and self._authenticator.is_write(request):
            logger.info("%r has asked for %s %s, answered %d", user.name, request.method, request.path, status)
        is_probe = isinstance(handler, HealthcheckHandler)
        # Browsers send the login only after they have been asked for it; a wrong one is worth a line.
        is_first = status == 401 and isinstance(handler, AccessDeniedHandler) and "Authorization" not in request.headers
        if not (is_probe or is_first):
            super().log_request(handler)

    def listen(self, port: int) -> None:
        """Take the port. Raises ConfigError when it is in use."""
        try:
            self.start_http_server()
        except OSError as error:
            raise ConfigError(
                [f"Flower cannot listen on port {port} ({error.strerror}): stop what uses it, or set FLOWER_PORT"]
            ) from None

    def run(self, address: str, port: int, heartbeat: Callable[[], None] | None) -> None:
        """Serve until a signal, then save the state and end the process."""
        run_periodically(self.inspector.refresh, REFRESH_SECONDS)
        if heartbeat:
            run_periodically(LivenessProbe(address, port, self.prefix, heartbeat).check, HEARTBEAT_SECONDS)
        logger.info("Flower listens on port %d%s, broker %s", port, self.prefix, self.broker_uri)
        # Flower's own start() inspects all workers, and logs four warnings when there are none yet.
        self.events.start()
        self.started = True
        self.io_loop.start()
        logger.info("Flower stops")
        self.stop()
        logging.shutdown()
        # Python's own end would wait for threads that wait for Redis.
        os._exit(0)

    def purge_offline_worker_metrics(self) -> None:
        """Forget offline workers everywhere before each scrape; Flower's own forgets their metrics only."""
        self.inspector.refresh()


def run_periodically(callback: Callable[[], Any], seconds: float) -> None:
    """Call `callback` now and then every so many seconds."""
    PeriodicCallback(callback, seconds * 1000).start()
    IOLoop.current().add_callback(callback)
