"""The configuration of the local Supervisor: the node of worker.conf once for each worker, the rest from local.conf.

Paths in it are relative to the checkout, in which Supervisor runs: the checkout's own may have a %, which Supervisor
expands, and a ; or a #, which begin a comment.
"""

import os
import re
import shlex
import sys
from configparser import ConfigParser
from io import StringIO
from pathlib import Path
from string import digits

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
# Three files of 10 MB each, as compose.yaml has it.
LOG_FILES = {"stdout_logfile_maxbytes": "10MB", "stdout_logfile_backups": "2"}
PROGRAM, NODE = "program:", "node%(process_num)d"


def render(settings: Settings) -> str:
    """The whole configuration."""
    parser = _read_templates()
    node = parser[f"{PROGRAM}node"].items()
    for name in (f"worker{number}" for number in range(1, settings.stack.workers + 1)):
        parser[PROGRAM + name] = {option: value.replace(NODE, f"{name}-{NODE}") for option, value in node}
    parser.remove_section(f"{PROGRAM}node")
    if not settings.stack.redis_replicas:
        parser.remove_section(f"{PROGRAM}redis")
    hashes = _hash_programs(settings)
    for name in (section.removeprefix(PROGRAM) for section in parser.sections() if section.startswith(PROGRAM)):
        program = parser[PROGRAM + name]
        log = paths.LOGS / f"{program.get('process_name', name)}.log"
        program.update(LOG_FILES, stdout_logfile=_make_relative(log))
        program["environment"] = f'STALK_FINGERPRINT="{hashes[name.rstrip(digits)]}"'
    return _write(parser, settings)


def hash_own_parts(settings: Settings) -> str:
    """A hash of what only a new Supervisor takes up: its own sections, and our code that runs inside it."""
    parser = _read_templates()
    for section in parser.sections():
        if section.startswith(PROGRAM):
            parser.remove_section(section)
    return hash_files(PLUG_IN, extra=_write(parser, settings))


def has_flower_port(port: int) -> bool:
    """Whether the last configuration has Flower listen on a port; True as well where there is none any more."""
    try:
        return f" --port={port} " in paths.SUPERVISOR_CONF.read_text()
    except FileNotFoundError:
        return True


def _read_templates() -> ConfigParser:
    """Both templates, with the log of Supervisor in a file: in a container it has none."""
    parser = ConfigParser(interpolation=None, delimiters=["="])
    parser.read([TEMPLATES / "worker.conf", TEMPLATES / "local.conf"])
    log = {"logfile": _make_relative(paths.SUPERVISOR_LOG), "logfile_maxbytes": "10MB", "logfile_backups": "2"}
    parser["supervisord"].update(log, silent="true")
    return parser


def _write(parser: ConfigParser, settings: Settings) -> str:
    """The text of `parser`, every %(ENV_NAME)s replaced by its value, so that Supervisor notices a changed value."""
    text = StringIO()
    parser.write(text)
    python = shlex.quote(os.path.relpath(sys.executable, ROOT))
    values = supervisor_values(settings) | {
        "STALK_RUN_DIR": _make_relative(paths.RUN),
        "STALK_PYTHON": python,
        "STALK_NODE_COMMAND": f"{python} -m stack.child node",
        # Docker would start a container again that has ended; here nobody would.
        "STALK_ON_FATAL": "retry",
        "STALK_FLOWER_ADDRESS": settings.flower.bind.strip("[]"),
        "STALK_FLOWER_PORT": str(settings.flower.port),
        "STALK_FLOWER_DATABASE": _make_relative(paths.FLOWER_DATA / "flower.db"),
    }
    return re.sub(r"%\(ENV_(\w+)\)s", lambda match: values[match[1]].replace("%", "%%"), text.getvalue())


def _make_relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _hash_programs(settings: Settings) -> dict[str, str]:
    """A hash, for each kind of program, of what it runs on: Supervisor restarts a program whose section changes."""
    # The groups of variables that compose.yaml gives to each service.
    shared = _format_values(settings.broker, settings.results, settings.tasks, settings.beat)
    code = hash_files(ROOT / "config", ROOT / "services", ROOT / "requirements")
    own = hash_files(TASKS_FILE)
    stack = settings.stack
    redis = (_reveal(settings.broker.password), stack.redis_maxmemory, stack.redis_tls_bind, stack.redis_tls_port)
    return {
        "redis": hash_files(ROOT / "docker" / "redis", paths.REDIS_TLS, extra=repr(redis)),
        "beat": hash_texts(code, own, shared),
        "flower": hash_texts(code, shared, _format_values(settings.flower)),
        "worker": hash_texts(code, own, shared, _format_values(settings.worker)),
    }


def _format_values(*groups: Group) -> str:
    return repr([(name, _reveal(value)) for group in groups for name, value in group])


def _reveal(value: object) -> object:
    """A value with its passwords, which its repr() hides: a change of one has to change the hash."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return value.text() if isinstance(value, RedisUrl) else value
