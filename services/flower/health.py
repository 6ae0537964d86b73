"""Flower's health check, and its heartbeat for the container's health check."""

import logging
from collections.abc import Callable

from tornado.simple_httpclient import SimpleAsyncHTTPClient
from tornado.web import RequestHandler

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0


class HealthcheckHandler(RequestHandler):  # type: ignore[misc]
    """Answers OK while events can arrive. It opens no connection, so it may be asked often."""

    def get(self) -> None:
        if self.application.events.is_connected:
            self.write("OK")
        else:
            self.set_status(503)
            self.write("Flower receives no events: Redis does not answer.\n")

    head = get


class LivenessProbe:
    """Asks Flower over HTTP whether it answers, and calls `heartbeat` when it does, with Redis or without."""

    def __init__(self, address: str, port: int, prefix: str, heartbeat: Callable[[], None]) -> None:
        self._url = f"http://{get_local_host(address)}:{port}{prefix}/healthcheck"
        self._heartbeat = heartbeat
        self._client = SimpleAsyncHTTPClient(force_instance=True)

    async def check(self) -> None:
        try:
            answer = await self._client.fetch(self._url, raise_error=False, request_timeout=HEARTBEAT_SECONDS)
            if answer.code in (200, 503):
                self._heartbeat()
        except Exception as error:
            logger.warning("no heartbeat: %s", error)


def get_local_host(address: str) -> str:
    """Return the host of a URL that reaches, from this machine, a server that listens on `address`."""
    bare = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.strip("[]"), address.strip("[]"))  # noqa: S104
    return f"[{bare}]" if ":" in bare else bare
