"""Celery's configuration, made from the settings."""

from typing import Any

from config.redis_url import RedisUrl
from config.settings import Settings, TaskSettings

# kombu 5.7 uses ZRANGE … BYSCORE, and BLMOVE is what waiting without polling needs: both came with 6.2.
LOWEST_REDIS_VERSION = (6, 2)
# Redis answers in milliseconds; a server that is silent for 10 s is gone, and its socket with it.
SOCKET_TIMEOUT_SECONDS = 10
CONNECT_TIMEOUT_SECONDS = 5
# Managed Redis and NAT gateways drop idle connections after minutes; a PING each 30 s keeps them open.
HEALTH_CHECK_SECONDS = 30


def build_connection_options(settings: Settings, url: RedisUrl) -> dict[str, Any]:
    """Options of connections to the broker or to the results, whichever `url` names."""
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_SECONDS,
        "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "socket_keepalive": True,
        "health_check_interval": HEALTH_CHECK_SECONDS,
    }
    if url.scheme == "sentinel":
        options["master_name"] = settings.broker.sentinel_master
        options["sentinel_kwargs"] = build_sentinel_options(settings, url)
    return options


def build_sentinel_options(settings: Settings, url: RedisUrl) -> dict[str, Any]:
    """Options of connections to the sentinels themselves, whose password is not the master's."""
    options: dict[str, Any] = {
        "socket_timeout": CONNECT_TIMEOUT_SECONDS,
        "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
        **({"ssl": True} if url.tls else {}),
        **url.tls_options,
    }
    password = settings.broker.sentinel_password.get_secret_value()
    return options | ({"password": password} if password else {})


def derive_soft_limit(tasks: TaskSettings) -> int:
    """The soft time limit that is in force, in seconds."""
    return tasks.soft_time_limit or max(1, tasks.time_limit * 29 // 30)


def build_celery_configuration(settings: Settings) -> dict[str, Any]:
    """What `app.conf` is updated with, except task modules and schedule, which services/app.py adds."""
    return _build_transport(settings) | {
        # Acknowledge a task after it ran, and requeue it when its process dies.
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        # Let running tasks finish when the connection is lost; the default will change in Celery 6.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        # After a reconnect, tasks that the pool still runs count as prefetched anyway (services/delivery/channel.py).
        "worker_enable_prefetch_count_reduction": False,
        "worker_consumer": "services.worker.consumer:Consumer",
        "worker_prefetch_multiplier": settings.worker.prefetch_multiplier,
        "result_expires": settings.results.expires,
        # JSON only: unpickling a message runs whatever its sender wrote.
        "accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "enable_utc": True,
        "timezone": settings.tasks.timezone,
        # What Flower shows: who sent a task, who took it, how it ended.
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        # services/worker/shutdown.py bounds a warm shutdown; Celery's own sleeps its full length (celery 5.7).
        "worker_soft_shutdown_timeout": 0,
        "worker_hijack_root_logger": True,
        "worker_log_format": "%(asctime)s %(levelname)s %(processName)s %(message)s",
        "worker_task_log_format": "%(asctime)s %(levelname)s %(processName)s %(task_name)s[%(task_id)s] %(message)s",
    }


def _build_transport(settings: Settings) -> dict[str, Any]:
    return {
        "broker_url": settings.broker_url.text(),
        "result_backend": settings.result_url.text(),
        "broker_transport_options": build_connection_options(settings, settings.broker_url)
        | {
            "visibility_timeout": settings.broker.visibility_timeout,
            "lease": settings.worker.lease,
            "max_deliveries": settings.worker.max_deliveries,
            "max_requeues": settings.worker.max_requeues,
            "dead_letters": list(settings.worker.dead_letters),
            "dead_letters_max": settings.worker.dead_letters_max,
            # Broadcasts carry the database number, so two stacks on one server do not hear each other.
            "fanout_prefix": True,
            "fanout_patterns": True,
        },
        "result_backend_transport_options": build_connection_options(settings, settings.result_url),
        # Celery reads TLS options from every URL but one of sentinels (celery 5.7).
        "redis_backend_use_ssl": settings.result_url.tls_options if settings.result_url.scheme == "sentinel" else None,
        "redis_socket_timeout": SOCKET_TIMEOUT_SECONDS,
        "redis_socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
        # A Unix socket has no keep-alive, and Celery passes the option on all the same (celery 5.7).
        "redis_socket_keepalive": settings.result_url.scheme != "redis+socket",
        "redis_backend_health_check_interval": HEALTH_CHECK_SECONDS,
        # For ever: a worker that gives up would have to be started by hand once the broker is back.
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # A full Redis refuses commands; without this a worker exits, again and again, instead of waiting.
        "broker_channel_error_retry": True,
    }
