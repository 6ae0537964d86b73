"""A suite of tests that others have written, with the lists of what differs: celery.toml and kombu.toml."""

import tomllib
from pathlib import Path
from typing import NamedTuple, Self

# Where Celery and kombu have the tests that need a broker.
HOME = "t/integration/"
# What does not run: whole files, and single tests of those that do. What must fail: were it to pass, the list would not
# be true any more. What fails or passes, as it happens.
LISTS = ("left_out", "differs", "may_differ")


class Suite(NamedTuple):
    """The tests of a package, and those of them that are listed."""

    package: str
    # The file of the package's sources that configures pytest.
    config: str
    # List → test → why
    lists: dict[str, dict[str, str]]

    @classmethod
    def read(cls, path: Path) -> Self:
        """The suite that a file describes."""
        found = tomllib.loads(path.read_text())
        lists = {
            name: {test: entry["why"] for entry in found.get(name, []) for test in entry["tests"]} for name in LISTS
        }
        return cls(found["package"], found["config"], lists)


def is_listed(name: str, nodeid: str) -> bool:
    """Whether a name in a list means this test."""
    if name.startswith("["):
        return nodeid.partition("[")[2].removesuffix("]").split("-")[0] == name[1:-1]
    whole = f"{HOME}{name}"
    return nodeid == whole or nodeid.startswith((f"{whole}::", f"{whole}["))
