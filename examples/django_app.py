"""Django: send a task and wait for a bounded time, start a long one and show its progress, send and forget.

python django_app.py runserver; or `application` for any WSGI server.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from uuid import UUID

from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from django.views.decorators.http import require_POST
from producer import Task, Unavailable, look_up, send, wait

# As long as a person waits for a page. Each request that waits holds a thread or a process of the server.
WAIT_SECONDS = 5


class UnavailableMiddleware:
    """Answer 503 while Redis is unavailable."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        if not isinstance(error, Unavailable):
            return None
        return JsonResponse({"error": str(error)}, status=503, headers={"Retry-After": "5"})


def respond(task: Task) -> HttpResponse:
    body = {"id": task.id, "state": task.state, "value": task.value}
    return JsonResponse(body, status=task.http_status, headers={"Location": f"/tasks/{task.id}"})


@require_POST
def add(request: HttpRequest) -> HttpResponse:
    """Add two numbers: 200 with the sum, or 202 with the address of the task."""
    numbers = json.loads(request.body)
    return respond(wait(send("services.tasks.arithmetic.add", numbers["x"], numbers["y"]), WAIT_SECONDS))


@require_POST
def start_chain(request: HttpRequest) -> HttpResponse:
    """Start a long task: 202 at once, with the address that shows its progress."""
    chain = json.loads(request.body)
    return respond(send("services.tasks.hashes.hash_chain", chain["seed"], chain["rounds"]))


def show(request: HttpRequest, task_id: UUID) -> HttpResponse:
    """Show the state of a task. One that was never sent is PENDING for ever: keep the ids that you have given out."""
    return respond(look_up(str(task_id)))


@require_POST
def send_report(request: HttpRequest) -> HttpResponse:
    """Send and forget. Where a task reads what a transaction writes, send it in transaction.on_commit."""
    send("services.tasks.disk.report_free_space", keep_result=False)
    return HttpResponse(status=204)


# Your project has this already, in files of its own.
urlpatterns = [
    path("sums", add),
    path("chains", start_chain),
    path("tasks/<uuid:task_id>", show),
    path("reports", send_report),
]
settings.configure(
    ROOT_URLCONF=__name__, MIDDLEWARE=[f"{__name__}.UnavailableMiddleware"], ALLOWED_HOSTS=["127.0.0.1", "localhost"]
)
application = get_wsgi_application()

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
