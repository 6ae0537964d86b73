"""The Lua scripts: each step of a delivery happens inside Redis, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import NoScriptError

from services.broker.keys import EXPIRES

DIRECTORY = Path(__file__).with_name("lua")
# What scripts would have to be told again and again, by whoever may cause them to give something back.
NAMES = f"local EXPIRES = '{EXPIRES}'"


@dataclass(frozen=True)
class Script:
    """One script: its text and the name that Redis keeps it under."""

    text: str
    sha: str

    def __call__(self, client: Redis, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """Run it; Redis gets the text where it does not know it, after its start for instance.

        Raises redis.exceptions.RedisError.
        """
        try:
            return client.evalsha(self.sha, len(keys), *keys, *arguments)
        except NoScriptError:
            return client.eval(self.text, len(keys), *keys, *arguments)

    @cached_property
    def with_headroom(self) -> Script:
        """The same with all of what Redis has in reserve (lua/headroom.lua)."""
        return of("\n".join((_read("headroom"), "use_headroom(1)", self.text)))


def of(text: str) -> Script:
    """The script with this text."""
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def as_json(steps: Sequence[int]) -> str:
    """Priority steps as the scripts take them."""
    return json.dumps(list(steps))


def _script(name: str, *shared: str) -> Script:
    return of("\n".join((NAMES, *map(_read, (*shared, name)))))


def _read(name: str) -> str:
    return (DIRECTORY / f"{name}.lua").read_text()


CLAIM = _script("claim", "headroom", "record")
ACK = _script("ack")
RENEW = _script("renew", "headroom", "record")
REQUEUE = _script("requeue", "headroom", "record")
REQUEUE_STOCK = _script("requeue_stock", "headroom", "record")
CRASH = _script("crash", "headroom", "record", "dead_letter")
REQUEUE_LATER = _script("requeue_later", "headroom", "record", "dead_letter", "schedule")
REJECT = _script("reject", "headroom", "record", "dead_letter")
SWEEP = _script("sweep", "headroom", "record", "dead_letter", "schedule")
TOKEN = _script("token", "headroom", "record")
REQUEUE_RATE_LIMITED = _script("requeue_rate_limited", "headroom", "record")
POSTPONE = _script("postpone", "headroom", "record", "schedule")
PUBLISH = _script("publish")
COMMANDS = _script("commands")
# What people and remote control ask for.
REPLAY = _script("replay", "headroom", "record")
PURGE_LETTERS = _script("purge_letters")
TELL = _script("tell", "headroom", "record")
SCHEDULED = _script("scheduled", "headroom", "record")
PURGE_SCHEDULED = _script("purge_scheduled", "headroom", "record")
TO_PLAIN = _script("to_plain", "headroom", "record")
REVOKE = _script("revoke", "headroom", "record")
REVOKED = _script("revoked", "headroom", "record")
# What a worker stores.
RETRY = _script("retry")
# What pre-flight asks.
UNDECLARED = _script("undeclared")

# What the lease manager sends without looking whether Redis knows it.
ALL = (CLAIM, ACK, RENEW, REQUEUE, REQUEUE_STOCK, CRASH, REQUEUE_LATER, REJECT, SWEEP, POSTPONE, PUBLISH, TOKEN)
