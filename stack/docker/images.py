"""Base images: those of the local store, else from their registry, else built from Debian's packages."""

import subprocess
import sys

from config import Settings
from config.settings import VARIABLES
from stack import env_file
from stack.errors import CommandError
from stack.paths import ROOT
from stack.terminal import find_last_line, run

OWN_PREFIX = "stalk-base/"
SUBSTITUTES = {"PYTHON_IMAGE": "stalk-base/python:3.13", "REDIS_IMAGE": "stalk-base/redis:8.0"}
# A slow line fetches 50 MB in this time; a registry that does not answer at all fails within seconds.
PULL_SECONDS = 600


def prepare(settings: Settings) -> None:
    """Get both base images; where they have to be built, write their names into .env.

    Raises CommandError when an image can neither be found nor fetched nor built.
    """
    wanted = {"PYTHON_IMAGE": settings.stack.python_image}
    if settings.stack.redis_replicas:
        wanted["REDIS_IMAGE"] = settings.stack.redis_image
    missing = {variable: image for variable, image in wanted.items() if not is_local(image)}
    unreachable = {variable: why for variable, image in missing.items() if (why := fetch(image))}
    if not unreachable:
        return
    for variable, why in unreachable.items():
        _require_replaceable(variable, wanted[variable], why)
    build()
    changes = {name: SUBSTITUTES[name] for name in unreachable if wanted[name] != SUBSTITUTES[name]}
    if changes:
        env_file.set_variables(changes)
        print(f"Wrote {' and '.join(f'{name}={image}' for name, image in changes.items())} to .env.")


def is_local(image: str) -> bool:
    """Whether Docker has the image."""
    return run("docker", "image", "inspect", image, check=False).returncode == 0


def fetch(image: str) -> str:
    """Pull an image; "" when that worked, else why it did not."""
    if image.startswith(OWN_PREFIX):
        return "it is built here, never fetched"
    print(f"Fetching {image} …")
    pulled = run("docker", "pull", "--quiet", image, check=False, timeout=PULL_SECONDS)
    return "" if pulled.returncode == 0 else find_last_line(pulled.stderr)


def build() -> None:
    """Build the base images from Debian's packages; CommandError, with the last line of the script, when that fails."""
    print("Building the base images from Debian's packages instead (a minute or two) …")
    built = subprocess.run(["docker/base/build"], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    lines = built.stderr.splitlines(keepends=True)
    # The last line of a build that fails says why, and is part of the error below.
    sys.stderr.writelines(lines[:-1] if built.returncode else lines)
    if built.returncode:
        why = find_last_line(built.stderr).removeprefix("base-images: ")
        raise CommandError(
            f"the base images could not be built: {why}; or run the stack as processes "
            "of this host, without images: make local"
        )


def _require_replaceable(variable: str, image: str, why: str) -> None:
    """Raise CommandError for an image that the user chose: another one would not be what was asked for."""
    if image in (VARIABLES[variable].default, SUBSTITUTES[variable]):
        print(f"{image} is not available: {why}")
        return
    raise CommandError(
        f"{variable}: {image} is not in the local store and cannot be fetched ({why}); correct the name, run 'docker "
        f"login', or set {variable}={SUBSTITUTES[variable]} in .env to build it from Debian's packages"
    )
