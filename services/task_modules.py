"""Find the modules with tasks: every module of services/tasks/, and those that CELERY_IMPORTS names."""

import pkgutil
from collections.abc import Iterable

import services.tasks


def find_task_modules(imports: Iterable[str]) -> list[str]:
    """The names of all modules with tasks, also in sub-packages; those with a name that starts with _ are left out."""
    prefix = services.tasks.__name__ + "."
    found = [module.name for module in pkgutil.walk_packages(services.tasks.__path__, prefix)]
    return [name for name in found if "._" not in name] + list(imports)
