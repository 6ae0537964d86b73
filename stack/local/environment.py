"""What the programs of the local stack see: as in containers, their settings and .env.tasks, not somebody's shell.

`make up` writes it down, and stack/child.py starts each program with it: a Supervisor that has run for a month still
starts its programs with what the last `make up` saw.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

from config import Settings, child_environment
from config.environment import process_environment, read_env_file
from config.settings import SECRETS, VARIABLES, BrokerSettings, ResultSettings
from stack import paths
from stack.env_file import ENV_FILE
from stack.paths import ROOT

TASKS_FILE = ROOT / ".env.tasks"
# What programs need of the host they run on; an image has its own. Everything else is in .env or .env.tasks, or not
# there: a task must not work because of the shell from which somebody once started the stack.
HOST = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE",
    "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy",
    "https_proxy", "no_proxy", "all_proxy",
)  # fmt: skip


def of_programs(settings: Settings) -> dict[str, dict[str, str]]:
    """`all`: what every program sees; `own`: what nodes and beat see besides.

    Raises ConfigError when .env.tasks cannot be read.
    """
    shell = process_environment()
    known = {*VARIABLES, *(f"{name}_FILE" for name in SECRETS)}
    host = {name: value for name, value in shell.items() if name in HOST or name.startswith("LC_")}
    asked = {name: value for name, value in shell.items() if name in known}
    scratch = {"TMPDIR": str(paths.SCRATCH)}
    return {"all": host | scratch | asked | of_stack(settings), "own": own_variables(settings)}


def beside(settings: Settings) -> dict[str, str]:
    """What a program sees that somebody runs beside the stack, from a shell of their own."""
    return child_environment(VARIABLES) | own_variables(settings) | of_stack(settings)


def of_stack(settings: Settings) -> dict[str, str]:
    """Where the stack keeps its files, and where its own Redis is."""
    values = {"STALK_RUN_DIR": str(paths.RUN), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if not settings.stack.redis_replicas:
        return values
    for name, group, kind in (
        ("CELERY_BROKER_URL", settings.broker, BrokerSettings),
        ("CELERY_RESULT_BACKEND", settings.results, ResultSettings),
    ):
        # The default names the redis container; here it is a socket.
        if group.url.server == kind.model_fields["url"].default.server:
            here = replace(group.url, scheme="redis+socket", hosts=(), socket_path=str(paths.REDIS_SOCKET))
            values |= {name: here.text(), f"{name}_FILE": ""}
    return values


def own_variables(settings: Settings) -> dict[str, str]:
    """The user's own variables: .env.tasks, less what .env and the shell say themselves, as in compose.yaml.

    Raises ConfigError when it cannot be read.
    """
    taken = {*read_env_file(ENV_FILE), *of_stack(settings), *(set(VARIABLES) & set(process_environment()))}
    return {name: value for name, value in read_env_file(TASKS_FILE).items() if name not in taken}


def write(settings: Settings) -> None:
    """Write down what programs see from now on, for this user alone."""
    new = paths.ENVIRONMENT.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(of_programs(settings), file)
    new.replace(paths.ENVIRONMENT)
