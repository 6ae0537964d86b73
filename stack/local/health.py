"""The health of the local stack's programs, by the rules of Docker's health checks."""

import os
import time

import redis

from config import Settings
from services.supervisor.heartbeat_file import OLDEST_SECONDS, STARTING, STUCK, HeartbeatFile
from services.supervisor.proc_stat import read_stat
from stack import paths

# Redis answers within milliseconds; one that does not is loading a file or hangs.
ANSWER_SECONDS = 10


def read_heartbeat_health(name: str, pid: int) -> str:
    """The health of a node, beat or Flower, as docker/healthcheck has it."""
    # The age of the process first: whoever is interrupted after that takes a heartbeat for one of the process before,
    # and never the other way round.
    running = measure_age(pid)
    word, touched = HeartbeatFile(paths.RUN, name).read()
    age = time.time() - touched
    if age > running or word == STARTING:
        return "starting"
    return "healthy" if word not in (STUCK, "") and age <= OLDEST_SECONDS else "unhealthy"


def measure_age(pid: int) -> float:
    """Seconds since a process was started; 0 when it is gone."""
    stat = read_stat(pid)
    if not stat or stat.ended:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - stat.born / os.sysconf("SC_CLK_TCK")


def ask_redis_health(settings: Settings) -> str:
    """The health of Redis, as docker/redis/healthcheck has it: healthy when its last write to disk succeeded."""
    password = settings.broker.password.get_secret_value()
    try:
        with redis.Redis(
            unix_socket_path=str(paths.REDIS_SOCKET), password=password, socket_timeout=ANSWER_SECONDS
        ) as client:
            state = client.info("persistence")
    except (redis.RedisError, OSError):
        return "starting"
    if state.get("loading"):
        return "starting"
    return "healthy" if state.get("aof_last_write_status") == "ok" else "unhealthy"
