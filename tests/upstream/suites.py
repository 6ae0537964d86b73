"""A suite of tests that others have written, with the lists of what differs: celery.toml and kombu.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Where Celery and kombu have the tests that need a broker.
HOME = "t/integration/"


@dataclass(frozen=True)
class Suite:
    """The tests of a package, and those of them that are listed, each with the reason."""

    package: str
    # The file of the package's sources that configures pytest.
    config: str
    # What does not run: whole files, and single tests of those that do.
    left_out: dict[str, str]
    # What must fail: were it to pass, the list would not be true any more.
    differs: dict[str, str]
    # What fails or passes, as it happens.
    may_differ: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Suite:
        """The suite that a file describes."""
        found = tomllib.loads(path.read_text())
        lists = {name: by_name(found.get(name, [])) for name in ("left_out", "differs", "may_differ")}
        return cls(found["package"], found["config"], **lists)


def by_name(entries: list[dict[str, Any]]) -> dict[str, str]:
    """test → why"""
    return {test: entry["why"] for entry in entries for test in entry["tests"]}


def is_listed(name: str, nodeid: str) -> bool:
    """Whether a name in a list means this test."""
    if name.startswith("["):
        return nodeid.partition("[")[2].removesuffix("]").split("-")[0] == name[1:-1]
    whole = f"{HOME}{name}"
    return nodeid == whole or nodeid.startswith((f"{whole}::", f"{whole}["))
