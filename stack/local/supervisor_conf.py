"""The configuration of the local Supervisor: the node of worker.conf once for each worker, the rest from local.conf.

Paths in it are relative to the checkout, in which Supervisor runs: the checkout's own may have a %, which Supervisor
expands, and a ; or a #, which begin a comment.
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
from stack.fingerprints import hash_files, hash_texts
from stack.local.environment import TASKS_FILE
from stack.paths import ROOT

TEMPLATES = ROOT / "docker" / "supervisor"
# What supervisord loads of ours.
PLUG_IN = ROOT / "services" / "supervisor"
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
    workers = [_make_worker(number) for number in range(1, settings.stack.workers + 1)]
    text = "\n".join([_split_template()[0], *workers, programs])
    return _add_fingerprints(_fill_in(text, settings), settings)


def hash_own_parts(settings: Settings) -> str:
    """A hash of what only a new Supervisor takes up: its own sections, and our code that runs inside it."""
    head = _fill_in(_split_template()[0], settings)
    return hash_files(PLUG_IN, extra=head)


def has_flower_port(port: int) -> bool:
    """Whether the last configuration has Flower listen on a port; True as well where there is none any more."""
    try:
        return f" --port={port} " in paths.SUPERVISOR_CONF.read_text()
    except FileNotFoundError:
        return True


def _split_template() -> tuple[str, str]:
    """worker.conf: the sections of Supervisor itself, and the node."""
    head, node = (TEMPLATES / "worker.conf").read_text().split(NODES)
    log = SUPERVISOR_LOG.format(log=_make_relative(paths.SUPERVISOR_LOG))
    return _replace(head, SUPERVISOR_CONTAINER_LOG, log), node


def _make_worker(number: int) -> str:
    """The section of worker `number`, whose nodes have its name."""
    name = f"worker{number}"
    node = _replace(_split_template()[1], "node%(process_num)d", f"{name}-node%(process_num)d")
    log = f"%(ENV_STALK_LOG_DIR)s/{name}-node%(process_num)d.log"
    return f"[program:{name}]{_replace(node, CONTAINER_LOG, PROCESS_LOG.format(log=log))}"


def _replace(text: str, old: str, new: str) -> str:
    if old not in text:
        raise ValueError(f"docker/supervisor/worker.conf has no {old!r} any more")
    return text.replace(old, new)


def _fill_in(text: str, settings: Settings) -> str:
    """`text` with every %(ENV_NAME)s replaced by its value, so that Supervisor notices when a value changes."""
    python = shlex.quote(os.path.relpath(sys.executable, ROOT))
    values = supervisor_values(settings) | {
        "STALK_RUN_DIR": _make_relative(paths.RUN),
        "STALK_LOG_DIR": _make_relative(paths.LOGS),
        "STALK_PYTHON": python,
        "STALK_NODE_COMMAND": f"{python} -m stack.child node",
        # Docker would start a container again that has ended; here nobody would.
        "STALK_ON_FATAL": "retry",
        "STALK_FLOWER_ADDRESS": settings.flower.bind.strip("[]"),
        "STALK_FLOWER_PORT": str(settings.flower.port),
        "STALK_FLOWER_DATABASE": _make_relative(paths.FLOWER_DATA / "flower.db"),
    }
    return re.sub(r"%\(ENV_(\w+)\)s", lambda match: values[match[1]].replace("%", "%%"), text)


def _make_relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _add_fingerprints(text: str, settings: Settings) -> str:
    """`text` with a hash in each program of what it runs on: Supervisor restarts a program whose section changes."""
    # The groups of variables that compose.yaml gives to each service.
    shared = _format_values(settings.broker, settings.results, settings.tasks, settings.beat)
    code = hash_files(ROOT / "config", ROOT / "services", ROOT / "requirements")
    own = hash_files(TASKS_FILE)
    password = settings.broker.password.get_secret_value()
    stack = settings.stack
    redis = (password, stack.redis_maxmemory, stack.redis_tls_bind, stack.redis_tls_port)
    hashes = {
        "redis": hash_files(ROOT / "docker" / "redis", paths.REDIS_TLS, extra=repr(redis)),
        "beat": hash_texts(code, own, shared),
        "flower": hash_texts(code, shared, _format_values(settings.flower)),
        "worker": hash_texts(code, own, shared, _format_values(settings.worker)),
    }

    def add(match: re.Match[str]) -> str:
        return f'{match[0]}\nenvironment=STALK_FINGERPRINT="{hashes[match[1]]}"'

    return re.sub(r"^\[program:([a-z]+)\d*\]$", add, text, flags=re.MULTILINE)


def _format_values(*groups: Group) -> str:
    return repr([(name, _reveal(value)) for group in groups for name, value in group])


def _reveal(value: object) -> object:
    """A value with its passwords, which its repr() hides: a change of one has to change the hash."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return value.text() if isinstance(value, RedisUrl) else value
