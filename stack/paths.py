"""Where the state of this checkout lives: .stalk/, which is no configuration and is never copied between hosts."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What worker, beat and Flower run; docker/Dockerfile copies the same.
SOURCE = ("config", "services")
STATE = ROOT / ".stalk"
RUNTIME_FILE = STATE / "runtime"
# What `make dev` adds to compose.yaml, while it is in force.
DEV_COMPOSE = STATE / "dev.json"
# Held by the command that changes the stack.
LOCK = STATE / "lock"
RUN = STATE / "run"
# What programs take for /tmp: gone with them, as in a container.
SCRATCH = STATE / "tmp"
LOGS = STATE / "log"
REDIS_DATA = STATE / "redis"
FLOWER_DATA = STATE / "flower"
# Held by the Redis that has the data.
REDIS_LOCK = REDIS_DATA / "lock"
REDIS_VERSION = REDIS_DATA / "version"
# What docker/certificates makes.
REDIS_TLS = STATE / "tls"
REDIS_SOCKET = RUN / "redis.sock"
# The same program as the server, which looks at the name that it is called by.
REDIS_CHECK_AOF = RUN / "redis-check-aof"
SUPERVISOR_SOCKET = RUN / "supervisor.sock"
SUPERVISOR_CONF = RUN / "supervisord.conf"
SUPERVISOR_LOG = LOGS / "supervisord.log"
# Which session of the kernel the stack's processes are; not in RUN, which may be deleted while they run.
SESSION = STATE / "session"
# What the stack's processes see of the shell, of .env.tasks and of each other.
ENVIRONMENT = RUN / "environment.json"
