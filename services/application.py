"""The class of the Celery application: which transport, worker, control and clients it uses."""

from typing import Any

from celery import Celery
from kombu.utils.objects import cached_property

from config import Settings
from services.broker.client import connect, require_set
from services.pool.time_limits import Limits


class Stalk(Celery):  # type: ignore[misc]
    """A Celery application whose tasks are delivered by services/delivery."""

    amqp_cls = "services.delivery.connection:AMQP"
    control_cls = "services.control.mailbox:Control"

    # None in an application that is configured by hand.
    settings: Settings | None = None
    # Of tasks without time limits of their own.
    time_limits = Limits()

    @cached_property  # type: ignore[untyped-decorator]
    def Worker(self) -> Any:  # noqa: N802 - Celery's name
        self.require_broker(self.conf.broker_read_url)
        return self.subclass_with_self("services.worker.worker:Worker")

    @cached_property  # type: ignore[untyped-decorator]
    def Beat(self) -> Any:  # noqa: N802 - Celery's name
        self.require_broker(self.conf.broker_write_url)
        return self.subclass_with_self("celery.apps.beat:Beat")

    @cached_property  # type: ignore[untyped-decorator]
    def redbeat_conf(self) -> Any:
        """RedBeat's settings, which it reads first of all."""
        # Imported here, because few processes need RedBeat, which takes 2 MB and a tenth of a second.
        from services.beat import entries

        return entries.configure(self)

    @cached_property  # type: ignore[untyped-decorator]
    def redbeat_redis(self) -> Any:
        """RedBeat's client; its own URL parser knows neither sockets nor sentinels."""
        if not self.settings:
            raise AttributeError("an application without settings leaves it to RedBeat")
        # Entries of other programs may not be UTF-8.
        options = {"decode_responses": True, "encoding_errors": "surrogateescape"}
        return connect(self.settings.broker_url, self.settings, **options)

    def _connection(self, url: str, **options: Any) -> Any:
        self.require_broker(url)
        return super()._connection(url, **options)

    def require_broker(self, url: str) -> None:
        """Raise UrlNotSetError for a default URL, with whose host Celery would try to connect without an end."""
        if self.settings:
            require_set(url, self.settings)
