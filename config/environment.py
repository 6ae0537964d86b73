"""Where settings come from: the process environment over `.env`, and `NAME_FILE` for secrets."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from dotenv import dotenv_values
from dotenv.parser import Binding, parse_stream

# Read by Celery, kombu, billiard, Flower or Supervisor behind our back: they would beat the validated
# settings, so no process that Stalk starts sees them.
FOREIGN = (
    "APP",
    "BROKER_URL",
    "CELERY_CONFIG_MODULE",
    "CELERY_CUSTOM_WORKER_POOL",
    "CELERY_LOADER",
    "CELERY_QUIET",
    "CELERY_VERSION",
    "CELERY_WORKDIR",
    "CONFIG_MODULE",
    "C_FORCE_ROOT",
    "LOADER",
    "REMAP_SIGTERM",
    "RESULT_BACKEND",
    "SKIP_CHECKS",
)
# Every option of `celery worker` and `celery beat` is also read from a variable: CELERY_WORKER_PURGE=1 would empty
# the queues, CELERY_BEAT_SCHEDULER would replace the scheduler that cannot double (celery 5.7).
FOREIGN_PREFIXES = ("CELERY_BEAT_", "CELERY_WORKER_", "FLOWER_", "SUPERVISOR_")
# What Celery reads in place of app.conf, with what it must then hold.
CELERY_URLS = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND")
ASSIGNMENT = re.compile(r"\s*(?:export[ \t]+)?[A-Za-z_][A-Za-z0-9_]*[ \t]*=")
# Compose's dotenv, python-dotenv and a person agree about values of these two forms, and about no others.
# A space may stand only between two words: in front or behind, every reader takes it away.
_WORD = r"[A-Za-z0-9_./:@,+=%?&;*~^!()\[\]{}<>|-]+"
PLAIN_VALUE = re.compile(rf"(?:{_WORD}(?: {_WORD})*)?")
QUOTED_VALUE = re.compile(r"'(?:[^'\\\r\n]|\\'|\\(?![\\']))*'")


class ConfigError(Exception):
    """The configuration cannot be used. `problems` has a sentence for each mistake."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def process_environment() -> dict[str, str]:
    """A copy of this process's environment."""
    return dict(os.environ)


def shows_colour(stream: TextIO) -> bool:
    """Whether the stream is a terminal that knows colour, unless NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of an env file, as Compose reads them too.

    Raises ConfigError for a line that Compose and Python would read differently.
    """
    try:
        # Not read_text(), which would take a lone carriage return for a line end too.
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError([f"{path}: cannot be read ({reason})"]) from None
    if "\r" in text:
        raise ConfigError([f"{path}: has a carriage return, which ends a line for Python and not for Compose"])
    problems = [problem for binding in parse_stream(io.StringIO(text)) if (problem := _ambiguity(path, binding))]
    if problems:
        raise ConfigError(problems)
    values = dotenv_values(stream=io.StringIO(text), interpolate=False)
    return {name: value for name, value in values.items() if value is not None}


def quote_value(value: str) -> str:
    """`value` as it must stand in an env file for every reader to get it back unchanged.

    Raises ValueError where no such form exists (a line break, a doubled or a last backslash).
    """
    if PLAIN_VALUE.fullmatch(value):
        return value
    quoted = "'" + value.replace("'", "\\'") + "'"
    if not QUOTED_VALUE.fullmatch(quoted):
        raise ValueError("a line break, two backslashes in a row, or one before a quote or the end, cannot be written")
    return quoted


def _ambiguity(path: Path, binding: Binding) -> str | None:
    original = binding.original.string
    # What a binding was read from begins with the empty lines before it.
    line = binding.original.line + original[: len(original) - len(original.lstrip())].count("\n")
    if binding.key is None and not binding.error:
        return None
    if binding.error or not ASSIGNMENT.match(original):
        return f"{path} line {line}: it is not NAME=value"
    written = original.partition("=")[2].strip(" \t\n")
    if not written.startswith(("'", '"')):
        written = re.split(r" +#", written, maxsplit=1)[0]
        readable = PLAIN_VALUE.fullmatch(written)
    elif written.startswith('"'):
        readable = re.match(r'"[^"$`\\\n]*"[ \t]*(?:#.*)?$', written)
    else:
        readable = re.match(QUOTED_VALUE.pattern + r"[ \t]*(?:#.*)?$", written)
    if readable:
        return None
    return (
        f"{path} line {line}: Compose and Python would read the value of {binding.key} differently; write it in "
        f"single quotes with \\' for a quote and no doubled backslash, as in {binding.key}='pa$$w#rd'"
    )


def with_secret_files(environment: Mapping[str, str], secrets: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """`environment` with every secret `NAME` filled in from the file that `NAME_FILE` names, and the problems."""
    values, problems = dict(environment), []
    for name in secrets:
        path = values.pop(f"{name}_FILE", "")
        if not path:
            continue
        if values.get(name):
            problems.append(f"{name} and {name}_FILE are both set: keep one of them")
            continue
        try:
            values[name] = _secret_from(path)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            problems.append(f"{name}_FILE: {_shown_path(path)} cannot be read ({reason})")
    return values, problems


def _shown_path(path: str) -> str:
    # What somebody has put there in place of a path may be the secret itself.
    return path if Path(path).is_absolute() else "what is there, which is no whole path and not shown here,"


def _secret_from(path: str) -> str:
    # Editors and `echo` end a file with line breaks that are no part of the secret; docker/redis/start agrees.
    return Path(path).read_text(encoding="utf-8").rstrip("\n").removesuffix("\r")


def variable(name: str, default: str | None = None) -> str:
    """A variable of the user's own, for use in tasks.

    Raises ConfigError when it is not set and has no default.
    """
    value = os.environ.get(name, default)
    if value is None:
        raise ConfigError([f"{name} is not set: add it to .env.tasks"])
    return value


def secret(name: str) -> str:
    """A secret of the user's own: `NAME`, or the content of the file that `NAME_FILE` names.

    Raises ConfigError when neither is set or the file cannot be read.
    """
    values, problems = with_secret_files(os.environ, [name])
    if problems:
        raise ConfigError(problems)
    if not values.get(name):
        raise ConfigError([f"{name} is not set: add {name} or {name}_FILE to .env.tasks"])
    return values[name]


def child_environment(known: Iterable[str], **extra: str) -> dict[str, str]:
    """The environment for a process that Stalk starts.

    Stalk's own variables (`known`) and the user's pass; what Celery, Flower or Supervisor would read in
    place of the validated settings does not. `extra` is added.
    """
    keep = {*known, *(f"{name}_FILE" for name in known)}

    def passes(name: str) -> bool:
        foreign = name in FOREIGN or name in CELERY_URLS or name.startswith(FOREIGN_PREFIXES)
        return name in keep or not foreign

    return {name: value for name, value in os.environ.items() if passes(name)} | extra


def adopt(environment: Mapping[str, str]) -> None:
    """Make this the environment of this process, in place of its own."""
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()


def pin_celery_urls(broker: str, results: str) -> None:
    """Make the variables that Celery prefers to app.conf say the same as app.conf."""
    for name, value in zip(CELERY_URLS, (broker, broker, broker, results), strict=True):
        # An empty one is as good as none: filled in, it would contradict CELERY_BROKER_URL_FILE in a child.
        if os.environ.get(name):
            os.environ[name] = value
