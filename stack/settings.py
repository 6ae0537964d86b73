"""Settings for commands that have to work although .env has mistakes, such as `make stop` and `make status`."""

from __future__ import annotations

import config
from config import ConfigError, Settings
from stack import terminal

_printed: set[str] = set()


def load_or_defaults() -> Settings:
    """The settings, or the defaults where .env has mistakes; each mistake is printed once, as a warning."""
    try:
        return config.load()
    except ConfigError as error:
        for problem in error.problems:
            if problem not in _printed:
                _printed.add(problem)
                terminal.print_warning(problem, to_errors=True)
        return config.load({}, None)
