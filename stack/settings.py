"""Settings for commands that must work although .env has mistakes: whoever corrects it has a stack that runs."""

from __future__ import annotations

import sys

import config
from config import ConfigError, Settings
from stack import terminal

_said: set[str] = set()


def settings_or_defaults() -> Settings:
    """The settings, or the defaults where they have mistakes, which are said once."""
    try:
        return config.load()
    except ConfigError as error:
        for problem in error.problems:
            if problem not in _said:
                _said.add(problem)
                terminal.warning(problem, sys.stderr)
        return config.load({}, None)
