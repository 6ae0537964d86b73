"""`status`: nodes, queue lengths, beat's last tick, and what waits in vain or runs too long."""

from typing import Any

from celery import Celery
from redis import Redis

from services.broker import keys, queue_lengths
from services.broker.client import connect
from services.commands.output import YELLOW, print_line, print_table
from services.pool import overtime

# Nodes answer within milliseconds, a busy solo node not at all: waiting longer does not make the list longer.
ANSWER_SECONDS = 1.0
_FIRST, *_BETWEEN, _LAST = keys.PRIORITY_STEPS
PRIORITIES = f"nodes read {_FIRST}, which is the most urgent, {', '.join(map(str, _BETWEEN))} and {_LAST}"
UNREAD_HELP = "docs/operations.md#tasks-that-nobody-reads"
OVERTIME_HELP = "docs/operations.md#time-limits"


def read_status(app: Celery) -> dict[str, Any]:
    """The state of the stack.

    Raises RedisError, OperationalError or OSError when Redis does not answer.
    """
    # Other programs may keep there what is no text.
    options = {"decode_responses": True, "encoding_errors": "backslashreplace"}
    client = connect(app.settings.broker_url, app.settings, **options)
    # Fails at once, where Celery would try again for a while.
    client.ping()
    nodes, silent = inspect_nodes(app)
    known = queue_lengths.known_queues(client, app)
    consumed = {queue for node in nodes.values() for queue in node["queues"]}
    return {
        "nodes": nodes,
        "silent_nodes": silent,
        "queues": queue_lengths.waiting(client, known),
        "unread": queue_lengths.find_unread(client, known, consumed if nodes and not silent else None),
        "overtime": overtime.read(client),
        "unacked": int(client.hlen(keys.UNACKED)),
        "scheduled": int(client.zcard(keys.SCHEDULED)),
        "dead_letters": int(client.zcard(keys.DEAD_LETTERS)),
        "beat": {"seconds_since_tick": seconds_since_tick(client)},
    }


def inspect_nodes(app: Celery) -> tuple[dict[str, dict[str, Any]], int]:
    """Every node that answers: its pool, its size, what it runs, the queues it consumes; and how many do not answer."""
    with app.connection_for_read() as connection:
        stats = app.control.inspect(timeout=ANSWER_SECONDS, connection=connection).stats() or {}
        silent = max(0, (connection.default_channel.heard or 0) - len(stats))
    if not stats:
        return {}, silent
    inspect = app.control.inspect(destination=list(stats), timeout=ANSWER_SECONDS, limit=len(stats))
    active, consumed = inspect.active() or {}, inspect.active_queues() or {}
    nodes = {
        name: {
            "pool": pool_name(stats[name]["pool"]["implementation"]),
            "concurrency": stats[name]["pool"]["max-concurrency"],
            "running": [{"id": task["id"], "name": task["name"]} for task in active.get(name, [])],
            "queues": sorted(queue["name"] for queue in consumed.get(name) or []),
        }
        for name in sorted(stats)
    }
    # A solo node that has begun a task in between has not said which queues it consumes.
    return nodes, silent + len(stats.keys() - consumed.keys())


def pool_name(implementation: str) -> str:
    """What WORKER_POOL calls the pool of this class, such as celery.concurrency.thread:TaskPool."""
    module = implementation.partition(":")[0].rpartition(".")[2]
    return "threads" if module == "thread" else module


def seconds_since_tick(client: Redis) -> float | None:
    """Age of beat's last tick in seconds, read from the lock that each tick renews; None where no beat has it."""
    left = int(client.pttl(keys.BEAT_LOCK))
    return round(keys.BEAT_LOCK_SECONDS - left / 1000, 1) if left >= 0 else None


def print_status(state: dict[str, Any], starting: bool) -> None:
    """Print the state; `starting`: a worker may be about to consume more than is consumed now."""
    nodes = []
    for name, node in state["nodes"].items():
        running = ", ".join(task["name"].rpartition(".")[2] for task in node["running"])
        nodes.append((name, node["pool"], str(node["concurrency"]), running or "-", ", ".join(node["queues"])))
    print_table(nodes, header=("Node", "Pool", "Size", "Running", "Queues"))
    queues = state["queues"] | {
        "held by workers (unacked)": state["unacked"],
        "wait for their time (scheduled)": state["scheduled"],
    }
    print_table(((name, str(length)) for name, length in queues.items()), header=("Queue", "Waiting"))
    for problem in find_problems(state, starting):
        print_line(problem, YELLOW)
    seconds = state["beat"]["seconds_since_tick"]
    print("Beat: no tick, no beat holds the lock" if seconds is None else f"Beat: last tick {seconds} s ago")
    if count := state["dead_letters"]:
        print_line(f"Dead letters: {count}, see 'make dead-letters'", YELLOW)


def find_problems(state: dict[str, Any], starting: bool) -> list[str]:
    """What waits in vain and what runs too long, a sentence each."""
    found = []
    if not state["nodes"] and not state["silent_nodes"]:
        waiting = ", ".join(f"{length} in {name}" for name, length in state["queues"].items() if length)
        found.append(f"No node answers{' yet' if starting else ''}; what waits: {waiting or 'nothing'}.")
    if silent := state["silent_nodes"]:
        found.append(f"Nodes that do not answer, such as a solo pool at work: {silent}. What they read is not known.")
    for one in state["unread"]:
        priority = f", priority {one['priority']} ({PRIORITIES})" if one["priority"] else ""
        soon = ", unless a worker that starts does" if starting else ""
        tasks = f"{one['waiting']} task{' waits' if one['waiting'] == 1 else 's wait'}"
        found.append(f"No node reads {one['queue']}{priority}{soon}: {tasks} there, see {UNREAD_HELP}")
    for one in state["overtime"]:
        task, ran, limit = f"{one['name']}[{one['id']}]", f"{one['seconds']:g} s", f"{one['limit']:g} s"
        found.append(f"{one['node']} runs {task} for {ran}, and its limit is {limit}: see {OVERTIME_HELP}")
    return found
