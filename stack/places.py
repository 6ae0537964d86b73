"""Where the state of this checkout lives: .stalk/, which is no configuration and is never copied between hosts."""

from __future__ import annotations

from stack.docker import ROOT

STATE = ROOT / ".stalk"
RUNTIME_FILE = STATE / "runtime"
RUN = STATE / "run"
LOGS = STATE / "log"
REDIS_DATA = STATE / "redis"
FLOWER_DATA = STATE / "flower"
REDIS_SOCKET = RUN / "redis.sock"
SUPERVISOR_SOCKET = RUN / "supervisor.sock"
SUPERVISOR_CONF = RUN / "supervisord.conf"
