"""A Redis that would lose tasks is refused before anything runs on it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.stack.containers.deployment import Stack

MEND = "run 'redis-cli CONFIG SET maxmemory-policy noeviction', and set it in redis.conf"
RUN = ("run", "--rm", "-T", "--no-deps")
LOOK_AGAIN = "from config import load; from services.broker import preflight; preflight.check(load())"


@pytest.fixture
def evicting_redis(stack: Stack) -> Iterator[str]:
    """The name of a Redis beside the stack's own that throws tasks away when it is full."""
    name, network = f"{stack.project}-evicting", stack.network("broker-1")["Name"]
    image = stack.inspect(stack.ids("redis")[0])["Config"]["Image"]
    options = ("--appendonly", "yes", "--protected-mode", "no", "--maxmemory-policy", "allkeys-lru")
    stack.docker("run", "--detach", "--name", name, f"--network={network}", image, "redis-server", *options)
    yield name
    stack.docker("rm", "--force", "--volumes", name)


def test_an_evicting_redis_is_refused_with_the_command_that_mends_it(stack: Stack, evicting_redis: str) -> None:
    urls = {
        "CELERY_BROKER_URL": f"redis://{evicting_redis}:6379/0",
        "CELERY_RESULT_BACKEND": f"redis://{evicting_redis}:6379/1",
    }
    given = [f"--env={name}={value}" for name, value in (urls | {"REDIS_PASSWORD": ""}).items()]
    services = ("worker", "beat")
    with ThreadPoolExecutor(len(services)) as both:
        ran = list(both.map(lambda service: stack.compose(*RUN, *given, service, check=False), services))
    for done in ran:
        output = done.stdout + done.stderr
        assert done.returncode == 3, output
        assert "its maxmemory-policy is allkeys-lru, so it throws away waiting tasks when it is full" in output
        assert MEND in output
        assert "Traceback" not in output
    stack.docker("exec", evicting_redis, "redis-cli", "CONFIG", "SET", "maxmemory-policy", "noeviction")
    again = stack.compose(*RUN, "--entrypoint=python", *given, "worker", "-c", LOOK_AGAIN, check=False)
    assert again.returncode == 0, again.stderr
