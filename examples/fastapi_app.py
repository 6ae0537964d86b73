"""FastAPI: send a task and wait for a bounded time, start a long one and show its progress, send and forget.

uvicorn fastapi_app:app
"""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse
from producer import Task, Unavailable, look_up, send, wait

# As long as a person waits for a page. Each request that waits holds a thread, of which FastAPI has 40.
WAIT_SECONDS = 5

app = FastAPI()


@app.exception_handler(Unavailable)
def respond_unavailable(request: Request, error: Unavailable) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 503, headers={"Retry-After": "5"})


def respond(task: Task) -> JSONResponse:
    body = {"id": task.id, "state": task.state, "value": task.value}
    return JSONResponse(body, task.http_status, headers={"Location": f"/tasks/{task.id}"})


@app.post("/sums")
def add(x: Annotated[float, Body()], y: Annotated[float, Body()]) -> JSONResponse:
    """Add two numbers: 200 with the sum, or 202 with the address of the task."""
    return respond(wait(send("services.tasks.arithmetic.add", x, y), WAIT_SECONDS))


@app.post("/chains")
def start_chain(seed: Annotated[str, Body()], rounds: Annotated[int, Body()]) -> JSONResponse:
    """Start a long task: 202 at once, with the address that shows its progress."""
    return respond(send("services.tasks.hashes.hash_chain", seed, rounds))


@app.get("/tasks/{task_id}")
def show(task_id: UUID) -> JSONResponse:
    """Show the state of a task. One that was never sent is PENDING for ever: keep the ids that you have given out."""
    return respond(look_up(str(task_id)))


@app.post("/reports", status_code=204)
def send_report() -> None:
    """Send and forget."""
    send("services.tasks.disk.report_free_space", keep_result=False)
