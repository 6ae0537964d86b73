""".env: created once with random secrets, then changed a line at a time; read although it has mistakes."""

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

import config
from config import ConfigError, Settings
from config.environment import quote_value
from config.reference import render_example
from stack import terminal
from stack.paths import ROOT

ENV_FILE = ROOT / ".env"
# 24 random bytes: out of reach of guessing, and short enough to type.
SECRET_BYTES = 24
_printed: set[str] = set()


def create(path: Path = ENV_FILE, **values: str) -> bool:
    """Create `path`, mode 0600, from .env.example with random secrets and `values`; False where it exists already."""
    # A link that leads nowhere is not ours to replace either.
    if path.is_symlink() or path.exists():
        return False
    text = render_example()
    generated = {
        "REDIS_PASSWORD": secrets.token_urlsafe(SECRET_BYTES),
        "FLOWER_BASIC_AUTH": f"admin:{secrets.token_urlsafe(SECRET_BYTES)}",
    }
    for name, value in (generated | values).items():
        text = replace_variable(text, name, value)
    replace_file(path, text)
    return True


def replace_variable(text: str, name: str, value: str) -> str:
    """The text of an env file with `name` set: in its line, commented out or not, else in a new one at the end."""
    line = f"{name}={quote_value(value)}"
    assigned = re.compile(rf"^#?{re.escape(name)}=.*$", re.MULTILINE)
    matches = list(assigned.finditer(text))
    if not matches:
        return f"{text.rstrip()}\n{line}\n".lstrip()
    # The last assignment is the one in force; a comment may stand anywhere.
    chosen = next((match for match in reversed(matches) if not match[0].startswith("#")), matches[-1])
    return text[: chosen.start()] + line + text[chosen.end() :]


def set_variables(values: Mapping[str, str], path: Path = ENV_FILE) -> None:
    """Set variables in the env file."""
    text = path.read_text(encoding="utf-8")
    for name, value in values.items():
        text = replace_variable(text, name, value)
    # Of the file that a link names: the link itself would be replaced by a file.
    replace_file(path.resolve(), text)


def replace_file(path: Path, text: str) -> None:
    """Write a file that only this user can read; a crash of the machine leaves the old file or the new one."""
    new = path.with_name(path.name + ".new")
    # One that was left behind might be readable by everybody.
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def load_or_defaults() -> Settings:
    """The settings for commands such as `make stop`, which have to work: defaults where .env has mistakes.

    Each mistake is printed once, as a warning.
    """
    try:
        return config.load()
    except ConfigError as error:
        for problem in error.problems:
            if problem not in _printed:
                _printed.add(problem)
                terminal.print_warning(problem, to_errors=True)
        return config.load({}, None)
