"""The subjects of a run: Stalk, and stock Celery with kombu's own transport and the same settings."""

from collections.abc import Mapping
from dataclasses import dataclass

from services.broker.scripts import ACK, CLAIM, PUBLISH, Script
from tests.support.redis.proxy import Command, Match

POOLS = ("prefork", "threads", "solo")
# Enough that tasks run beside each other, and few enough for two nodes on two cores.
CONCURRENCY = {"prefork": 2, "threads": 4, "solo": 1}
# Tasks that a Stalk node holds for each that it can run: a crash must not count as a delivery of those that wait.
PREFETCH = 4
# Seconds in which a node that was told to stop lets its tasks finish; longer than any task that is meant to finish, and
# than a busy machine stalls.
SOFT_SHUTDOWN = 10
# ARGV of services/broker/lua/claim.lua before its queues; the last of them says how many queues follow.
CLAIM_ARGUMENTS = 5
# So that a task may be longer than the lease.
TIME_LIMIT = 600


@dataclass(frozen=True)
class Subject:
    """A way to run nodes and producers."""

    name: str
    # Module whose `app` producers use.
    app: str

    def node(self, pool: str, hostname: str) -> str:
        """The arguments of Python that start a node."""
        if self.name == "stalk":
            return f"-m services.launch node --hostname={hostname}"
        options = f"--pool={pool} --concurrency={CONCURRENCY[pool]} --hostname={hostname} --loglevel=info"
        return f"-m celery -A {self.app} worker {options} --task-events --without-gossip"


STALK = Subject("stalk", "services.app")
STOCK = Subject("stock", "tests.chaos.workload.stock_app")
SUBJECTS = {subject.name: subject for subject in (STALK, STOCK)}


def settings(pool: str, lease: int) -> dict[str, str]:
    """The variables that decide how a node delivers; those that kombu's own transport needs included."""
    return {
        "CELERY_IMPORTS": "tests.chaos.workload.tasks",
        "CELERY_TASK_TIME_LIMIT": str(TIME_LIMIT),
        "WORKER_LEASE": str(lease),
        "WORKER_POOL": pool,
        "WORKER_CONCURRENCY": str(CONCURRENCY[pool]),
        "WORKER_PREFETCH_MULTIPLIER": str(PREFETCH),
        "WORKER_SOFT_SHUTDOWN": str(SOFT_SHUTDOWN),
        # The least that Stalk accepts for it.
        "WORKER_STOP_GRACE_PERIOD": str(SOFT_SHUTDOWN + 15),
    }


# Commands on the wire.


def is_script(command: Command, script: Script) -> bool:
    """Whether the command runs this script of Stalk."""
    return command.name in (b"EVALSHA", b"EVAL") and command.words[1] in (script.sha.encode(), script.text.encode())


def is_claim(command: Command, reply: bytes) -> bool:
    """Whether the reply brings a message to a worker."""
    return (command.name == b"BRPOP" or is_script(command, CLAIM)) and b"chaos-" in reply


def is_ack(command: Command, reply: bytes) -> bool:
    """Whether the command acknowledges a message."""
    if is_script(command, CLAIM):
        # It sends acknowledgements as arguments behind its fixed ones and its queues.
        arguments = command.words[3 + int(command.words[2]) :]
        return len(arguments) > CLAIM_ARGUMENTS + int(arguments[CLAIM_ARGUMENTS - 1])
    return is_script(command, ACK) or command.any(lambda each: each.words[:2] == (b"HDEL", b"unacked"))


def is_publish(command: Command, reply: bytes) -> bool:
    """Whether the command publishes a message."""
    return is_script(command, PUBLISH) or command.words[:2] == (b"LPUSH", b"celery")


def is_result(command: Command, reply: bytes) -> bool:
    """Whether the command stores a result."""

    def stores(each: Command) -> bool:
        writes = each.name in (b"SET", b"SETEX", b"EVALSHA", b"EVAL")
        return writes and any(word.startswith(b"celery-task-meta-") for word in each.words)

    return command.any(stores)


REPLIES: Mapping[str, Match] = {"claim": is_claim, "ack": is_ack, "publish": is_publish, "result": is_result}
