"""config.environment"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from config import ConfigError, child_environment, secret, variable
from config.environment import pin_celery_urls, quote_value, read_env_file, read_secret_files

# Hypothesis writes the same file again for each example, which is fine.
SAME_FILE = hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

# Any text, rich in what readers of an env file make something of.
VALUES = st.text(st.characters(codec="utf-8") | st.sampled_from("$#'\"\\` ="))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def problems(path: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refusal:
        read_env_file(path)
    return refusal.value.problems


# --- Reading .env


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=plain", "plain"),
        ("A=", ""),
        ("A=''", ""),
        ("export A=plain", "plain"),
        ("  A = plain  ", "plain"),
        ("A=plain # a comment", "plain"),
        ("A=two words", "two words"),
        ("A=redis://:secret@redis:6379/0?a=b&c=d", "redis://:secret@redis:6379/0?a=b&c=d"),
        ("A=entry=0 3 * * *; other=off", "entry=0 3 * * *; other=off"),
        ("A='pa$$w#rd'", "pa$$w#rd"),
        ("A='it\\'s' # it's a comment", "it's"),
        ("A='back\\slash'", "back\\slash"),
        ("A='${B}'", "${B}"),
        ('A="double # quoted"', "double # quoted"),
        ("A=' spaces '", " spaces "),
        ("A=äöü", None),
        ("A='äöü 日本'", "äöü 日本"),
    ],
)
def test_a_line_means_what_it_says(tmp_path: Path, line: str, value: str | None) -> None:
    path = written(tmp_path / ".env", f"# first\n\n{line}\nZ=last\n")
    if value is None:
        assert len(problems(path)) == 1
    else:
        assert read_env_file(path) == {"A": value, "Z": "last"}


@pytest.mark.parametrize(
    "line",
    [
        "A=pa$word",
        "A=${B}",
        "A=pa#word",
        "A=pa'word",
        'A=pa"word',
        "A=pa\\word",
        "A=pa`word",
        "A=a  b",
        "A=a\t# comment",
        'A="pa$word"',
        'A="pa\\nword"',
        'A="pa`word"',
        "A='pa\\\\word'",
        "A='ends with \\\\'",
        "A='two\nlines'",
        'A="two\nlines"',
    ],
)
def test_a_value_that_compose_would_read_differently_is_refused_with_the_form_that_works(
    tmp_path: Path, line: str
) -> None:
    path = written(tmp_path / ".env", f"# a comment\n\nB=good\n\n\n{line}\n")
    (problem,) = problems(path)
    assert problem.startswith(f"{path} line 6: ")
    assert "value of A" in problem
    assert problem.endswith("as in A='pa$$w#rd'")


@pytest.mark.parametrize(
    "line",
    ["A", "export A", "A: value", "'A'=value", "A B=value", "1A=value", "A.B=value", "=value", "A='open", "A='a'b"],
)
def test_a_line_that_is_no_assignment_is_refused(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / ".env", f"B=good\n\n{line}\n")
    assert problems(path) == (f"{path} line 3: it is not NAME=value",)


def test_every_bad_line_of_a_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / ".env", "A=a$b\nB=good\nC: value\nD=d$e\n")
    assert [problem.split(":")[0] for problem in problems(path)] == [f"{path} line {line}" for line in (1, 3, 4)]


def test_a_refusal_does_not_repeat_the_value(tmp_path: Path) -> None:
    path = written(tmp_path / ".env", "REDIS_PASSWORD=s3cret$Zq7\nREDIS_PASSWORD: s3cret$Zq7\n")
    assert all("s3cret" not in problem and "Zq7" not in problem for problem in problems(path))


def test_the_last_of_two_lines_counts(tmp_path: Path) -> None:
    assert read_env_file(written(tmp_path / ".env", "A=first\nA=last\n")) == {"A": "last"}


def test_line_ends_and_byte_order_mark_of_windows_are_no_part_of_a_value(tmp_path: Path) -> None:
    path = written(tmp_path / ".env", "\ufeffA=one\r\nB='two words'\r\n")
    assert read_env_file(path) == {"A": "one", "B": "two words"}


def test_a_lone_carriage_return_is_refused(tmp_path: Path) -> None:
    (problem,) = problems(written(tmp_path / ".env", "# old\rA=one\n"))
    assert "carriage return" in problem


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_env_file(tmp_path / ".env") == {}


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path) == (f"{tmp_path}: cannot be read (Is a directory)",)
    latin = tmp_path / "latin"
    latin.write_bytes("A='\xe4'".encode("latin-1"))
    assert problems(latin) == (f"{latin}: cannot be read (it is not UTF-8)",)


# --- Writing .env


@SAME_FILE
@given(VALUES)
@example(" 0")
@example("0 ")
def test_a_quoted_value_is_read_back_unchanged_or_refused(tmp_path: Path, value: str) -> None:
    try:
        quoted = quote_value(value)
    except ValueError:
        # What the message says: there is no such form.
        assert any(mark in value for mark in ("\n", "\r", "\\\\", "\\'")) or value.endswith("\\")
        return
    path = written(tmp_path / ".env", f"A={quoted}\nZ=last\n")
    assert read_env_file(path) == {"A": value, "Z": "last"}


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\\\\b", "a\\'b", "a\\"])
def test_a_value_without_a_form_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        quote_value(value)


def test_a_value_is_quoted_only_where_it_must_be() -> None:
    assert quote_value("redis://redis:6379/0") == "redis://redis:6379/0"
    assert quote_value("it's") == "'it\\'s'"


# --- NAME_FILE


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
    assert read_secret_files({"PASSWORD_FILE": str(path), "OTHER": "x"}, ["PASSWORD"]) == (
        {"PASSWORD": value, "OTHER": "x"},
        [],
    )


def test_a_secret_and_its_file_together_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "password", "s3cret")
    _, found = read_secret_files({"PASSWORD": "other", "PASSWORD_FILE": str(path)}, ["PASSWORD"])
    assert found == ["PASSWORD and PASSWORD_FILE are both set: keep one of them"]


@pytest.mark.parametrize("empty", ["PASSWORD", "PASSWORD_FILE"])
def test_of_a_secret_and_its_file_the_empty_one_counts_as_not_set(tmp_path: Path, empty: str) -> None:
    path = written(tmp_path / "password", "s3cret")
    values, found = read_secret_files({"PASSWORD": "s3cret", "PASSWORD_FILE": str(path)} | {empty: ""}, ["PASSWORD"])
    assert (values, found) == ({"PASSWORD": "s3cret"}, [])


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


def test_the_environment_that_was_given_stays_as_it_was(tmp_path: Path) -> None:
    environment = {"PASSWORD_FILE": str(written(tmp_path / "password", "s3cret"))}
    read_secret_files(environment, ["PASSWORD"])
    assert list(environment) == ["PASSWORD_FILE"]


# --- A user's own variables


def test_a_task_reads_its_own_variable_and_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOP_URL", "https://shop.example.com")
    monkeypatch.setenv("SHOP_KEY", "from the environment")
    monkeypatch.setenv("SHOP_TOKEN_FILE", str(written(tmp_path / "token", "from a file\n")))
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


# --- What other processes see


def test_a_child_sees_stalks_and_the_users_variables_and_nothing_that_beats_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed = {"REDIS_PASSWORD": "a", "REDIS_PASSWORD_FILE": "b", "CELERY_BROKER_URL": "c", "SHOP_URL": "d"}
    held_back = (
        "BROKER_URL",
        "RESULT_BACKEND",
        "CELERY_RESULT_BACKEND",
        "CELERY_BROKER_READ_URL",
        "FLOWER_PORT",
        "FLOWER_BASIC_AUTH_FILE",
        "REMAP_SIGTERM",
        "SUPERVISOR_SERVER_URL",
        "CELERY_WORKER_PURGE",
        "CELERY_BEAT_SCHEDULER",
    )
    for name, value in passed.items():
        monkeypatch.setenv(name, value)
    for name in held_back:
        monkeypatch.setenv(name, "x")
    child = child_environment(["REDIS_PASSWORD", "CELERY_BROKER_URL"], STALK_NODES="2")
    assert child.items() >= (passed | {"STALK_NODES": "2"}).items()
    assert not child.keys() & set(held_back)
    assert child["PATH"] == os.environ["PATH"]


def test_a_known_variable_passes_although_its_name_looks_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWER_BASIC_AUTH", "admin:secret")
    monkeypatch.setenv("FLOWER_PORT", "9090")
    child = child_environment(["FLOWER_BASIC_AUTH"])
    assert child["FLOWER_BASIC_AUTH"] == "admin:secret"
    assert "FLOWER_PORT" not in child


def test_the_variables_that_celery_prefers_say_what_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://redis/0")
    monkeypatch.setenv("CELERY_BROKER_READ_URL", "redis://elsewhere/0")
    monkeypatch.delenv("CELERY_BROKER_WRITE_URL", raising=False)
    # Empty as Compose passes it on; filled in, a child would find it beside CELERY_RESULT_BACKEND_FILE.
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "")
    pin_celery_urls("redis://:secret@redis/0", "redis://:secret@redis/1")
    assert os.environ["CELERY_BROKER_URL"] == "redis://:secret@redis/0"
    assert os.environ["CELERY_BROKER_READ_URL"] == "redis://:secret@redis/0"
    assert "CELERY_BROKER_WRITE_URL" not in os.environ
    assert os.environ["CELERY_RESULT_BACKEND"] == ""
