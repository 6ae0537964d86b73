"""config.environment against the real Compose: one env file, read alike by both."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from config import ConfigError, load
from config.environment import quote_value, read_env_file

# Reading one small file takes a tenth of a second.
COMPOSE_SECONDS = 120
PASSWORDS = (
    "",
    "plain",
    "pa$word",
    "pa$$word",
    "${HOME}",
    "$(id)",
    "#first",
    "in#side",
    "after #space",
    "it's",
    "''",
    "'whole'",
    'say "yes"',
    '"whole"',
    "back\\slash",
    "\\first",
    "new\\nline",
    "tab\\t",
    "user:pass@host/db?a=b&c=%41",
    "100%",
    "%%",
    " spaces ",
    "two  spaces",
    "tab\there",
    "back`tick`",
    "semi;colon,comma|pipe",
    "{[(<!*~^>)]}",
    "a=b=c",
    "-dash",
    "export X=1",
    "päßwörd",
    "日本語",
    "🔑",
    "no\u00a0break",
    "line\u2028separator",
    "$#'\"\\@:/% ü",
)
# Lines as people write them; what read_env_file refuses needs no agreement.
LINES = (
    "A=plain",
    "A=",
    "A= # nothing",
    "A=one # comment",
    "A=one# comment",
    "A=one\t# comment",
    "A = spaced ",
    "  A=indented",
    "export A=exported",
    "export  A=exported",
    "A: yaml",
    "A",
    "'A'=quoted",
    "A='one' # it's a comment",
    "A='one'# comment",
    'A="one" # comment',
    'A="pa#ss"',
    'A="pa$ss"',
    'A="pa\\nss"',
    "A=pa$ss",
    "A='pa\\\\ss'",
    "A='it\\'s'",
    "A='two\nlines'",
    "A=first\nA=last",
    "A=windows\r\nB=lines\r",
    "# old\rA=mac",
    "\ufeffA=mark",
    "\u00a0A=space",
    "A=\u00a0space",
    "A=${B:-default}",
)

Compose = Callable[[str, Mapping[str, str]], dict[str, str]]


@pytest.fixture(scope="module")
def compose_works() -> None:
    """Skips where there is no Compose; fails instead where Docker is required."""
    try:
        version = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    except FileNotFoundError:
        version = 127
    if version == 0:
        return
    if os.environ.get("STALK_REQUIRE_DOCKER") == "1":
        pytest.fail("`docker compose version` does not work, and STALK_REQUIRE_DOCKER=1")
    pytest.skip("`docker compose version` does not work: Compose cannot be compared with")


@pytest.fixture
def compose(tmp_path: Path, compose_works: None) -> Compose:
    """Reads an env file's text, under an environment, as Compose passes it to a container."""

    def read(text: str, environment: Mapping[str, str]) -> dict[str, str]:
        names = sorted({*read_env_file(written(tmp_path / "env", text)), *environment, "A"})
        file = tmp_path / "compose.yaml"
        file.write_text(json.dumps({"services": {"one": {"image": "none", "environment": dict.fromkeys(names)}}}))
        answer = subprocess.run(
            ["docker", "compose", "--env-file", tmp_path / "env", "-f", file, "config", "--format", "json"],
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


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_a_password_written_by_stalk_is_the_same_for_compose(compose: Compose, tmp_path: Path) -> None:
    passwords = {f"PASSWORD_{number}": password for number, password in enumerate(PASSWORDS)}
    text = "".join(f"{name}={quote_value(password)}\n" for name, password in passwords.items())
    assert read_env_file(written(tmp_path / ".env", text)) == passwords
    assert compose(text, {}) == passwords


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_refused_or_the_same_for_compose(compose: Compose, tmp_path: Path, line: str) -> None:
    try:
        values = read_env_file(written(tmp_path / ".env", f"{line}\n"))
    except ConfigError:
        return
    assert compose(f"{line}\n", {}) == values


@pytest.mark.parametrize("environment", [{}, {"LOG_LEVEL": "debug"}, {"LOG_LEVEL": ""}])
def test_the_environment_beats_the_file_as_it_does_for_compose(
    compose: Compose, tmp_path: Path, environment: dict[str, str]
) -> None:
    text = "LOG_LEVEL=error\n"
    settings = load(environment, written(tmp_path / ".env", text))
    # In the container there is no file: what Compose passes on is all that the settings are made of.
    assert settings.tasks.log_level == load(compose(text, environment)).tasks.log_level
