"""docs/connect.md, read and carried out as it is printed, and the stacks that its readers connect to."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.stack.containers.deployment import ROOT, Stack, environment
from tests.stack.deployment import run
from tests.stack.processes.deployment import Local

PAGE = ROOT / "docs" / "connect.md"
BLOCK = re.compile(r"<!-- test: ([a-z-]+) -->\n```[a-z]+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What every reader of the page replaces by something of their own.
ADDRESS, PORT, TLS_PORT, CHECKOUT = "192.0.2.10", ":6379", ":6380", "/srv/stalk"
# The longest command is a first `make up`, on a machine that is busy with much else.
COMMAND_SECONDS = 900
# A copy shares the checkout's .venv, and a test must not set about installing it anew.
MAKE = 'make() { command make --old-file=.venv/ready "$@"; }\n'

Replaced = Mapping[str, str]


def printed(name: str, replaced: Replaced) -> str:
    """A block of the page, with names of the reader's own."""
    text: str = dict(BLOCK.findall(PAGE.read_text()))[name]
    for old, new in replaced.items():
        text = text.replace(old, new)
    # An address that somebody else may have.
    assert ADDRESS not in text, f"block {name} needs an address in place of {ADDRESS}"
    return text


def typed(name: str, replaced: Replaced) -> str:
    """The commands of a console block."""
    lines = printed(name, replaced).splitlines()
    found = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    assert found, f"block {name} has no command"
    return "\n".join(found) + "\n"


def carry_out(name: str, directory: Path, variables: Mapping[str, str], replaced: Replaced, then: str = "") -> str:
    """Type the commands of a block into a shell, and `then`; what they print."""
    script = MAKE + typed(name, replaced) + then
    done = run(["bash", "-euo", "pipefail", "-c", script], directory, variables, COMMAND_SECONDS)
    assert done.returncode == 0, f"block {name} exited with {done.returncode}\n{script}\n{done.stdout}{done.stderr}"
    return done.stdout


def urls(name: str, directory: Path, variables: Mapping[str, str], replaced: Replaced) -> dict[str, str]:
    """The variables that a block exports."""
    names = ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND")
    values = carry_out(name, directory, variables, replaced, "".join(f'echo "${name}"\n' for name in names))
    return dict(zip(names, values.splitlines(), strict=True))


def on_host(**variables: str) -> dict[str, str]:
    """The environment of a program beside the stack: what it needs on this machine, and variables of its own."""
    return environment(**variables)


def python(variables: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in this checkout, with the examples to import from."""
    command = [sys.executable, *arguments]
    return run(command, ROOT, {**variables, "PYTHONPATH": str(ROOT / "examples")}, COMMAND_SECONDS)


def names(stack: Stack) -> dict[str, str]:
    """What Docker calls things, which on the page belong to the project `stalk`."""
    broker = "broker-1"
    return {
        "stalk_broker": stack.network(broker)["Name"],
        "stalk_published": f"{stack.project}_published",
        "stalk-redis-1": f"{stack.project}-redis-1",
    }


@contextmanager
def changed(stack: Stack, lines: str, **ports: str) -> Iterator[None]:
    """The stack with these lines at the end of its .env, until somebody goes back as the page says."""
    before, settings = stack.env_file.read_text(), dict(stack.settings)
    stack.set_variables(lines)
    stack.settings.update(ports)
    try:
        yield
    finally:
        stack.env_file.write_text(before)
        stack.settings.clear()
        stack.settings.update(settings)
        carry_out("host-back", stack.directory, stack.environment(), names(stack))


@contextmanager
def local_stack(name: str = "checkout", **settings: str) -> Iterator[Local]:
    """A copy of the checkout for a stack of processes, which is gone afterwards."""
    # Below pytest's own directories the path of a socket would be too long.
    with tempfile.TemporaryDirectory(prefix="stalk-") as base:
        local = Local(Path(base), name, CELERY_IMPORTS="", **settings)
        try:
            yield local
        finally:
            local.make("clean", check=False, YES="1")
