"""Secrets that come from files in place of .env, and what shows none."""

from base64 import b64encode

import pytest

from tests.stack.containers.deployment import SERVICES, Stack
from tests.stack.deployment import Deployment

# The same path on the host, where make reads it, and in the containers.
MOUNT = "  {service}:\n    volumes: ['{path}:{path}:ro']\n"

# What people ask with `make`.
ASKING = ("status", "schedule", "dead-letters")


@pytest.mark.slow
def test_secrets_come_from_files_and_are_in_no_containers_environment(stack: Stack) -> None:
    before, directory = stack.env_file.read_text(), stack.directory / "secrets"
    directory.mkdir()
    # Whatever the umask is.
    directory.chmod(0o755)
    secrets = {"REDIS_PASSWORD": "pa$$ from 'a' file", "FLOWER_BASIC_AUTH": "ops:from, a: file"}
    for name, secret in secrets.items():
        (directory / name).write_text(secret + "\n")
        # Redis and the application are two users.
        (directory / name).chmod(0o644)
    stack.set_variables("".join(f"{name}=\n{name}_FILE={directory / name}\n" for name in secrets))
    stack.override.write_text("services:\n" + "".join(MOUNT.format(service=name, path=directory) for name in SERVICES))
    try:
        stack.make("up")
        assert stack.call("services.tasks.arithmetic.add", 4, 3)[0]["result"] == 7
        assert stack.flower("/flower/", secrets["FLOWER_BASIC_AUTH"]).status == 200
        assert stack.flower("/flower/", "").status == 401
        for identifier in stack.ids():
            output = str(stack.inspect(identifier)["Config"]["Env"])
            assert not any(secret in output for secret in secrets.values())
    finally:
        stack.env_file.write_text(before)


def test_neither_a_command_nor_what_runs_shows_a_secret(deployment: Deployment) -> None:
    login = deployment.login()
    secrets = [deployment.env_value("REDIS_PASSWORD"), login.partition(":")[2], b64encode(login.encode()).decode()]
    assert deployment.flower().status == 200

    shown = {f"make {name} {JSON}": deployment.make(name, JSON=JSON).stdout for name in ASKING for JSON in ("", "1")}
    shown |= deployment.readable()

    assert not [place for place, text in shown.items() for secret in secrets if secret in text]
