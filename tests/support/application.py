"""services.app for tests in this process: importing it makes an application, here without the checkout's own .env."""

import os
from pathlib import Path

from config import loading

_env_file, loading.ENV_FILE = loading.ENV_FILE, Path(os.devnull)
try:
    from services.app import create_app
finally:
    loading.ENV_FILE = _env_file

__all__ = ["create_app"]
