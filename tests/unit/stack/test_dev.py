"""stack.commands.dev: which changes of the source `make dev` takes up."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread

from stack.commands.dev import watch_changes
from stack.fingerprints import hash_each_file
from tests.support.waiting import wait_until

# It looks every second; a busy machine may come to it later.
LOOK_SECONDS = 120


def next_of(changed: Iterator[list[str]]) -> list[str]:
    """The names of the files that have changed next."""
    found: list[list[str]] = []
    # What does not see a change waits for ever.
    Thread(target=lambda: found.append(next(changed)), daemon=True).start()
    wait_until(lambda: found, LOOK_SECONDS, "a change is seen")
    return [Path(file).name for file in found[0]]


def test_what_has_changed_before_somebody_listens_is_seen(tmp_path: Path) -> None:
    for name in ("changed.py", "gone.py", "same.py"):
        (tmp_path / name).write_text("old")
    before = hash_each_file(tmp_path)
    (tmp_path / "changed.py").write_text("new")
    (tmp_path / "gone.py").unlink()
    (tmp_path / "added.py").write_text("new")
    assert next_of(watch_changes(before, tmp_path)) == ["added.py", "changed.py", "gone.py"]


def test_a_change_is_seen_once_and_what_is_saved_as_it_was_is_none(tmp_path: Path) -> None:
    (tmp_path / "saved.py").write_text("old")
    changed = watch_changes(hash_each_file(tmp_path), tmp_path)
    for name in ("first.py", "second.py"):
        (tmp_path / "saved.py").write_text("old")
        (tmp_path / name).write_text("new")
        assert next_of(changed) == [name]
