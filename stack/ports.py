"""The check that a port of this host is free, made before anything is started, with Docker and without."""

from __future__ import annotations

import socket

from config import Settings
from stack.errors import CommandError
from stack.runtime import Runtime


def require_flower_port(runtime: Runtime, settings: Settings) -> None:
    """Raise CommandError when another program has Flower's port."""
    address, port = settings.flower.bind.strip("[]"), settings.flower.port
    if runtime.serves_flower_at(port):
        return
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise CommandError(
                f"port {port} on {address} is not available for Flower ({error.strerror}): stop what uses it, or set "
                "FLOWER_PORT (and FLOWER_BIND) in .env"
            ) from None
