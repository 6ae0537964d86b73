"""Ports for what a test starts."""

from __future__ import annotations

import random
import socket

# Below those that the kernel takes for connections (ip_local_port_range): tests make thousands of these, and a port
# must still be free when its owner, seconds later or after a restart, listens on it.
PORTS = range(20_000, 32_768)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at the moment."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no port from {PORTS.start} to {PORTS.stop} is free")
