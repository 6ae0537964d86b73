"""Ports of this host that another program has: what `make up` says of them, with Docker and without."""

import re
import socket

from config import Settings
from stack.errors import CommandError
from stack.runtime import Runtime

# As Docker's engines write it (26 and 28), for a port of another program or of another container.
BUSY = re.compile(r"(\S+?):([0-9]+)[:/ ].*((?:address|port is) already (?:in use|allocated))")


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
                describe_busy_port(port, address, str(error.strerror), "Flower", "FLOWER_PORT (and FLOWER_BIND)")
            ) from None


def explain_error_of_docker(error: str, settings: Settings) -> str:
    """`error`, or where it is about a port that Redis is published at, the sentence that names the variable."""
    variables = {settings.stack.redis_port: "REDIS_PORT", settings.stack.redis_tls_port: "REDIS_TLS_PORT"}
    found = BUSY.search(error)
    if not found or int(found[2]) not in variables:
        return error
    return describe_busy_port(int(found[2]), found[1], found[3], "Redis", variables[int(found[2])])


def describe_busy_port(port: int, address: str, why: str, program: str, names: str) -> str:
    """The sentence about a port that is taken; `names` are the variables that choose another one."""
    return f"port {port} on {address} is not available for {program} ({why}): stop what uses it, or set {names} in .env"
