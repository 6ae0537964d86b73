"""services.app for tests in this process: importing it makes an application, here without the checkout's own .env."""

from __future__ import annotations

import os
from pathlib import Path

from config import settings

_env_file, settings.ENV_FILE = settings.ENV_FILE, Path(os.devnull)
try:
    from services.app import create_app
finally:
    settings.ENV_FILE = _env_file

__all__ = ["create_app"]
