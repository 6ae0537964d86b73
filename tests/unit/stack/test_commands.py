"""make and python -m stack: what they say when something is missing, with a `docker` that does not do as it should."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from stack.docker.engine import LOWEST_API, LOWEST_COMPOSE, parse_version
from tests.stack.containers.deployment import ROOT, clone, environment
from tests.stack.deployment import run
from tests.support.ports import free_port

# None of these commands does more than start Python and look for Docker.
SECONDS = 60
COMMANDS = ("up", "call x", "scale 2", "status", "logs", "shell", "stop", "down", "clean --yes")
INSTALL = "'sudo .ci/docker-engine' installs it on Debian 12 and newer"
ENGINE = 'if [ "$1" = version ]; then echo 26.1.5 1.45; exit; fi\n'


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone in which nothing has run."""
    return clone(tmp_path_factory.mktemp("commands") / "clone")


def stack(checkout: Path, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m stack COMMAND`, with Docker asked for: without it, `up` would start processes."""
    python = str(checkout / ".venv" / "bin" / "python")
    given = environment(**{"STALK_RUNTIME": "docker"} | variables)
    return run([python, "-m", "stack", *command.split()], checkout, given, SECONDS)


def fake_docker(directory: Path, script: str) -> dict[str, str]:
    """Variables under which `docker` is this shell script."""
    directory.mkdir()
    (directory / "docker").write_text(f"#!/bin/sh\n{script}")
    (directory / "docker").chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def only_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that has failed says, which is one line and no traceback."""
    assert done.returncode == 1, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ("2.26.1-4\n", (2, 26)),
        ("v2.26.1\n", (2, 26)),
        ("2.40.3+ds1-0ubuntu1\n", (2, 40)),
        ("2.24.0-desktop.1\n", (2, 24)),
        ("5.0.1\n", (5, 0)),
        ("2.9\n", (2, 9)),
        ("dev\n", ()),
        ("", ()),
    ],
)
def test_a_version_is_read(printed: str, version: tuple[int, ...]) -> None:
    assert parse_version(printed) == version


def test_versions_are_compared_as_numbers() -> None:
    assert parse_version("2.9.0") < LOWEST_COMPOSE <= parse_version("2.24.0") < parse_version("10.0.0")
    assert parse_version("1.9") < LOWEST_API <= parse_version("1.44") < parse_version("1.100")


@pytest.mark.parametrize("command", COMMANDS)
def test_without_an_engine_every_command_says_so_in_one_sentence(checkout: Path, tmp_path: Path, command: str) -> None:
    refused = "echo 'Cannot connect to the Docker daemon at unix:///nonexistent' >&2; exit 1\n"
    done = stack(checkout, command, **fake_docker(tmp_path / "bin", refused))
    sentence = only_sentence(done)
    assert sentence.startswith("no Docker Engine answers (Cannot connect to the Docker daemon at unix:///nonexistent)")
    assert sentence.endswith(f"start it; {INSTALL}")
    assert not (checkout / ".env").exists()


def test_a_real_docker_that_reaches_no_engine_is_one_sentence(checkout: Path) -> None:
    sentence = only_sentence(stack(checkout, "up", DOCKER_HOST="unix:///nonexistent/docker.sock", DOCKER_CONTEXT=""))
    assert "oes not answer" in sentence or "no Docker Engine answers" in sentence
    assert sentence.endswith(INSTALL)


def test_without_docker_on_path_that_is_said(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sentence = only_sentence(stack(checkout, "status", PATH=str(tmp_path / "empty")))
    assert sentence == f"Docker is needed and does not answer (docker is not on PATH: install it); {INSTALL}"


@pytest.mark.parametrize("version", ["2.23.3", "v2.9.0", "1.29.2", "dev"])
def test_a_compose_that_is_too_old_is_one_sentence(checkout: Path, tmp_path: Path, version: str) -> None:
    done = stack(checkout, "up", **fake_docker(tmp_path / "bin", f"{ENGINE}echo {version}\n"))
    assert only_sentence(done) == f"Docker Compose is {version}, and 2.24 or newer is needed: upgrade it; {INSTALL}"
    assert not (checkout / ".env").exists()


@pytest.mark.parametrize(
    ("command", "version", "api"),
    [("up", "24.0.9", "1.43"), ("up", "20.10.24+dfsg1", "1.41"), ("scale 2", "24.0.9", "1.43"), ("stop", "master", "")],
)
def test_an_engine_that_is_too_old_is_one_sentence(
    checkout: Path, tmp_path: Path, command: str, version: str, api: str
) -> None:
    script = f"if [ \"$1\" = version ]; then echo '{version} {api}'; exit; fi\necho 2.30.0\n"
    done = stack(checkout, command, **fake_docker(tmp_path / "bin", script))
    assert only_sentence(done) == f"Docker Engine is {version} (API {api}), and 25 or newer is needed: upgrade it"
    assert not (checkout / ".env").exists()


@pytest.mark.parametrize(
    "answers", ["echo 24.0.9 1.43", 'if [ "$1" = version ]; then echo 26.1.5 1.45; else echo 2.23.3; fi']
)
def test_a_first_start_does_not_pass_over_a_docker_that_is_too_old(
    checkout: Path, tmp_path: Path, answers: str
) -> None:
    done = stack(checkout, "up", STALK_RUNTIME="", **fake_docker(tmp_path / "bin", f"{answers}\n"))
    assert only_sentence(done).endswith("; or run the stack as processes of this host: make local")
    assert not (checkout / ".env").exists()
    assert not (checkout / ".stalk" / "runtime").exists()


@pytest.mark.parametrize("command", ["up", "scale 2"])
def test_more_cpus_than_dockers_machine_has_are_one_sentence_before_anything_starts(
    tmp_path: Path, command: str
) -> None:
    own = clone(tmp_path / "clone")
    script = (
        f'{ENGINE}case "$*" in *--short) echo 2.30.0;; info*) echo 2;; *"ps "*) ;; *) echo "asked: $*" >&2; exit 9;; '
        "esac\n"
    )
    shutil.copy(own / ".env.example", own / ".env")
    login = {"FLOWER_BASIC_AUTH": "a:b", "REDIS_PASSWORD": "c", "FLOWER_PORT": str(free_port())}
    done = stack(own, command, **fake_docker(tmp_path / "bin", script), **login, WORKER_CPUS="2.5")
    assert only_sentence(done) == (
        "WORKER_CPUS is 2.5, and the CPUs of Docker's machine are 2: set at most that in .env, or 0 for no limit"
    )


def test_a_docker_without_compose_is_one_sentence(checkout: Path, tmp_path: Path) -> None:
    script = f"{ENGINE}echo \"docker: 'compose' is not a docker command.\" >&2; exit 1\n"
    done = stack(checkout, "up", **fake_docker(tmp_path / "bin", script))
    assert only_sentence(done) == f"Docker has no Compose plugin: install Docker Compose 2.24 or newer; {INSTALL}"


def test_a_checkout_with_data_in_docker_is_not_started_without_docker(checkout: Path, tmp_path: Path) -> None:
    own = clone(tmp_path / "clone")
    (own / ".stalk").mkdir()
    (own / ".stalk" / "runtime").write_text("docker\n")
    done = stack(own, "up", STALK_RUNTIME="", **fake_docker(tmp_path / "bin", "echo no >&2; exit 1\n"))
    sentence = only_sentence(done)
    assert sentence.startswith("no Docker Engine answers (no)")
    assert "this checkout's data is in Docker's volumes, so nothing was started without it" in sentence
    assert not (own / ".env").exists()


def test_a_command_of_docker_that_fails_is_told_by_its_last_line(checkout: Path, tmp_path: Path) -> None:
    script = f'{ENGINE}if [ "$3" = --short ]; then echo 2.30.0; exit; fi\necho first >&2; echo the reason >&2; exit 7\n'
    done = stack(checkout, "status", **fake_docker(tmp_path / "bin", script))
    assert only_sentence(done).endswith("failed: the reason")


@pytest.mark.parametrize("name", [".env", ".env.tasks"])
def test_a_line_that_compose_cannot_read_is_named_and_not_said_back(tmp_path: Path, name: str) -> None:
    own = clone(tmp_path / "clone")
    (own / name).write_text("SHOP_URL=https://shop.example.com\nSHOP_TOKEN='canary\n")
    # Docker has every image and no container.
    script = (
        f'{ENGINE}case "$*" in *--short) echo 2.30.0;; info*) echo 2;; '
        'compose*) echo "line 1: unterminated quoted value \'canary" >&2; exit 15;; esac\n'
    )
    variables = fake_docker(tmp_path / "bin", script) | {"FLOWER_PORT": str(free_port())}
    for command in ("up", "logs", "stop"):
        done = stack(own, command, **variables)
        assert done.returncode == 2, done
        assert f"error: {own / name} line 2: it is not NAME=value" in done.stderr.splitlines()
        assert "canary" not in done.stdout + done.stderr


def test_without_registry_and_debootstrap_one_sentence_names_both_ways_out(tmp_path: Path) -> None:
    own = clone(tmp_path / "clone")
    script = (
        f'{ENGINE}case "$*" in *--short) echo 2.30.0;; info*) echo 2;; *inspect*|pull*) echo no >&2; exit 1;; esac\n'
    )
    variables = fake_docker(tmp_path / "bin", script)
    for name in ("bash", "env", "sh", "mktemp", "rm", "dirname"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    # Whoever runs this may be anybody: another user hears first that debootstrap needs root.
    (tmp_path / "bin" / "id").write_text("#!/bin/sh\necho 0\n")
    (tmp_path / "bin" / "id").chmod(0o755)
    path = variables["PATH"].partition(":")[0]
    done = stack(own, "up", PATH=path, FLOWER_PORT=str(free_port()), FLOWER_BASIC_AUTH="a:b")
    assert only_sentence(done) == (
        "the base images could not be built: debootstrap was not found: apt-get install debootstrap; or run the stack "
        "as processes of this host, without images: make local"
    )


@pytest.mark.parametrize(
    ("target", "variables", "says"),
    [
        ("call", {}, "TASK is not set: make call TASK=services.tasks.arithmetic.add ARGS='[4, 3]'"),
        ("scale", {}, "WORKERS: found ''; it must be a whole number, as in: make scale WORKERS=4"),
        (
            "scale",
            {"WORKERS": "three"},
            "WORKERS: found 'three'; it must be a whole number, as in: make scale WORKERS=4",
        ),
        ("scale", {"WORKERS": "-1"}, "WORKERS: found '-1'; it must be a whole number, as in: make scale WORKERS=4"),
        ("scale", {"WORKERS": "1.5"}, "WORKERS: found '1.5'; it must be a whole number, as in: make scale WORKERS=4"),
        ("scale", {"WORKERS": "5000"}, "WORKERS: found '5000'; allowed: a whole number from 0 to 1000"),
    ],
)
def test_a_variable_of_make_that_is_missing_or_wrong_is_one_sentence(
    checkout: Path, target: str, variables: Mapping[str, str], says: str
) -> None:
    words = [f"{name}={value}" for name, value in variables.items()]
    given = environment(STALK_RUNTIME="docker")
    done = run(["make", "--old-file=.venv/ready", target, *words], checkout, given, SECONDS)
    assert done.returncode == 2
    first, *rest = done.stderr.splitlines()
    assert first == f"error: {says}"
    # make adds a line of its own.
    assert [line for line in rest if not line.startswith("make: ***")] == []
    assert not (checkout / ".env").exists()


def test_make_alone_lists_every_target_with_a_line(checkout: Path) -> None:
    done = run(["make"], checkout, environment(), SECONDS)
    targets = re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = dict(re.findall(r"^  make (\S+) +(\S.*)$", done.stdout, re.MULTILINE))
    assert sorted(listed) == sorted(targets)
    assert {"up", "call", "scale", "status", "logs", "shell", "stop", "down", "clean", "test", "lint"} <= set(targets)
    groups = [line for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    assert groups == re.findall(r"^##@ (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all(len(line) <= 120 for line in done.stdout.splitlines())
