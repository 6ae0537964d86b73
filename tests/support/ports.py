"""Ports for what a test starts."""

from __future__ import annotations

import os
import random
import socket

# The first that the kernel takes for connections (ip_local_port_range): tests make thousands of these.
FIRST_OF_CONNECTIONS = 32768
# Tests that run inside a test have a range of their own.
PORTS = range(*map(int, os.environ.get("STALK_TEST_PORTS", f"20000-{FIRST_OF_CONNECTIONS}").split("-")))
# Each once, and only those of this worker of pytest-xdist: whoever has got one may stop, and start on it again.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
left = list(PORTS[WORKER :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))])


def free_port(another: int = 0) -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, and that no other test gets.

    So is the one that is higher by `another`, which some other test may get.
    """
    # Not in order: a process that is forked, as for `make chaos`, has the same list.
    random.shuffle(left)
    for port in [port for port in left if port + another < FIRST_OF_CONNECTIONS]:
        left.remove(port)
        if is_free(port) and is_free(port + another):
            return port
    raise AssertionError(f"all ports from {PORTS.start} to {PORTS.stop} have been given away, or are taken")


def is_free(port: int) -> bool:
    """Whether nobody listens on this TCP port of 127.0.0.1."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
