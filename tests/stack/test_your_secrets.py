"""Secrets that come from files in place of .env."""

from __future__ import annotations

import pytest

from tests.stack.handle import SERVICES, Stack

# The same path on the host, where make reads it, and in the containers.
MOUNT = "  {service}:\n    volumes: ['{path}:{path}:ro']\n"


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
            told = str(stack.inspect(identifier)["Config"]["Env"])
            assert not any(secret in told for secret in secrets.values())
    finally:
        stack.env_file.write_text(before)
