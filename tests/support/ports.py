"""Ports for what a test starts."""

from __future__ import annotations

import os
import random
import socket

# Below those that the kernel takes for connections (ip_local_port_range): tests make thousands of these. Tests that run
# inside a test have a range of their own.
PORTS = range(*map(int, os.environ.get("STALK_TEST_PORTS", "20000-32768").split("-")))
# Each once, and only those of this worker of pytest-xdist: whoever has got one may stop, and start on it again.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
left = list(PORTS[WORKER :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))])


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, and that no other test gets."""
    while left:
        # Not in order: a process that is forked, as for `make chaos`, has the same list.
        port = left.pop(random.randrange(len(left)))
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"all ports from {PORTS.start} to {PORTS.stop} have been given away, or are taken")
