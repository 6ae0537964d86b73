"""A message of Celery as it is read apart from any channel: out of a dead letter, or out of the schedule."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from celery.app.task import Context
from kombu.message import Message
from kombu.serialization import prepare_accept_content
from kombu.utils.json import loads


@dataclass(frozen=True)
class Read:
    """What can be read of a message. `problem`: why there is no more; "" when there is all."""

    properties: dict[str, Any] = field(default_factory=dict)
    # The headers, or in a message of Celery 3 the fields of its body.
    fields: dict[str, Any] = field(default_factory=dict)
    args: Any = None
    kwargs: Any = None
    embed: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    # Whether somebody had started it, or had held it when he died (lua/record.lua).
    redelivered: bool = False

    @property
    def task(self) -> str | None:
        return _text(self.fields.get("task"))

    @property
    def id(self) -> str | None:
        return _text(self.fields.get("id"))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def of_record(record: bytes) -> bytes:
    """The message in a record of ours (lua/record.lua)."""
    return record[1 : record.rindex(b',"",')]


def read(raw: bytes, accept: Iterable[str], *, body: bool = True) -> Read:
    """Read a message as far as that goes; `accept`: the content types that are decoded. Without `body` not that."""
    try:
        message = loads(raw)
    except Exception as error:  # whatever a decoder raises at what somebody has sent
        return Read(problem=f"not a message: {error!r}")
    headers = message.get("headers") if isinstance(message, dict) else None
    properties = message.get("properties") if isinstance(message, dict) else None
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        return Read(problem="not a message: it has no headers and properties")
    if not body:
        return Read(properties, headers)
    try:
        payload = _payload(message, headers, properties, accept)
    except Exception as error:  # as above
        return Read(properties, headers, problem=f"its body cannot be decoded: {error!r}")
    return replace(_task(headers, properties, payload), redelivered="delivery_count" in message)


def _payload(message: dict[str, Any], headers: dict[str, Any], properties: dict[str, Any], accept: Any) -> Any:
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


def _task(headers: dict[str, Any], properties: dict[str, Any], payload: Any) -> Read:
    if isinstance(payload, dict):
        return Read(properties, headers | payload, payload.get("args"), payload.get("kwargs"))
    if not isinstance(payload, list | tuple) or len(payload) != 3:
        return Read(properties, headers, problem="its body is not a list of arguments, keywords and options")
    args, kwargs, embed = payload
    return Read(properties, headers, args, kwargs, embed if isinstance(embed, dict) else {})


def context(message: Read, **more: Any) -> Context:
    """What the result backend wants to know of a task: who waits for it, and what it is a part of."""
    request = message.fields | message.embed | {"args": message.args, "kwargs": message.kwargs}
    return Context(request | {"delivery_info": {}} | more)
