"""Who reaches whom: Redis is for the stack alone, workers may talk to the harness, beat may not."""

import socket
import threading

import pytest

from tests.stack.containers.deployment import Stack

CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
except OSError as error:
    print("no:", error)
else:
    print("yes")
"""


def test_redis_is_not_published_on_the_host(stack: Stack) -> None:
    about = stack.inspect(stack.ids("redis")[0])
    assert about["HostConfig"]["PortBindings"] in (None, {})
    assert not any((about["NetworkSettings"]["Ports"] or {}).values())


def test_redis_sits_on_an_internal_network_alone(stack: Stack) -> None:
    networks = stack.inspect(stack.ids("redis")[0])["NetworkSettings"]["Networks"]
    broker = stack.network("broker-1")
    assert list(networks) == [broker["Name"]]
    assert broker["Internal"]


def test_whoever_gets_to_redis_without_a_password_is_turned_away(stack: Stack) -> None:
    image = stack.inspect(stack.ids("redis")[0])["Config"]["Image"]
    network = stack.network("broker-1")["Name"]
    ask = ("run", "--rm", f"--network={network}", "--entrypoint=redis-cli", image, "-h", "redis")
    assert stack.docker(*ask, "LLEN", "celery").strip() == "NOAUTH Authentication required."
    assert "WRONGPASS" in stack.docker(*ask, "-a", "guess", "--no-auth-warning", "PING")


def test_the_engines_own_host_is_turned_away_too(stack: Stack) -> None:
    # On Linux the host itself has an address on every bridge, internal ones included.
    (endpoint,) = stack.inspect(stack.ids("redis")[0])["NetworkSettings"]["Networks"].values()
    try:
        with socket.create_connection((endpoint["IPAddress"], 6379), 5) as connection:
            connection.sendall(b"LLEN celery\r\n")
            answer = connection.recv(100)
    except OSError:
        return
    assert answer.startswith(b"-NOAUTH")


@pytest.fixture
def outside(stack: Stack) -> tuple[str, int]:
    """A server outside the stack's networks: on the host, at the gateway of the network `web`."""
    gateway = str(stack.network("web")["IPAM"]["Config"][0]["Gateway"])
    server = socket.create_server((gateway, 0))
    server.settimeout(60)

    def accept() -> None:
        with server:
            server.accept()[0].close()

    threading.Thread(target=accept, daemon=True).start()
    return gateway, server.getsockname()[1]


def test_a_worker_reaches_the_outside(stack: Stack, outside: tuple[str, int]) -> None:
    assert reaches(stack, "worker", *outside) == "yes"
    assert has_default_route(stack, "worker")


def test_beat_does_not_reach_the_outside(stack: Stack, outside: tuple[str, int]) -> None:
    assert reaches(stack, "beat", *outside).startswith("no:")
    assert not has_default_route(stack, "beat")
    # The same question, so that a server which nobody could reach would not pass for a closed door.
    assert reaches(stack, "worker", *outside) == "yes"


def test_redis_does_not_reach_the_outside(stack: Stack) -> None:
    assert not has_default_route(stack, "redis")


def reaches(stack: Stack, service: str, host: str, port: int) -> str:
    """Whether a container gets a connection, and if not, why."""
    return stack.execute(service, "python", "-c", CONNECT, host, str(port)).strip()


def has_default_route(stack: Stack, service: str) -> bool:
    """Whether packets for strangers have somewhere to go."""
    _, *routes = stack.shell(service, "cat /proc/net/route").splitlines()
    return any(route.split()[1] == "00000000" for route in routes)
