"""The Lua scripts: each step of a delivery happens inside Redis, whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import NoScriptError

DIRECTORY = Path(__file__).with_name("lua")


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


def _script(name: str, *shared: str) -> Script:
    text = "\n".join((DIRECTORY / f"{part}.lua").read_text() for part in (*shared, name))
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


CLAIM = _script("claim", "record")
ACK = _script("ack")
RENEW = _script("renew", "record")
RESTORE = _script("restore", "record")
RESTORE_STOCK = _script("restore_stock", "record")
CRASH = _script("crash", "record", "park")
REQUEUE = _script("requeue", "record", "park", "schedule")
REJECT = _script("reject", "record", "park")
SWEEP = _script("sweep", "record", "park", "schedule")
POSTPONE = _script("postpone", "record", "schedule")
PUBLISH = _script("publish")
# What people and remote control ask for.
REPLAY = _script("replay", "record")
PURGE_LETTERS = _script("purge_letters")
TELL = _script("tell", "record")
SCHEDULED = _script("scheduled", "record")
PURGE_SCHEDULED = _script("purge_scheduled", "record")
TO_PLAIN = _script("to_plain", "record")
REVOKE = _script("revoke", "record")
REVOKED = _script("revoked", "record")
# What pre-flight asks.
UNDECLARED = _script("undeclared")

# What the keeper sends without looking whether Redis knows it.
ALL = (CLAIM, ACK, RENEW, RESTORE, RESTORE_STOCK, CRASH, REQUEUE, REJECT, SWEEP, POSTPONE, PUBLISH)
