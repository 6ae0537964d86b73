"""config.environment: secrets from files, the variables of a user's tasks, and what a child process gets.

Env files are in test_env_file.py.
"""

import os
from pathlib import Path

import pytest

from config import ConfigError, child_environment, secret, variable
from config.environment import read_secret_files


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"s3cret", "s3cret"),
        (b"s3cret\n", "s3cret"),
        (b"s3cret\r\n", "s3cret"),
        (b" s3cret \n", " s3cret "),
        (b"two\nlines\n", "two\nlines"),
        ("pä$$w#rd'\"\n".encode(), "pä$$w#rd'\""),
    ],
)
def test_a_secret_is_the_content_of_its_file_without_the_last_line_end(
    tmp_path: Path, content: bytes, value: str
) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    environment = {"PASSWORD_FILE": str(path), "PASSWORD": "", "TOKEN": "token", "TOKEN_FILE": "", "OTHER": "x"}
    before = dict(environment)
    read = {"PASSWORD": value, "TOKEN": "token", "OTHER": "x"}
    assert read_secret_files(environment, ["PASSWORD", "TOKEN"]) == (read, [])
    assert environment == before


def test_a_secret_file_that_cannot_be_read_is_named_with_its_variable(tmp_path: Path) -> None:
    gone, latin = tmp_path / "gone", tmp_path / "latin"
    latin.write_bytes(b"\xff")
    environment = {"A_FILE": str(gone), "B_FILE": str(tmp_path), "C_FILE": str(latin)}
    _, found = read_secret_files(environment, ["A", "B", "C"])
    assert found == [
        f"A_FILE: {gone} cannot be read (No such file or directory)",
        f"B_FILE: {tmp_path} cannot be read (Is a directory)",
        f"C_FILE: {latin} cannot be read (it is not UTF-8)",
    ]


@pytest.mark.parametrize("given", ["s3cret", "redis://:s3cret@redis/0", "s3cret" * 100])
def test_a_secret_that_stands_where_its_file_belongs_is_not_repeated(given: str) -> None:
    _, (problem,) = read_secret_files({"PASSWORD_FILE": given}, ["PASSWORD"])
    assert problem.startswith(
        "PASSWORD_FILE: its value, which is no absolute path and not shown here, cannot be read ("
    )
    assert "s3cret" not in problem


def test_a_task_reads_its_own_variable_and_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from a file\n")
    monkeypatch.setenv("SHOP_URL", "https://shop.example.com")
    monkeypatch.setenv("SHOP_KEY", "from the environment")
    monkeypatch.setenv("SHOP_TOKEN_FILE", str(tmp_path / "token"))
    assert variable("SHOP_URL") == "https://shop.example.com"
    assert variable("SHOP_COLOUR", "green") == "green"
    assert secret("SHOP_KEY") == "from the environment"
    assert secret("SHOP_TOKEN") == "from a file"


def test_a_variable_that_a_task_misses_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOP_TOKEN_FILE", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"SHOP_URL is not set: add it to \.env\.tasks"):
        variable("SHOP_URL")
    with pytest.raises(ConfigError, match=r"add SHOP_KEY or SHOP_KEY_FILE to \.env\.tasks"):
        secret("SHOP_KEY")
    with pytest.raises(ConfigError, match=r"SHOP_TOKEN_FILE: .*gone cannot be read"):
        secret("SHOP_TOKEN")


def test_a_child_gets_all_but_what_looks_foreign_and_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLOWER_BASIC_AUTH", "FLOWER_PORT", "CELERY_RESULT_BACKEND", "SHOP_URL"):
        monkeypatch.setenv(name, "x")
    child = child_environment(["FLOWER_BASIC_AUTH"], STALK_NODES="2")
    assert child.items() >= {"FLOWER_BASIC_AUTH": "x", "SHOP_URL": "x", "STALK_NODES": "2"}.items()
    assert not child.keys() & {"FLOWER_PORT", "CELERY_RESULT_BACKEND"}
    assert child["PATH"] == os.environ["PATH"]
