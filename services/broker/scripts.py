"""The Lua scripts: Redis runs each step of a delivery wholly or not at all."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from redis import Redis
from redis.exceptions import NoScriptError

from services.broker.keys import EXPIRES

DIRECTORY = Path(__file__).with_name("lua")
# A key that any script may need, because any of them may put a message back; arguments would repeat it in each call.
NAMES = f"local EXPIRES = '{EXPIRES}'"


@dataclass(frozen=True)
class Script:
    """One script: its text and the SHA-1 under which Redis keeps it."""

    text: str
    sha: str

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The script with this text."""
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())

    def __call__(self, client: Redis, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """Run it, with its text where Redis does not know it, as after a restart.

        Raises redis.exceptions.RedisError.
        """
        try:
            return client.evalsha(self.sha, len(keys), *keys, *arguments)
        except NoScriptError:
            # Not loaded first, and then run by its SHA-1: the scripts may be flushed in between.
            return client.eval(self.text, len(keys), *keys, *arguments)

    @cached_property
    def with_headroom(self) -> "Script":
        """The same script with all of the headroom of a full Redis (lua/headroom.lua)."""
        return Script.from_text("\n".join((_read("headroom"), "use_headroom(1)", self.text)))


def as_json(steps: Sequence[int]) -> str:
    """Priority steps as the scripts take them."""
    return json.dumps(list(steps))


def _load(name: str, *shared: str) -> Script:
    """The script of this name, behind the files with the functions that it shares with others."""
    return Script.from_text("\n".join((NAMES, *map(_read, (*shared, name)))))


def _read(name: str) -> str:
    return (DIRECTORY / f"{name}.lua").read_text()


# Deliveries: from the claim to each of their ends.
CLAIM = _load("claim", "headroom", "record")
ACK = _load("ack")
RENEW = _load("renew", "headroom", "record")
REQUEUE = _load("requeue", "headroom", "record")
REQUEUE_STOCK = _load("requeue_stock", "headroom", "record")
CRASH = _load("crash", "headroom", "record", "dead_letter")
REQUEUE_LATER = _load("requeue_later", "headroom", "record", "dead_letter", "schedule")
REJECT = _load("reject", "headroom", "record", "dead_letter")
SWEEP = _load("sweep", "headroom", "record", "dead_letter", "schedule")
TOKEN = _load("token", "headroom", "record")
REQUEUE_RATE_LIMITED = _load("requeue_rate_limited", "headroom", "record", "schedule")
POSTPONE = _load("postpone", "headroom", "record", "schedule")
PUBLISH = _load("publish")
COMMANDS = _load("commands")
# Commands of people, and remote control.
REPLAY = _load("replay", "headroom", "record")
PURGE_LETTERS = _load("purge_letters")
TAKE_UNREPORTED = _load("take_unreported", "headroom", "record")
LIST_SCHEDULED = _load("list_scheduled", "headroom", "record")
PURGE_SCHEDULED = _load("purge_scheduled", "headroom", "record", "schedule")
TO_PLAIN = _load("to_plain", "headroom", "record", "schedule")
REVOKE = _load("revoke", "headroom", "record")
# Results.
STORE_RETRY = _load("store_retry")
# Pre-flight.
TOUCH_UNDECLARED = _load("touch_undeclared")

# What the lease manager sends in a pipeline, where no script can be sent again with its text.
ALL = (CLAIM, ACK, RENEW, REQUEUE, REQUEUE_STOCK, CRASH, REQUEUE_LATER, REJECT, SWEEP, POSTPONE, PUBLISH, TOKEN)
