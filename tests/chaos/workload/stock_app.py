"""What Stalk is compared with: kombu's own Redis transport, set up as a team does that has read Celery's pages.

Sockets, retries and acknowledgement are those of Stalk; what is left to differ is the transport.
"""

import os

from celery import Celery

SOCKETS = {
    "socket_timeout": 10,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 30,
}

# With an hour as time-out, kombu sweeps each 100 s; with seconds, as here, it has to sweep each second. In pools other
# than prefork it sweeps at its start, and else only while it may take no more tasks (kombu 5.7).
SWEEP = {"unacked_restore_interval": 1, "unacked_restore_throttle": 1}

# CELERY_BROKER_URL and CELERY_RESULT_BACKEND are read by Celery itself.
app = Celery("stock", set_as_current=True)
app.conf.update(
    imports=("tests.chaos.workload.tasks",),
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    broker_transport_options=SOCKETS | SWEEP | {"visibility_timeout": int(os.environ["WORKER_LEASE"])},
    result_backend_transport_options=SOCKETS,
    redis_socket_timeout=SOCKETS["socket_timeout"],
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_channel_error_retry=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_soft_shutdown_timeout=5,
)
