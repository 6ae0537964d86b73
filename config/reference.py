"""docs/configuration.md, .env.example and what `python -m config show` prints: all written from config/settings.py."""

import ast
import textwrap
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from config import settings as settings_module
from config.celery import derive_soft_limit
from config.environment import quote_value
from config.redis_url import MASK, RedisUrl
from config.settings import GROUPS, VARIABLES, Settings, Variable

# `make up` gives these random values on its first run, so the example has them uncommented.
GENERATED = ("REDIS_PASSWORD", "FLOWER_BASIC_AUTH")
WIDTH = 100
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"


def render_reference() -> str:
    """docs/configuration.md: its tables, below the text above them, which stands there and nowhere else."""
    # The image has no docs/.
    text = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    parts = [text.partition("\n## ")[0]]
    for name, group in GROUPS.items():
        parts.append(f"## {name.capitalize()}\n\n{group.__doc__}\n")
        parts.append("| Variable | Default | Meaning | Allowed |\n| --- | --- | --- | --- |")
        parts += [_render_row(variable) for variable in VARIABLES.values() if variable.group == name]
        parts.append("")
    return "\n".join(parts).strip() + "\n"


def render_example() -> str:
    """.env.example."""
    parts = [EXAMPLE_HEAD]
    for name, group in GROUPS.items():
        parts.append(f"# ---- {name.capitalize()}: {group.__doc__}")
        parts += [_render_line(variable) for variable in VARIABLES.values() if variable.group == name]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def render_settings(settings: Settings) -> str:
    """Every variable with the value that is in force, secrets masked."""
    derived = {
        "CELERY_BROKER_URL": settings.broker_url,
        "CELERY_RESULT_BACKEND": settings.result_url,
        "CELERY_TASK_SOFT_TIME_LIMIT": derive_soft_limit(settings.tasks),
    }
    lines = []
    for group in GROUPS:
        lines.append(f"# {group.capitalize()}")
        for variable in (each for each in VARIABLES.values() if each.group == group):
            value = derived.get(variable.name, getattr(getattr(settings, group), variable.attribute))
            lines.append(f"{variable.name}={format_value(value)}")
        lines.append("")
    return "\n".join(lines)


def format_value(value: Any) -> str:
    """A value as it is written in an env file; a secret as its mask."""
    if isinstance(value, SecretStr):
        return MASK if value.get_secret_value() else ""
    if isinstance(value, RedisUrl):
        return value.mask()
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return "; ".join(f"{entry}={period}" for entry, period in value)
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return "" if value is None else str(value)


@cache
def read_help() -> dict[str, str]:
    """What each variable does: the text below its declaration in config/settings.py.

    Read from the source, because Python does not keep such a text.
    """
    found = {}
    groups = ast.parse(Path(settings_module.__file__).read_text(encoding="utf-8")).body
    lines = [line for group in groups if isinstance(group, ast.ClassDef) for line in group.body]
    for declaration, text in pairwise(lines):
        match declaration, text:
            case ast.AnnAssign(value=ast.Call(args=[ast.Constant(str(name)), *_])), ast.Expr(ast.Constant(str(help))):
                found[name] = " ".join(help.split())
    return found


def _render_row(variable: Variable) -> str:
    default = format_value(variable.default)
    unit = f" {variable.unit}" if default and variable.unit else ""
    name = f"`{variable.name}`" + (f", `{variable.name}_FILE`" if variable.is_secret else "")
    cells = (name, f"`{default}`{unit}" if default else "unset", read_help()[variable.name], variable.allowed)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _render_line(variable: Variable) -> str:
    text = f"{read_help()[variable.name]} Allowed: {variable.allowed}."
    comment = textwrap.fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
    if variable.name in GENERATED:
        return f"{comment}\n{variable.name}="
    return f"{comment}\n#{variable.name}={quote_value(format_value(variable.default) or variable.example)}"


EXAMPLE_HEAD = """\
# Every variable of Stalk with its default. Written by `python -m config example`; a test compares.
#
# The first `make up` copies this file to .env (mode 0600) and fills in random secrets. To change a setting, uncomment
# its line and run `make up` again. Values with special characters are written in single quotes, with \\' for a quote:
# REDIS_PASSWORD='pa$$w#rd'. A secret may also come from a file: NAME_FILE is its path.
"""
