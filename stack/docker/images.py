"""Base images: from the local store, else from their registry, else built from Debian's packages."""

from __future__ import annotations

import subprocess
import sys

from config import Settings
from config.settings import StackSettings
from stack import env_file
from stack.docker.engine import last_line, run
from stack.errors import Failure
from stack.paths import ROOT

OWN_PREFIX = "stalk-base/"
SUBSTITUTES = {"python_image": "stalk-base/python:3.13", "redis_image": "stalk-base/redis:8.0"}
# A slow line fetches 50 MB in this time; a registry that does not answer at all fails within seconds.
PULL_SECONDS = 600


def prepare(settings: Settings) -> None:
    """Make both base images available, changing the variables in .env where they have to be built.

    Raises Failure when an image can neither be found nor fetched nor built.
    """
    wanted = {"python_image": settings.stack.python_image}
    if settings.stack.redis_replicas:
        wanted["redis_image"] = settings.stack.redis_image
    missing = {field: image for field, image in wanted.items() if not is_local(image)}
    unreachable = {field: why for field, image in missing.items() if (why := fetch(image))}
    if not unreachable:
        return
    for field, why in unreachable.items():
        _refuse_a_choice(field, wanted[field], why)
    build()
    changes = {_variable(field): SUBSTITUTES[field] for field in unreachable if wanted[field] != SUBSTITUTES[field]}
    if changes:
        env_file.set_variables(changes)
        print(f"Wrote {' and '.join(f'{name}={image}' for name, image in changes.items())} to .env.")


def is_local(image: str) -> bool:
    """Whether Docker has the image."""
    return run("docker", "image", "inspect", image, check=False).returncode == 0


def fetch(image: str) -> str:
    """Pull an image; "" when it is there, else why it is not."""
    if image.startswith(OWN_PREFIX):
        return "it is built here, never fetched"
    print(f"Fetching {image} …")
    pulled = run("docker", "pull", "--quiet", image, check=False, timeout=PULL_SECONDS)
    return "" if pulled.returncode == 0 else last_line(pulled.stderr)


def build() -> None:
    """Build the base images from Debian's packages.

    Raises Failure, with what the script says last, when that fails.
    """
    print("Building the base images from Debian's packages instead (a minute or two) …")
    built = subprocess.run(["docker/base/build"], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    lines = built.stderr.splitlines(keepends=True)
    # The last line of one that fails says why, and is told below.
    sys.stderr.writelines(lines[:-1] if built.returncode else lines)
    if built.returncode:
        why = last_line(built.stderr).removeprefix("base-images: ")
        raise Failure(
            f"the base images could not be built: {why}; or run the stack as processes "
            "of this host, without images: make local"
        )


def _refuse_a_choice(field: str, image: str, why: str) -> None:
    """An image that somebody chose is not replaced behind their back."""
    if image in (StackSettings.model_fields[field].default, SUBSTITUTES[field]):
        print(f"{image} cannot be had: {why}")
        return
    raise Failure(
        f"{_variable(field)}: {image} is not in the local store and cannot be fetched ({why}); correct the name, run "
        f"'docker login', or set {_variable(field)}={SUBSTITUTES[field]} in .env to build it from Debian's packages"
    )


def _variable(field: str) -> str:
    return str(StackSettings.model_fields[field].alias)
