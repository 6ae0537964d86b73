"""Stalk's configuration: the only package that reads the environment.

`load()` returns the validated settings; `variable()` and `secret()` are for a user's own tasks.
"""

from config.environment import child_environment, secret, variable
from config.errors import ConfigError, exit_on_mistakes
from config.loading import load
from config.settings import Settings

__all__ = ["ConfigError", "Settings", "child_environment", "exit_on_mistakes", "load", "secret", "variable"]
