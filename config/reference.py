"""The reference of all settings, the example env file and what is in force: written from the settings alone."""

from __future__ import annotations

import textwrap
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from config.celery import soft_limit
from config.environment import quote_value
from config.redis_url import MASK, RedisUrl
from config.settings import GROUPS, SECRETS, Group, Settings, fields

# What `make up` fills in on its first run; they stand in the example uncommented, so that it knows where.
GENERATED = ("REDIS_PASSWORD", "FLOWER_BASIC_AUTH")
WIDTH = 100


def reference() -> str:
    """docs/configuration.md."""
    parts = [REFERENCE_HEAD]
    for group in GROUPS.values():
        parts.append(f"## {_title(group)}\n\n{_text(group)}\n")
        parts.append("| Variable | Default | Meaning | Allowed |\n| --- | --- | --- | --- |")
        parts += [_row(variable, field) for _, variable, field in fields(group)]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def example() -> str:
    """.env.example."""
    parts = [EXAMPLE_HEAD]
    for group in GROUPS.values():
        parts.append(f"# ---- {_title(group)}: {_text(group)}")
        parts += [_example_entry(variable, field) for _, variable, field in fields(group)]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def in_force(settings: Settings) -> str:
    """Every variable with the value that is in force, secrets masked."""
    lines = []
    for name, group in GROUPS.items():
        lines.append(f"# {_title(group)}")
        values = getattr(settings, name)
        for attribute, variable, _ in fields(group):
            lines.append(f"{variable}={shown(_effective(settings, variable, getattr(values, attribute)))}")
        lines.append("")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as it is written in an env file; a secret as its mask."""
    if isinstance(value, SecretStr):
        return MASK if value.get_secret_value() else ""
    if isinstance(value, RedisUrl):
        return value.masked()
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return "; ".join(f"{entry}={period}" for entry, period in value)
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return "" if value is None else str(value)


def _effective(settings: Settings, variable: str, value: Any) -> Any:
    derived = {
        "CELERY_BROKER_URL": settings.broker_url,
        "CELERY_RESULT_BACKEND": settings.result_url,
        "CELERY_TASK_SOFT_TIME_LIMIT": soft_limit(settings.tasks),
    }
    return derived.get(variable, value)


def _title(group: type[Group]) -> str:
    return group.__name__.removesuffix("Settings")


def _text(group: type[Group]) -> str:
    return (group.__doc__ or "").strip()


def _about(field: FieldInfo) -> dict[str, str]:
    extra = field.json_schema_extra
    return {key: str(value) for key, value in extra.items()} if isinstance(extra, dict) else {}


def _row(variable: str, field: FieldInfo) -> str:
    about = _about(field)
    default = shown(field.default)
    unit = f" {about['unit']}" if default and about["unit"] else ""
    name = f"`{variable}`" + (f", `{variable}_FILE`" if variable in SECRETS else "")
    cells = (name, f"`{default}`{unit}" if default else "unset", str(field.description), about["allowed"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _example_entry(variable: str, field: FieldInfo) -> str:
    about = _about(field)
    unit = f" Unit: {about['unit']}." if about["unit"] else ""
    text = f"{field.description} Allowed: {about['allowed']}.{unit}"
    comment = textwrap.fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
    value = "" if variable in GENERATED else shown(field.default) or about["example"]
    mark = "" if variable in GENERATED else "#"
    return f"{comment}\n{mark}{variable}={quote_value(value)}"


REFERENCE_HEAD = """\
# Configuration

Written by `python -m config reference`; a test keeps it so.

Every setting is an environment variable. `make up` and Compose read them from `.env`, and a variable in the
environment of `make` or `docker compose` beats `.env`. A variable that is empty counts as not set. Where two
names stand in the first column, the second names a file that holds the value.

A secret in `.env` is in the environment of the containers that need it, and `docker inspect` shows it to whoever may
use Docker; one in a file is not. Logs, errors, `celery inspect`, Flower and process lists show none.

Special characters in `.env` go into single quotes, with `\\'` for a quote: `REDIS_PASSWORD='pa$$w#rd'`.

`python -m config check` checks all of it and names every mistake (exit code 2), `python -m config show` prints
what is in force, secrets masked.

A Redis URL has one of these forms; a password without percent-encoding goes into `REDIS_PASSWORD` instead:

- `redis://[user]:password@host:port/db`
- `rediss://[user]:password@host:port/db?ssl_ca_certs=/path/ca.pem`: TLS
- `redis+socket://[user]:password@/path/to/socket?virtual_host=db`
- `sentinel://[user]:password@host:port/db;sentinel://host:port/db`, with `CELERY_SENTINEL_MASTER`; login, database
  and options of TLS stand at one of the URLs, or the same at all; with any option of TLS the sentinels and the master
  are spoken to by TLS

TLS has these options; all others are refused:

- `ssl_ca_certs`: file with the authorities that are trusted; unset, the system's
- `ssl_cert_reqs`: `required` (the default), `optional`, or `none`, which takes anybody's certificate
- `ssl_check_hostname`: `true` (the default), or `false`, which takes a trusted certificate that names another host;
  with sentinels the master's has to name the address by which they know it
- `ssl_min_version`: `TLSv1.2` or `TLSv1.3`, the oldest version that is spoken; for Stalk's own processes, because a
  Celery without Stalk's code fails with it
- `ssl_certfile`, `ssl_keyfile`: a certificate to show to a server that wants one, and its key, without a password

Variables and secrets of your own tasks belong in `.env.tasks`, written as in `.env`: workers and beat get all of it,
and `config.variable("NAME")` and `config.secret("NAME")` read it (the second from `NAME_FILE` too).
"""

EXAMPLE_HEAD = """\
# Every variable of Stalk with its default. Written by `python -m config example`; a test keeps it so.
#
# `make up` copies this file to .env on its first run, mode 0600, and fills in random secrets. Uncomment a line
# to change it, then run `make up` again. Special characters go into single quotes, with \\' for a quote:
# REDIS_PASSWORD='pa$$w#rd'. For a secret, NAME_FILE may name a file that holds it.
"""
