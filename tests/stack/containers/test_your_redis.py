"""A Redis of one's own in place of the stack's."""

from collections.abc import Iterator

import pytest

from tests.stack.containers.deployment import SERVICES, Stack


@pytest.fixture
def redis_elsewhere(stack: Stack) -> Iterator[str]:
    """host:port of a Redis that is on none of the stack's networks: the host passes its port on."""
    image = stack.inspect(stack.ids("redis")[0])["Config"]["Image"]
    name, gateway = (
        f"{stack.project}-elsewhere",
        stack.docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}").strip(),
    )
    options = ("--appendonly", "yes", "--requirepass", "el$ewhere")
    stack.docker("run", "--detach", "--name", name, f"--publish={gateway}::6379", image, "redis-server", *options)
    yield stack.docker("port", name, "6379/tcp").strip()
    stack.docker("rm", "--force", "--volumes", name)


@pytest.mark.slow
def test_two_urls_and_one_variable_put_a_redis_of_ones_own_in_place(stack: Stack, redis_elsewhere: str) -> None:
    before = stack.env_file.read_text()
    stack.set_variables(
        f"CELERY_BROKER_URL=redis://:el%24ewhere@{redis_elsewhere}/4\n"
        f"CELERY_RESULT_BACKEND=redis://:el%24ewhere@{redis_elsewhere}/5\n"
        "REDIS_REPLICAS=0\n"
    )
    try:
        stack.make("up")
        assert {container["Service"] for container in stack.containers()} == set(SERVICES) - {"redis"}
        answer, _ = stack.call("services.tasks.arithmetic.add", 4, 3)
        assert answer["result"] == 7
        keys = stack.docker(
            "exec", f"{stack.project}-elsewhere", "redis-cli", "-a", "el$ewhere", "-n", "5", "KEYS", "*"
        )
        assert f"celery-task-meta-{answer['id']}" in keys
    finally:
        stack.make("down")
        stack.env_file.write_text(before)
