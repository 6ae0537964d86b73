"""The environment variables of the local stack's programs: as in containers, settings and .env.tasks, not the shell's.

`make up` writes them down, and stack/child.py starts each program with them: a Supervisor that has run for a month
still starts its programs with those of the last `make up`.
"""

from collections.abc import Mapping
from dataclasses import replace

from config import Settings, child_environment
from config.environment import process_environment, read_env_file
from config.settings import SECRETS, VARIABLES
from stack import paths
from stack.env_file import ENV_FILE
from stack.paths import ROOT

TASKS_FILE = ROOT / ".env.tasks"
# What programs need of the host that they run on; an image has its own. Everything else comes from .env and .env.tasks:
# a task must not work only because of the shell from which the stack was once started.
HOST = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE",
    "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy",
    "https_proxy", "no_proxy", "all_proxy",
)  # fmt: skip
# Prefixes of the variables that an interpreter and its libraries read once, when they start.
AT_START = ("PYTHON", "LD_", "LC_", "LANG", "MALLOC_", "GLIBC_", "OPENSSL_")


def collect_for_programs(settings: Settings) -> dict[str, dict[str, str]]:
    """The variables of programs: `all` for every one, `own` for nodes and beat besides.

    Raises ConfigError when .env.tasks cannot be read.
    """
    shell = process_environment()
    passed = {*HOST, *VARIABLES, *(f"{name}_FILE" for name in SECRETS)}
    given = {name: value for name, value in shell.items() if name in passed or name.startswith("LC_")}
    stack = {"TMPDIR": str(paths.SCRATCH)} | make_stack_variables(settings)
    return {"all": given | stack, "own": read_own_variables(settings)}


def collect_for_commands(settings: Settings) -> dict[str, str]:
    """The variables of a command that somebody runs beside the stack: those of the shell too.

    Raises ConfigError when .env.tasks cannot be read.
    """
    return child_environment(VARIABLES) | read_own_variables(settings) | make_stack_variables(settings)


def make_stack_variables(settings: Settings) -> dict[str, str]:
    """The variables that say where the stack has its files and its own Redis."""
    values = {"STALK_RUN_DIR": str(paths.RUN), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if not settings.stack.redis_replicas:
        return values
    for name, url in (("CELERY_BROKER_URL", settings.broker.url), ("CELERY_RESULT_BACKEND", settings.results.url)):
        # The default names the redis container; here it is a socket.
        if url.server == VARIABLES[name].default.server:
            here = replace(url, scheme="redis+socket", hosts=(), socket_path=str(paths.REDIS_SOCKET))
            values |= {name: here.text(), f"{name}_FILE": ""}
    return values


def read_own_variables(settings: Settings) -> dict[str, str]:
    """The user's own variables: those of .env.tasks that neither .env nor the shell sets, as in compose.yaml.

    Raises ConfigError when it cannot be read.
    """
    from_shell = set(VARIABLES) & set(process_environment())
    taken = {*read_env_file(ENV_FILE), *make_stack_variables(settings), *from_shell}
    return {name: value for name, value in read_env_file(TASKS_FILE).items() if name not in taken}


def needs_new_interpreter(variables: Mapping[str, str]) -> bool:
    """Whether an interpreter that starts with these variables would be another one than this."""
    ours = process_environment()
    differ = {name for name, _ in ours.items() ^ variables.items()}
    # Output is flushed at the end, and the checkout is on the path of this process already.
    differ -= {"PYTHONUNBUFFERED"} | ({"PYTHONPATH"} - set(ours))
    return any(name.startswith(AT_START) for name in differ)
