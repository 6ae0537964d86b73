"""A message of Celery, read apart from any channel: out of a dead letter, a list, or the schedule."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from celery.app.task import Context
from kombu.message import Message
from kombu.serialization import prepare_accept_content
from kombu.utils.json import loads

NOT_A_BODY = "its body is not a list of arguments, keywords and options"


@dataclass(frozen=True)
class TaskMessage:
    """What can be read of a message. `problem` says why that is not all; "" when it is."""

    properties: dict[str, Any] = field(default_factory=dict)
    # The headers, or in a message of Celery 3 the fields of its body.
    fields: dict[str, Any] = field(default_factory=dict)
    args: Any = None
    kwargs: Any = None
    embed: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    # Whether it was started before, or belonged to a worker that died (lua/record.lua).
    redelivered: bool = False

    @property
    def task(self) -> str | None:
        return self._text("task")

    @property
    def id(self) -> str | None:
        return self._text("id")

    def _text(self, name: str) -> str | None:
        value = self.fields.get(name)
        return value if isinstance(value, str) else None


def extract_message(record: bytes) -> bytes:
    """The message in a record of Stalk's (lua/record.lua)."""
    return record[1 : record.rindex(b',"",')]


def parse(raw: bytes, accept: Iterable[str], *, body: bool = True) -> TaskMessage:
    """Read a message as far as that goes; `accept`: the content types that are decoded. Without `body` not that."""
    try:
        message = loads(raw)
    except Exception as error:  # whatever a decoder raises at what somebody has sent
        return TaskMessage(problem=f"not a message: {error!r}")
    parts = message if isinstance(message, dict) else {}
    headers, properties = parts.get("headers"), parts.get("properties")
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        return TaskMessage(problem="not a message: it has no headers and properties")
    if not body:
        return TaskMessage(properties, headers)
    try:
        payload = _decode_body(message, headers, properties, accept)
    except Exception as error:  # as above
        return TaskMessage(properties, headers, problem=f"its body cannot be decoded: {error!r}")
    return replace(_parse_body(headers, properties, payload), redelivered="delivery_count" in message)


def _decode_body(message: dict[str, Any], headers: dict[str, Any], properties: dict[str, Any], accept: Any) -> Any:
    body = message.get("body")
    if properties.get("body_encoding") == "base64" and isinstance(body, str):
        body = base64.b64decode(body)
    return Message(
        body=body,
        headers=headers,
        properties=properties,
        content_type=message.get("content-type"),
        content_encoding=message.get("content-encoding"),
        accept=prepare_accept_content(accept),
    ).payload


def _parse_body(headers: dict[str, Any], properties: dict[str, Any], payload: Any) -> TaskMessage:
    if isinstance(payload, dict):
        return TaskMessage(properties, headers | payload, payload.get("args"), payload.get("kwargs"))
    if not isinstance(payload, list | tuple) or len(payload) != 3:
        return TaskMessage(properties, headers, problem=NOT_A_BODY)
    args, kwargs, embed = payload
    return TaskMessage(properties, headers, args, kwargs, embed if isinstance(embed, dict) else {})


def build_context(message: TaskMessage, **more: Any) -> Context:
    """The request that the result backend asks for callbacks, errbacks, group and chord of a task."""
    request = message.fields | message.embed | {"args": message.args, "kwargs": message.kwargs}
    return Context(request | {"delivery_info": {}} | more)
