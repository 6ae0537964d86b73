"""python -m stack.child redis | node | beat | flower …: what Supervisor starts where there is no Docker.

Becomes that program with the environment that the last `make up` wrote down.
"""

from __future__ import annotations

import json
import os
import sys

from stack import paths

# As in compose.yaml: these run the user's code.
OWN = ("node", "beat")


def main(role: str, *arguments: str) -> None:
    """Become the program."""
    seen = json.loads(paths.ENVIRONMENT.read_text(encoding="utf-8"))
    environment = seen["all"] | (seen["own"] if role in OWN else {})
    module = ["stack.local.redis_server"] if role == "redis" else ["services.launch", role]
    os.execve(sys.executable, [sys.executable, "-m", *module, *arguments], environment)


if __name__ == "__main__":
    main(*sys.argv[1:])
