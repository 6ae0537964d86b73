"""Env files: what is read from one, what is refused, what is written to one, and that the real Compose agrees."""

import json
import os
import shutil
import string
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from config import ConfigError, load
from config.environment import quote_value, read_env_file

# Reading one small file takes a tenth of a second.
COMPOSE_SECONDS = 120
# The beginning of a file, and the value that A has in it.
READABLE = {
    "A=plain": "plain",
    "A=": "",
    "A=''": "",
    "# a comment\n\nA=plain": "plain",
    "A=plain # a comment": "plain",
    "A = spaced ": "spaced",
    "  A=indented": "indented",
    "\u00a0A=indented": "indented",
    "export A=exported": "exported",
    "export  A=exported": "exported",
    "A=two words": "two words",
    "A=redis://:secret@redis:6379/0?a=b&c=d": "redis://:secret@redis:6379/0?a=b&c=d",
    "A=entry=0 3 * * *; other=off": "entry=0 3 * * *; other=off",
    "A='pa$$w#rd'": "pa$$w#rd",
    "A='it\\'s' # it's a comment": "it's",
    "A='one'# comment": "one",
    "A='back\\slash'": "back\\slash",
    "A='${B}'": "${B}",
    'A="double # quoted"': "double # quoted",
    'A="one" # comment': "one",
    "A=' spaces '": " spaces ",
    "A='äöü 日本'": "äöü 日本",
    "A=first\nA=last": "last",
    # Line ends and byte order mark of Windows.
    "A=one\r": "one",
    "A='two words'\r": "two words",
    "\ufeffA=mark": "mark",
}
# Characters and words that readers of an env file make something of.
MARKS = (*string.punctuation, "$$", "%%", "''", "${HOME}", "$(id)", "\\n", "\\t", " ", "  ", "\t", "\u00a0", "\u2028")
PASSWORDS = (
    *(f"{before}{mark}{after}" for mark in MARKS for before in ("", "x") for after in ("", "x")),
    *("", "plain", "päßwörd", "日本語", "🔑", "export X=1", "after #space", " both ", "a=b=c"),
    *("'whole'", 'say "yes"', '"whole"', "user:pass@host/db?a=b&c=%41", "{[(<!*~^>)]}", "$#'\"\\@:/% ü"),
)
VALUES = st.text(st.characters(codec="utf-8") | st.sampled_from("$#'\"\\` ="))
# Hypothesis writes the same file again for each example, which is fine.
SAME_FILE = hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

Compose = Callable[..., dict[str, str]]
Write = Callable[[str], Path]


@pytest.fixture(scope="module")
def compose_works() -> None:
    """Skips where there is no Compose; fails instead where Docker is required."""
    docker = shutil.which("docker") or "false"
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        return
    if os.environ.get("STALK_REQUIRE_DOCKER") == "1":
        pytest.fail("`docker compose version` does not work, and STALK_REQUIRE_DOCKER=1")
    pytest.skip("`docker compose version` does not work: Compose cannot be compared with")


