"""Where the state of this checkout lives: .stalk/, which is no configuration and is never copied between hosts."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What worker, beat and Flower run; docker/Dockerfile copies the same.
SOURCE = ("config", "services")
STATE = ROOT / ".stalk"
RUNTIME_FILE = STATE / "runtime"
# What `make dev` adds to compose.yaml, while it is in force.
DEV_COMPOSE = STATE / "dev.json"
# Locked by the command that changes the stack.
LOCK = STATE / "lock"
RUN = STATE / "run"
# /tmp of the stack's programs: removed with them, as in a container.
SCRATCH = STATE / "tmp"
LOGS = STATE / "log"
REDIS_DATA = STATE / "redis"
FLOWER_DATA = STATE / "flower"
# Locked by the Redis that has the data.
REDIS_LOCK = REDIS_DATA / "lock"
REDIS_VERSION = REDIS_DATA / "version"
# Certificates, made by docker/certificates.
REDIS_TLS = STATE / "tls"
REDIS_SOCKET = RUN / "redis.sock"
# A link to the server, which checks a file where it is called by this name.
REDIS_CHECK_AOF = RUN / "redis-check-aof"
SUPERVISOR_SOCKET = RUN / "supervisor.sock"
SUPERVISOR_CONF = RUN / "supervisord.conf"
SUPERVISOR_LOG = LOGS / "supervisord.log"
# Which session of the kernel the stack's processes are in; not in RUN, which may be deleted while they run.
SESSION = STATE / "session"
# The environment variables of the stack's processes.
ENVIRONMENT = RUN / "environment.json"
