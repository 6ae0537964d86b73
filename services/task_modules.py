"""Which modules hold tasks: every module of services/tasks/, and those that CELERY_IMPORTS names."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable

import services.tasks


def task_modules(imports: Iterable[str]) -> list[str]:
    """Names of all modules with tasks, sub-packages included; what has a name that starts with _ is left out."""
    prefix = services.tasks.__name__ + "."
    found = [module.name for module in pkgutil.walk_packages(services.tasks.__path__, prefix)]
    return [name for name in found if "._" not in name] + list(imports)