@pytest.fixture
def compose(tmp_path: Path, compose_works: None) -> Compose:
    """Reads variables from an env file, under an environment, as Compose passes them to a container."""

    def read(env_file: Path, *names: str, **environment: str) -> dict[str, str]:
        file = tmp_path / "compose.yaml"
        file.write_text(json.dumps({"services": {"one": {"image": "none", "environment": dict.fromkeys(names)}}}))
        answer = subprocess.run(
            ["docker", "compose", "--env-file", env_file, "-f", file, "config", "--format", "json"],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            check=True,
            timeout=COMPOSE_SECONDS,
        )
        values = json.loads(answer.stdout)["services"]["one"]["environment"]
        # Printed as a compose file, where a dollar is written twice.
        return {name: value.replace("$$", "$") for name, value in values.items() if value is not None}

    return read


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an env file."""

    def write(text: str) -> Path:
        (tmp_path / ".env").write_text(text, encoding="utf-8", newline="")
        return tmp_path / ".env"

    return write


def problems(path: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refusal:
        read_env_file(path)
    return refusal.value.problems


# --- Reading


@pytest.mark.parametrize(("text", "value"), READABLE.items())
def test_a_file_means_what_it_says(write: Write, text: str, value: str) -> None:
    assert read_env_file(write(f"{text}\nZ=last\n")) == {"A": value, "Z": "last"}


@pytest.mark.parametrize(("text", "value"), READABLE.items())
def test_a_file_means_the_same_to_compose(write: Write, compose: Compose, text: str, value: str) -> None:
    assert compose(write(f"{text}\nZ=last\n"), "A", "Z") == {"A": value, "Z": "last"}


@pytest.mark.parametrize("environment", [{}, {"LOG_LEVEL": "debug"}, {"LOG_LEVEL": ""}])
def test_the_environment_beats_the_file_as_it_does_for_compose(
    write: Write, compose: Compose, environment: dict[str, str]
) -> None:
    env_file = write("LOG_LEVEL=error\n")
    # In the container there is no file: what Compose passes on is all that the settings are made of.
    assert load(environment, env_file) == load(compose(env_file, "LOG_LEVEL", **environment))


@pytest.mark.parametrize(
    "line",
    [
        "A=pa$word",
        "A=${B}",
        "A=${B:-default}",
        "A=pa#word",
        "A=pa# comment",
        "A= # comment",
        "A=pa'word",
        'A=pa"word',
        "A=pa\\word",
        "A=pa`word",
        "A=a  b",
        "A=a\t# comment",
        "A=\u00a0a",
        "A=äöü",
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
    write: Write, line: str
) -> None:
    path = write(f"# a comment\n\nB=good\n\n\n{line}\n")
    (problem,) = problems(path)
    assert problem.startswith(f"{path} line 6: ")
    assert "value of A" in problem
    assert problem.endswith("as in A='pa$$w#rd'")


@pytest.mark.parametrize(
    "line",
    ["A", "export A", "A: value", "'A'=value", "A B=value", "1A=value", "A.B=value", "=value", "A='open", "A='a'b"],
)
def test_a_line_that_is_no_assignment_is_refused(write: Write, line: str) -> None:
    path = write(f"B=good\n\n{line}\n")
    assert problems(path) == (f"{path} line 3: it is not NAME=value",)


def test_every_bad_line_of_a_file_is_named_and_no_value_is_repeated(write: Write) -> None:
    path = write("REDIS_PASSWORD=s3cret$Zq7\nB=good\nREDIS_PASSWORD: s3cret$Zq7\nD=s3cret$Zq7\n")
    found = problems(path)
    assert [problem.split(":")[0] for problem in found] == [f"{path} line {line}" for line in (1, 3, 4)]
    assert not any(part in problem for problem in found for part in ("s3cret", "Zq7"))


def test_a_file_that_cannot_be_read_is_refused_and_one_that_is_not_there_is_empty(write: Write, tmp_path: Path) -> None:
    assert read_env_file(tmp_path / "gone") == {}
    assert problems(tmp_path) == (f"{tmp_path}: cannot be read (Is a directory)",)
    (problem,) = problems(write("# old\rA=one\n"))
    assert "carriage return" in problem
    latin = tmp_path / "latin"
    latin.write_bytes("A='\xe4'".encode("latin-1"))
    assert problems(latin) == (f"{latin}: cannot be read (it is not UTF-8)",)


# --- Writing


@SAME_FILE
@given(VALUES)
@example(" 0")
@example("0 ")
@example("a\nb")
@example("a\rb")
@example("a\\\\b")
@example("a\\'b")
@example("a\\")
def test_a_value_is_read_back_unchanged_or_has_no_form_and_is_refused(write: Write, value: str) -> None:
    if value.endswith("\\") or any(mark in value for mark in ("\n", "\r", "\\\\", "\\'")):
        with pytest.raises(ValueError, match="cannot be written"):
            quote_value(value)
    else:
        assert read_env_file(write(f"A={quote_value(value)}\nZ=last\n")) == {"A": value, "Z": "last"}


def test_a_value_is_quoted_only_where_it_must_be() -> None:
    assert quote_value("redis://redis:6379/0") == "redis://redis:6379/0"
    assert quote_value("it's") == "'it\\'s'"


def test_a_password_that_stalk_has_written_is_the_same_for_compose(write: Write, compose: Compose) -> None:
    values = {f"PASSWORD_{number}": value for number, value in enumerate(PASSWORDS) if not value.endswith("\\")}
    env_file = write("".join(f"{name}={quote_value(value)}\n" for name, value in values.items()))
    assert read_env_file(env_file) == values
    assert compose(env_file, *values) == values
