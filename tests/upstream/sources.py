"""The tests of Celery and kombu: from their source distributions, of the versions and hashes in the lock."""

import fcntl
import os
import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.redis.builds import NotAvailableError, run

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "dev.lock"


def get(package: str, config: str) -> Path:
    """A directory with a package's tests, as `t/`, and the file that configures pytest for them, and nothing else.

    The package itself is the installed one. Fetched once and kept. Raises NotAvailableError.
    """
    version, hashes = read_lock(package)
    kept = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "stalk-test"
        / f"{version}-tests".replace("==", "-")
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (kept.parent / f".{kept.name}.lock").open("w") as lock:
        # Several tests may fetch at the same moment.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            with TemporaryDirectory(dir=kept.parent, prefix=".fetch-") as scratch:
                fetch(version, hashes, config, Path(scratch)).rename(kept)
    return kept


def read_lock(package: str) -> tuple[str, str]:
    """A package's locked requirement, and the hashes of all its files, sources included."""
    found = re.search(rf"^({package}==\S+)((?: \\\n +--hash=\S+)+)", LOCK.read_text(), re.MULTILINE)
    assert found, f"{LOCK} has no {package}"
    return found[1], found[2]


def fetch(version: str, hashes: str, config: str, scratch: Path) -> Path:
    """Fetch this version, and lay its tests into a directory below `scratch`. Raises NotAvailableError."""
    (scratch / "wanted").write_text(f"{version}{hashes}\n")
    # pip asks the sources for the package's name and version, and fetches what they are built with for that.
    options = ["--quiet", "--no-deps", "--no-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(scratch / "wanted"), "-d", str(scratch)]
    try:
        run(command)
    except NotAvailableError as error:
        raise NotAvailableError(f"the sources of {version} are not available here: {error}") from None
    (archive,) = scratch.glob("*.tar.gz")
    shutil.unpack_archive(archive, scratch / "all")
    (tree,) = (scratch / "all").iterdir()
    tests = scratch / "tests"
    tests.mkdir()
    for name in ("t", config):
        (tree / name).rename(tests / name)
    return tests
