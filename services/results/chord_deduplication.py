"""The body of a chord is enqueued once, whichever worker dispatches it.

A worker that dies after it has enqueued a body and before it has said so leaves the chord to another one, which
enqueues the body again. Most bodies have the ids of their messages from the time when the chord was made, so the second
message can be told from a first one. A body with a chord in it that only a dispatch makes (a group of chords, a chain
of two) gets new groups each time; its messages are different ones then, and are enqueued again.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

from celery.backends import redis as stock
from kombu.utils.encoding import bytes_to_str

# Of 128 bits, no two in the hour for which they are known will ever be the same.
NAME_BYTES = 16


# A complete chord is dispatched by every part that comes back and finds it so, the last one or one that is run again.
# With Celery's script only the first may, until its right to it expires: it may have died over it, or never have got
# the answer, and whoever comes meanwhile is acknowledged and never comes back (celery 5.7). That the body is enqueued
# once is seen to by message_name, under a name for this run of the chord, which is kept until its end.
RIGHT = "redis.call('SET', ckey, claim_token, 'NX', 'EX', claim_expires)"
ANSWER = "return {readycount, totaldiff, size, claimed}"
RUN = """
if claimed == 0 then
    return {readycount, totaldiff, size, claimed, ''}
end
redis.call('SET', KEYS[7], claim_token, 'NX')
if expires > 0 then
    redis.call('EXPIRE', KEYS[7], expires)
end
return {readycount, totaldiff, size, claimed, redis.call('GET', KEYS[7])}
"""
CHORD_PART_SCRIPT = stock.CHORD_PART_RETURN_LUA.replace(RIGHT, RIGHT.replace("'NX', ", "")).replace(ANSWER, RUN)
END = "redis.call('DEL', jkey, tkey, skey, dkey)"
CHORD_END_SCRIPT = stock.CHORD_CLEANUP_LUA.replace(END, END.replace("dkey)", "dkey, KEYS[6])"))


class _Dispatch(threading.local):
    """The run of a chord that this thread dispatches; "" for none."""

    run = ""


_dispatch = _Dispatch()


@contextmanager
def dispatch_chord(run: str = "") -> Iterator[None]:
    """Inside, this thread dispatches a chord, the run of which `set_run` gives; "" for none yet, or for no chord."""
    before, _dispatch.run = _dispatch.run, run
    try:
        yield
    finally:
        _dispatch.run = before


def set_run(run: str) -> None:
    """Set which run of which chord this thread dispatches: the same chord may be sent again."""
    _dispatch.run = run


def message_name(message: dict[str, Any]) -> str:
    """A name for a message that is the same in every worker that dispatches it; "" outside a dispatch."""
    headers = message.get("headers", {})
    if not _dispatch.run or not headers.get("id"):
        return ""
    # The same task may stand in a group more than once.
    parts = (_dispatch.run, headers["id"], headers.get("group"), headers.get("group_index"))
    return blake2b(repr(parts).encode(), digest_size=NAME_BYTES).hexdigest()


def run_key(results: bytes | str) -> str:
    """The key for the name of a chord's run, beside that of its parts' results."""
    return bytes_to_str(results).removesuffix(".j") + ".run"  # type: ignore[no-any-return]
