"""`call`: send one task, wait for it, and return its result or its error."""

import json
import traceback
from difflib import get_close_matches
from typing import Any

from celery import Celery
from celery.exceptions import NotRegistered
from celery.exceptions import TimeoutError as ResultTimeout
from kombu.exceptions import EncodeError, OperationalError
from redis.exceptions import RedisError

from config import ConfigError, Settings
from services.broker.client import connect
from services.commands.output import BadInput

SUCCESS, FAILURE, BAD_INPUT, TIMED_OUT = 0, 1, 2, 3
# A day: nobody waits longer at a terminal, and the result has expired by then.
LONGEST_WAIT_SECONDS = 86400
# One a second: a Redis that is restarted is back by then. Celery's twenty would outlast a short wait.
RECONNECTS = 5
# What is raised while Redis is away; RuntimeError by Celery's result consumer, when it gives up (celery 5.7).
UNAVAILABLE = (OperationalError, RedisError, OSError, RuntimeError)


def call(app: Celery, name: str, arguments: str, keywords: str, wait: str) -> tuple[dict[str, Any], int]:
    """Send task `name` and wait for it; the JSON object to print, and the exit code.

    `arguments` is a JSON list, `keywords` a JSON object, `wait` a number of seconds.
    """
    try:
        task = _find_task(app, name)
        args, kwargs = _parse_json("ARGS", arguments, list), _parse_json("KWARGS", keywords, dict)
        seconds = _parse_seconds(wait)
        app.conf.result_backend_transport_options["retry_policy"] = {"max_retries": RECONNECTS}
        _ping_both(app.settings)
        sent = task.apply_async(args, kwargs)
    except (BadInput, ConfigError) as error:
        return _describe_unsent(str(error)), BAD_INPUT
    except TypeError as error:
        return _describe_unsent(f"{name}: {error}"), BAD_INPUT
    except (*UNAVAILABLE, EncodeError) as error:
        return _describe_unsent(f"the task could not be sent: {error}"), FAILURE
    return _wait_for(sent, seconds)


def _describe_unsent(error: str) -> dict[str, Any]:
    return {"id": None, "state": None, "error": error}


def _ping_both(settings: Settings) -> None:
    """Raise RedisError at once where Celery would try again for half a minute."""
    for url in (settings.broker_url, settings.result_url):
        with connect(url, settings) as client:
            client.ping()


def _wait_for(sent: Any, seconds: float) -> tuple[dict[str, Any], int]:
    try:
        value = sent.get(timeout=seconds, propagate=False)
    except ResultTimeout:
        late = f"no result after {seconds:g} s; the task was sent and goes on"
        return {"id": sent.id, "state": _read_state(sent), "error": late}, TIMED_OUT
    except UNAVAILABLE as error:
        lost = f"the task was sent, but its result could not be read: {' '.join(str(error).split())}"
        return {"id": sent.id, "state": None, "error": lost}, FAILURE
    finally:
        # Left to the garbage collector, a result that is still pending asks Redis at interpreter exit (celery 5.7).
        sent.backend.remove_pending_result(sent)
    state = sent.state
    if state == "SUCCESS":
        return {"id": sent.id, "state": state, "result": value}, SUCCESS
    failure = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value)
    if isinstance(value, NotRegistered):
        failure += "; the workers run older code: make up takes up the new one"
    return {"id": sent.id, "state": state, "error": failure}, FAILURE


def _read_state(sent: Any) -> str | None:
    try:
        return str(sent.state)
    except UNAVAILABLE:
        return None


def _find_task(app: Celery, name: str) -> Any:
    """The task of this name.

    Raises BadInput, with a similar name where there is one.
    """
    try:
        app.loader.import_default_modules()
    except Exception as error:  # a module of the user's may raise anything
        traceback.print_exc()
        raise BadInput(f"the tasks cannot be imported: {error!r}") from error
    if name in app.tasks:
        return app.tasks[name]
    own = sorted(task for task in app.tasks if not task.startswith("celery."))
    guess = get_close_matches(name, own, n=1, cutoff=0.4)
    hint = f"did you mean {guess[0]}?" if guess else f"there are {', '.join(own)}"
    raise BadInput(f"TASK: found {name!r}, which no module in services/tasks/ defines; {hint}")


def _parse_json(variable: str, text: str, wanted: type) -> Any:
    kind = "list, such as [4, 3]" if wanted is list else 'object, such as {"x": 4}'
    try:
        # Not orjson, which makes a float of a whole number beyond 64 bits.
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise BadInput(f"{variable}: found {text!r}, which is not JSON ({error}); it must be a JSON {kind}") from None
    if not isinstance(value, wanted):
        raise BadInput(f"{variable}: found {text!r}; it must be a JSON {kind}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= LONGEST_WAIT_SECONDS:
        raise BadInput(f"WAIT: found {text!r}; it must be seconds, above 0 and up to {LONGEST_WAIT_SECONDS}")
    return seconds
