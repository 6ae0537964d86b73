"""A Python package of one's own, by way of requirements/own.txt and make lock."""

from pathlib import Path

import pytest

from tests.stack.containers.deployment import ROOT, Stack, clone


@pytest.mark.slow
def test_a_package_in_own_txt_is_in_the_image_after_make_lock(stack: Stack, tmp_path: Path) -> None:
    """In a clone of its own, which is built and never started."""
    other = Stack(clone(tmp_path / "clone"), f"{stack.project}-packages")
    own = other.directory / "requirements" / "own.txt"
    own.write_text(own.read_text() + "isodate==0.7.2\n")
    locks = {name: (ROOT / "requirements" / name).read_text() for name in ("image.lock", "dev.lock")}
    other.make("lock")
    # What Stalk itself needs stays as it was, so that an update does not conflict.
    assert {name: (own.parent / name).read_text() for name in locks} == locks
    assert "isodate==0.7.2" in (own.parent / "own.lock").read_text()
    images = {"PYTHON_IMAGE": stack.env_value("PYTHON_IMAGE"), "REDIS_PASSWORD": "x"}
    try:
        other.compose("build", "worker", timeout=300, variables=images)
        shown = other.docker("run", "--rm", "--entrypoint=python", f"{other.project}-app", "-c",
                             "import isodate; print(isodate.parse_duration('PT90S').total_seconds())")  # fmt: skip
        assert shown.strip() == "90.0"
    finally:
        other.compose("down", "--rmi", "all", check=False, variables=images)
