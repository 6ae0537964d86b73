"""Stalk's configuration: the only package that reads the environment.

`load()` returns the validated settings; `variable()` and `secret()` are for a user's own tasks.
"""

from config.environment import ConfigError, child_environment, secret, variable
from config.settings import Settings, load

__all__ = ["ConfigError", "Settings", "child_environment", "load", "secret", "variable"]
