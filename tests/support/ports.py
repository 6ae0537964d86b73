"""Ports for what a test starts."""

import os
import random
import socket

# From here on the kernel takes ports for outgoing connections (ip_local_port_range): tests make thousands of them.
FIRST_EPHEMERAL = 32768
# A pytest that a test runs gets a range of its own.
PORTS = range(*map(int, os.environ.get("STALK_TEST_PORTS", f"20000-{FIRST_EPHEMERAL}").split("-")))
# Each is given away once, and only to this worker of pytest-xdist: a server may stop and start again on its port.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
available = list(PORTS[WORKER :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))])


def free_port(another: int = 0) -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, and that no other test gets.

    Nobody listens on the port higher by `another` either, but another test may get that one.
    """
    # Not in order: a process that is forked, as for `make chaos`, has the same list.
    random.shuffle(available)
    for port in [port for port in available if port + another < FIRST_EPHEMERAL]:
        available.remove(port)
        if is_free(port) and is_free(port + another):
            return port
    raise AssertionError(f"all ports from {PORTS.start} to {PORTS.stop} have been given away, or are in use")


def is_free(port: int) -> bool:
    """Whether nobody listens on this TCP port of 127.0.0.1."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
