"""What the local Supervisor is told: the node of worker.conf once for each worker, and the rest from local.conf.

Paths are relative to the checkout, from which Supervisor runs: it expands %, and ; and # begin comments.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from pydantic import SecretStr

from config import Settings
from config.redis_url import RedisUrl
from config.settings import Group
from services.launch import supervisor_values
from stack import paths
from stack.fingerprints import digest, fingerprint
from stack.local.environment import TASKS_FILE
from stack.paths import ROOT

TEMPLATES = ROOT / "docker" / "supervisor"
NODES = "[program:node]"
CONTAINER_LOG = "stdout_logfile=/dev/stdout\nstdout_logfile_maxbytes=0\n"
# Three files of 10 MB each, as compose.yaml has it.
PROCESS_LOG = "stdout_logfile={log}\nstdout_logfile_maxbytes=10MB\nstdout_logfile_backups=2\n"
SUPERVISOR_CONTAINER_LOG = "silent=false\nlogfile=/dev/null\nlogfile_maxbytes=0\n"
SUPERVISOR_LOG = "silent=true\nlogfile={log}\nlogfile_maxbytes=10MB\nlogfile_backups=2\n"


def render(settings: Settings) -> str:
    """The whole configuration."""
    programs = (TEMPLATES / "local.conf").read_text()
    if not settings.stack.redis_replicas:
        programs = re.sub(r"\[program:redis\].*?(?=\n\[|\Z)", "", programs, flags=re.DOTALL)
    workers = [_worker(number) for number in range(1, settings.stack.workers + 1)]
    text = "\n".join([_template()[0], *workers, programs])
    return _with_fingerprints(_bind(text, settings), settings)


def kind(settings: Settings) -> str:
    """Changes with what only a new Supervisor takes up: its own settings, and the code that runs inside it."""
    head = _bind(_template()[0], settings)
    return fingerprint(ROOT / "services" / "watchdog.py", ROOT / "services" / "supervise.py", extra=head)


def publishes(port: int) -> bool:
    """Whether this checkout's Flower was last told to listen on a port, or nobody knows on which."""
    try:
        return f" --port={port} " in paths.SUPERVISOR_CONF.read_text()
    except FileNotFoundError:
        return True


def _template() -> tuple[str, str]:
    """worker.conf: what is before the node, and the node."""
    head, node = (TEMPLATES / "worker.conf").read_text().split(NODES)
    return _replaced(head, SUPERVISOR_CONTAINER_LOG, SUPERVISOR_LOG.format(log=_path(paths.SUPERVISOR_LOG))), node


def _worker(number: int) -> str:
    """The nodes as those of worker `number`."""
    name = f"worker{number}"
    node = _replaced(_template()[1], "node%(process_num)d", f"{name}-node%(process_num)d")
    log = f"%(ENV_STALK_LOG_DIR)s/{name}-node%(process_num)d.log"
    return f"[program:{name}]{_replaced(node, CONTAINER_LOG, PROCESS_LOG.format(log=log))}"


def _replaced(text: str, old: str, new: str) -> str:
    if old not in text:
        raise ValueError(f"docker/supervisor/worker.conf has no {old!r} any more")
    return text.replace(old, new)


def _bind(text: str, settings: Settings) -> str:
    """`text` with every %(ENV_NAME)s replaced; Supervisor sees values, so that it notices when one changes."""
    python = shlex.quote(os.path.relpath(sys.executable, ROOT))
    values = supervisor_values(settings) | {
        "STALK_RUN_DIR": _path(paths.RUN),
        "STALK_LOG_DIR": _path(paths.LOGS),
        "STALK_PYTHON": python,
        "STALK_NODE_COMMAND": f"{python} -m stack.child node",
        # A container ends and is started again by Docker; here nobody would do that.
        "STALK_ON_FATAL": "retry",
        "STALK_FLOWER_ADDRESS": settings.flower.bind.strip("[]"),
        "STALK_FLOWER_PORT": str(settings.flower.port),
        "STALK_FLOWER_DATABASE": _path(paths.FLOWER_DATA / "flower.db"),
    }
    return re.sub(r"%\(ENV_(\w+)\)s", lambda match: values[match[1]].replace("%", "%%"), text)


def _path(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _with_fingerprints(text: str, settings: Settings) -> str:
    """Every program with a hash of what it runs on, so that Supervisor takes it for changed when that changes."""
    # The groups of variables that compose.yaml gives to each service.
    shared = _values(settings.broker, settings.results, settings.tasks, settings.beat)
    code = fingerprint(ROOT / "config", ROOT / "services", ROOT / "requirements")
    own = fingerprint(TASKS_FILE)
    password = settings.broker.password.get_secret_value()
    stack = settings.stack
    redis = (password, stack.redis_maxmemory, stack.redis_tls_bind, stack.redis_tls_port)
    hashes = {
        "redis": fingerprint(ROOT / "docker" / "redis", paths.REDIS_TLS, extra=repr(redis)),
        "beat": digest(code, own, shared),
        "flower": digest(code, shared, _values(settings.flower)),
        "worker": digest(code, own, shared, _values(settings.worker)),
    }

    def add(match: re.Match[str]) -> str:
        return f'{match[0]}\nenvironment=STALK_FINGERPRINT="{hashes[match[1]]}"'

    return re.sub(r"^\[program:([a-z]+)\d*\]$", add, text, flags=re.MULTILINE)


def _values(*groups: Group) -> str:
    return repr([(name, _shown(value)) for group in groups for name, value in group])


def _shown(value: object) -> object:
    """A value as it has to be hashed: a password is no part of its repr()."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return value.text() if isinstance(value, RedisUrl) else value
