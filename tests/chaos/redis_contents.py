"""The tasks that the broker's Redis holds, under whatever key, and those that it knows to have started.

`python -m tests.chaos.redis_contents` prints them where the broker is at hand.
"""

import json
import re
from typing import Any

# A message carries the id of its task in its headers; kombu's records hold messages as JSON within JSON.
TASK_ID = re.compile(rb'"id\\*": ?\\*"(chaos-[\w-]+)')
# Parked tasks are not waiting any more.
PARKED = b"dead_letter"
# All values at one moment: a message that moves between two reads would be in neither.
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


def find_tasks(client: Any) -> set[str]:
    """Tasks whose message is anywhere in this database, unless it is a dead letter."""
    values = client.eval(EVERY_VALUE, 0, PARKED)
    return {match.decode() for value in values for match in TASK_ID.findall(value)}


def find_started(client: Any) -> set[str]:
    """Tasks that workers hold and have recorded in Redis as started."""
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
    tasks, started = sorted(find_tasks(client)), sorted(find_started(client))
    print(json.dumps({"tasks": tasks, "started": started, "parked": client.zcard("dead_letters")}))


if __name__ == "__main__":
    main()
