"""stack.env_file: .env is written once, and changed a line at a time."""

import re
import stat
from pathlib import Path

import pytest

from config import load
from config.environment import read_env_file
from stack.env_file import create, replace_variable, set_variables

TABLE = [
    ("", "A=1\n", "an empty file"),
    ("B=2\n", "B=2\nA=1\n", "not there yet"),
    ("B=2", "B=2\nA=1\n", "not there yet, and no line break at the end"),
    ("A=0\nB=2\n", "A=1\nB=2\n", "there"),
    ("A='old value' # why\nB=2\n", "A=1\nB=2\n", "there with a comment"),
    ("#A=0\nB=2\n", "A=1\nB=2\n", "commented out"),
    ("A=8\n#A=0\nA=9\nB=2\n", "A=8\n#A=0\nA=1\nB=2\n", "there twice: the last one counts"),
    ("A=8\n#A=0\n", "A=1\n#A=0\n", "a comment after the line that counts"),
    ("AA=0\nXA=0\n#XA=0\n", "AA=0\nXA=0\n#XA=0\nA=1\n", "in longer names only"),
    ("# set A=5 to do so\n", "# set A=5 to do so\nA=1\n", "in a sentence only"),
]


@pytest.mark.parametrize(("before", "after", "_where"), TABLE, ids=[row[2] for row in TABLE])
def test_a_variable_is_set_where_it_stands(before: str, after: str, _where: str) -> None:
    assert replace_variable(before, "A", "1") == after


@pytest.mark.parametrize("value", ["", "plain", "two words", "pa$$w#rd", 'it\'s "so"', "\\1 \\g<0>", "${A}", " a "])
def test_a_value_is_read_back_as_it_was_set(tmp_path: Path, value: str) -> None:
    path = tmp_path / ".env"
    for before in ("", "#A=x\n", "A=old\nB=2\n"):
        path.write_text(replace_variable(before, "A", value))
        assert read_env_file(path)["A"] == value


def test_a_value_with_a_line_break_is_refused() -> None:
    with pytest.raises(ValueError, match="line break"):
        replace_variable("", "A", "1\nB=2")


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    """An env file with a secret, for its owner's eyes only."""
    path = tmp_path / ".env"
    path.write_text("# mine\nREDIS_PASSWORD=secret\n#WORKERS=1\n")
    path.chmod(0o600)
    return path


def test_setting_variables_keeps_the_rest_and_the_mode(env_file: Path) -> None:
    set_variables({"WORKERS": "4", "LOG_LEVEL": "debug"}, env_file)
    assert env_file.read_text() == "# mine\nREDIS_PASSWORD=secret\nWORKERS=4\nLOG_LEVEL=debug\n"
    assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
    assert list(env_file.parent.iterdir()) == [env_file]


def test_what_an_interrupted_change_left_behind_neither_stays_nor_shows_the_secrets(env_file: Path) -> None:
    leftover = env_file.with_name(".env.new")
    leftover.write_text("half of i")
    leftover.chmod(0o644)
    set_variables({"WORKERS": "4"}, env_file)
    assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
    assert "WORKERS=4" in env_file.read_text()
    assert not leftover.exists()


def test_a_change_that_fails_leaves_the_file_as_it_was(env_file: Path) -> None:
    before = env_file.read_bytes()
    with pytest.raises(ValueError, match="line break"):
        set_variables({"WORKERS": "4", "LOG_LEVEL": "a\nb"}, env_file)
    assert env_file.read_bytes() == before
    assert list(env_file.parent.iterdir()) == [env_file]


def test_a_link_to_the_file_stays_a_link(env_file: Path, tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    env_file.rename(kept / "stalk.env")
    env_file.symlink_to(kept / "stalk.env")
    set_variables({"WORKERS": "4"}, env_file)
    assert env_file.is_symlink()
    assert "WORKERS=4" in (kept / "stalk.env").read_text()


def test_the_first_file_has_random_secrets_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "1.env", tmp_path / "2.env"
    assert create(first, WORKER_CPUS="3")
    assert create(second)
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    one, two = read_env_file(first), read_env_file(second)
    assert one["WORKER_CPUS"] == "3"
    for name in ("REDIS_PASSWORD", "FLOWER_BASIC_AUTH"):
        assert one[name] != two[name]
        # 24 random bytes in base64.
        assert re.fullmatch(r"(admin:)?[A-Za-z0-9_-]{32}", one[name])


def test_the_first_file_is_a_good_configuration(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    create(path, WORKER_CPUS="2")
    settings = load({}, path)
    assert settings.warnings == ()
    assert settings.stack.worker_cpus == "2"


def test_a_file_that_is_there_is_not_touched(env_file: Path) -> None:
    before = env_file.read_bytes()
    assert not create(env_file)
    assert env_file.read_bytes() == before
