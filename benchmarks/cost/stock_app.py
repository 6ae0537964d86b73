"""What Stalk is compared with: the stock application of tests/chaos with every setting that Stalk has.

Time limits cost a timer a task and events a message each: a comparison has both on both sides.
"""

from config import load
from config.celery import build_celery_configuration
from tests.chaos.workload.stock_app import SOCKETS, app

# What only Stalk's own transport and consumer know.
OWN = {"broker_transport_options", "worker_consumer", "worker_enable_prefetch_count_reduction"}

settings = load()
app.conf.update({name: value for name, value in build_celery_configuration(settings).items() if name not in OWN})
app.conf.update(
    imports=("benchmarks.cost.tasks",),
    # Without the sweep each second that faults ask for: it is no part of what a delivery costs.
    broker_transport_options=SOCKETS | {"visibility_timeout": settings.broker.visibility_timeout},
)
