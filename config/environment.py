"""Where settings come from: the process environment over `.env`, and `NAME_FILE` for secrets."""

import io
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from dotenv import dotenv_values
from dotenv.parser import Binding, parse_stream

from config.errors import ConfigError

# Celery, kombu, billiard, Flower and Supervisor read these themselves, in preference to what Stalk gives them, so no
# process that Stalk starts sees them.
FOREIGN = (
    "APP", "BROKER_URL", "CELERY_CONFIG_MODULE", "CELERY_CUSTOM_WORKER_POOL", "CELERY_LOADER", "CELERY_QUIET",
    "CELERY_VERSION", "CELERY_WORKDIR", "CONFIG_MODULE", "C_FORCE_ROOT", "LOADER", "REMAP_SIGTERM", "RESULT_BACKEND",
    "SKIP_CHECKS",
)  # fmt: skip
# Every option of `celery worker` and `celery beat` is also read from a variable: CELERY_WORKER_PURGE=1 would empty
# the queues, CELERY_BEAT_SCHEDULER would replace the scheduler that cannot double (celery 5.7).
FOREIGN_PREFIXES = ("CELERY_BEAT_", "CELERY_WORKER_", "FLOWER_", "SUPERVISOR_")
# Celery prefers these to app.conf.
CELERY_URLS = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND")
ASSIGNMENT = re.compile(r"\s*(?:export[ \t]+)?[A-Za-z_][A-Za-z0-9_]*[ \t]*=")
# The forms of a value that Compose and python-dotenv read alike. A space may stand only between two words, because both
# remove one at the beginning or the end.
_WORD = r"[A-Za-z0-9_./:@,+=%?&;*~^!()\[\]{}<>|-]+"
PLAIN_VALUE = re.compile(rf"(?:{_WORD}(?: {_WORD})*)?")
QUOTED_VALUE = re.compile(r"'(?:[^'\\\r\n]|\\'|\\(?![\\']))*'")
_DOUBLE_QUOTED = r'"[^"$`\\\n]*"'
WRITTEN_VALUE = re.compile(
    rf"{PLAIN_VALUE.pattern}(?: +#.*)?|(?:{QUOTED_VALUE.pattern}|{_DOUBLE_QUOTED})[ \t]*(?:#.*)?"
)


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
    problems = [problem for binding in parse_stream(io.StringIO(text)) if (problem := _find_ambiguity(path, binding))]
    if problems:
        raise ConfigError(problems)
    values = dotenv_values(stream=io.StringIO(text), interpolate=False)
    return {name: value for name, value in values.items() if value is not None}


def quote_value(value: str) -> str:
    """`value` as it is written in an env file, so that Compose and Python read it back unchanged.

    Raises ValueError for a line break, and for a backslash before another one, a quote or the end.
    """
    if PLAIN_VALUE.fullmatch(value):
        return value
    quoted = "'" + value.replace("'", "\\'") + "'"
    if not QUOTED_VALUE.fullmatch(quoted):
        raise ValueError("a line break, two backslashes in a row, or one before a quote or the end, cannot be written")
    return quoted


def _find_ambiguity(path: Path, binding: Binding) -> str:
    """Why a line is refused; "" for one that every reader reads alike."""
    original = binding.original.string
    # The parser counts the empty lines before an assignment as part of it.
    line = binding.original.line + original[: len(original) - len(original.lstrip())].count("\n")
    if binding.key is None and not binding.error:
        return ""
    if binding.error or not ASSIGNMENT.match(original):
        return f"{path} line {line}: it is not NAME=value"
    if WRITTEN_VALUE.fullmatch(original.partition("=")[2].strip(" \t\n")):
        return ""
    return (
        f"{path} line {line}: Compose and Python would read the value of {binding.key} differently; write it in "
        f"single quotes with \\' for a quote and no doubled backslash, as in {binding.key}='pa$$w#rd'"
    )


def read_secret_files(environment: Mapping[str, str], secrets: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """`environment` with each of the `secrets` read from the file that `NAME_FILE` names, and the problems."""
    values, problems = dict(environment), []
    for name in secrets:
        path = values.pop(f"{name}_FILE", "")
        if not path:
            continue
        if values.get(name):
            problems.append(f"{name} and {name}_FILE are both set: keep one of them")
            continue
        try:
            # Editors and `echo` end a file with line breaks that are no part of the secret; docker/redis/start agrees.
            values[name] = Path(path).read_text(encoding="utf-8").rstrip("\n").removesuffix("\r")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            # Anything but an absolute path may be the secret itself, put there by mistake.
            found = path if Path(path).is_absolute() else "its value, which is no absolute path and not shown here,"
            problems.append(f"{name}_FILE: {found} cannot be read ({reason})")
    return values, problems


def variable(name: str, default: str | None = None) -> str:
    """The value of a variable of the user's own tasks; ConfigError when it is not set and there is no default."""
    value = os.environ.get(name, default)
    if value is None:
        raise ConfigError([f"{name} is not set: add it to .env.tasks"])
    return value


def secret(name: str) -> str:
    """The value of a secret of the user's own tasks: `NAME`, or the content of the file that `NAME_FILE` names.

    Raises ConfigError when neither is set or the file cannot be read.
    """
    values, problems = read_secret_files(os.environ, [name])
    if problems:
        raise ConfigError(problems)
    if not values.get(name):
        raise ConfigError([f"{name} is not set: add {name} or {name}_FILE to .env.tasks"])
    return values[name]


def child_environment(known: Iterable[str], **extra: str) -> dict[str, str]:
    """The environment of a process that Stalk starts, with `extra` added.

    Stalk's own variables (`known`) and the user's are passed on, but none that Celery, Flower or Supervisor would
    prefer to the validated settings.
    """
    foreign = {name for name in os.environ if name in (*FOREIGN, *CELERY_URLS) or name.startswith(FOREIGN_PREFIXES)}
    foreign -= {*known, *(f"{name}_FILE" for name in known)}
    return {name: value for name, value in os.environ.items() if name not in foreign} | extra


def replace_environment(environment: Mapping[str, str]) -> None:
    """Make `environment` that of this process."""
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()


def pin_celery_urls(broker: str, results: str) -> None:
    """Give the variables that Celery prefers to app.conf the URLs of app.conf."""
    for name, value in zip(CELERY_URLS, (broker, broker, broker, results), strict=True):
        # An empty one counts as not set: with a value it would contradict CELERY_BROKER_URL_FILE in a child.
        if os.environ.get(name):
            os.environ[name] = value
