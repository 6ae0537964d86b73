"""Which tasks Redis holds, whatever the key, and of whose start it knows.

`python -m tests.chaos.census` prints them where the broker is at hand.
"""

from __future__ import annotations

import json
import re
from typing import Any

# A message carries the id of its task in its headers; kombu's records hold messages as JSON within JSON.
TASK_ID = re.compile(rb'"id\\*": ?\\*"(chaos-[\w-]+)')
# What is parked is at its end.
PARKED = b"dead_letter"
# Everything that is kept, at one moment: a message that moves meanwhile would be seen nowhere.
EVERY_VALUE = """
local reads = {list = 'lrange', zset = 'zrange', hash = 'hvals', set = 'smembers', string = 'mget'}
local found = {}
for _, key in ipairs(redis.call('keys', '*')) do
    local read = reads[redis.call('type', key).ok]
    if read and string.sub(key, 1, #ARGV[1]) ~= ARGV[1] then
        local ranged = read == 'lrange' or read == 'zrange'
        for _, value in ipairs(ranged and redis.call(read, key, 0, -1) or redis.call(read, key)) do
            found[#found + 1] = value
        end
    end
end
return found
"""


def tasks_in(client: Any) -> set[str]:
    """The tasks whose message is anywhere in this database, unless it is parked."""
    values = client.eval(EVERY_VALUE, 0, PARKED)
    return {match.decode() for value in values for match in TASK_ID.findall(value)}


def told_in(client: Any) -> set[str]:
    """The tasks that workers hold and of whose start Redis has been told."""
    if not (tags := list(client.smembers("unacked_started"))):
        return set()
    records = [record or b"" for record in client.hmget("unacked", tags)]
    return {match.decode() for record in records for match in TASK_ID.findall(record)[:1]}


def main() -> None:
    """Print the tasks and the number of dead letters, as JSON."""
    from config import load
    from services.broker.client import connect

    settings = load()
    client = connect(settings.broker_url, settings)
    told, tasks, parked = sorted(told_in(client)), sorted(tasks_in(client)), client.zcard("dead_letters")
    print(json.dumps({"tasks": tasks, "told": told, "parked": parked}))


if __name__ == "__main__":
    main()
