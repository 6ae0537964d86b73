"""`celery -A services.app …`: refuse the commands that cannot work here, with exit code 2 and what to use instead.

docs/operations.md has a table of all commands; tests/integration/commands/test_celery_cli.py compares it with Celery's.
"""

import inspect
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import click
from celery.exceptions import CeleryCommandException
from celery.worker.control import Panel

BAD_COMMAND = 2
# Command, or a command and its method → why it is refused.
REFUSED = {
    "amqp": "it speaks AMQP, and Stalk's tasks are in Redis: `make status` shows queues, `celery purge` empties one",
    "flower": "it would serve Flower without Stalk's login and masks: `make up` starts Flower, and so does "
    "`python -m services.launch flower`",
    "logtool": "it reads a log format of Celery's that Stalk's nodes do not write: use `make logs`",
    "migrate": "it copies by a transport that can lose tasks, and not what waits in Redis for its time: use "
    "`make to-plain`, or copy the data as docs/operations.md says",
    "upgrade": "it rewrites a file of settings, and Stalk's are environment variables: see docs/configuration.md",
    "control election": "it lets nodes choose one among them for a job, and Stalk has no such job: nodes elect nobody",
    "control pool_restart": "Stalk's pools cannot be replaced: `celery control shutdown` ends a node when its tasks "
    "have finished, and Supervisor, in the stack, starts it again",
}
# Method of inspect → the package that a node needs to answer it. Nodes have the packages that this process has.
NEEDS = {"memdump": "psutil", "memsample": "psutil", "objgraph": "objgraph"}


class Gate(click.Option):
    """A hidden option that Celery adds to each of its commands (app.user_options); parsing it checks all arguments."""

    def __init__(self) -> None:
        super().__init__(["--stalk-gate"], is_flag=True, hidden=True, is_eager=True, expose_value=False)

    def handle_parse_result(self, ctx: Any, opts: Any, args: list[str]) -> Any:
        name = ctx.command.name
        if not ctx.resilient_parsing:
            _check(name, opts.get("command"), args)
        if name == "graph" and args[:1] == ["workers"]:
            # Celery would print the URL of the result backend with its password (celery 5.7).
            args = [*args[:1], f"backend:{ctx.obj.app.settings.result_url.mask()}", *args[1:]]
        return super().handle_parse_result(ctx, opts, args)


def _check(name: str, method: str | None, arguments: Sequence[str]) -> None:
    """Raise CeleryCommandException for a command that cannot work."""
    typed = f"{name} {method}" if name in ("inspect", "control") else name
    if name == "multi" and " " in sys.executable:
        # Celery would split the path at the space (celery 5.7).
        program = sys.executable
        _refuse(typed, f"it cannot start {program}, whose path has a space: move the checkout, or use `make scale`")
    if reason := REFUSED.get(typed):
        _refuse(typed, reason)
    package = NEEDS.get(method or "") if name == "inspect" else None
    if package and not find_spec(package):
        add = "add it to requirements/own.txt, then `make lock` and `make up`"
        _refuse(typed, f"nodes need the package {package} for it: {add}")
    if method and method in Panel.meta and Panel.meta[method].type == name:
        _check_arguments(typed, method, arguments)


def _check_arguments(typed: str, method: str, arguments: Sequence[str]) -> None:
    """Refuse missing arguments, which Celery sends on, and wrong types, where it raises ValueError (celery 5.7)."""
    meta = Panel.meta[method]
    given = dict(zip(meta.args or (), arguments, strict=False))
    for (argument, kind), value in given.items():
        try:
            (kind or str)(value)
        except ValueError:
            _refuse(typed, f"{argument} is {value!r}, not {kind.__name__}: it takes {meta.signature}")
    known = {"state", meta.variadic, *(argument for argument, _ in given)}
    parameters = inspect.signature(Panel.data[method]).parameters.values()
    needed = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if missing := [argument for argument in needed if argument not in known]:
        _refuse(typed, f"{', '.join(missing)} is missing: it takes {meta.signature}")


def _refuse(typed: str, reason: str) -> None:
    raise CeleryCommandException(f"celery {typed}: {reason}", BAD_COMMAND)
