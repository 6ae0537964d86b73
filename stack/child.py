"""python -m stack.child redis | node | beat | flower …: what Supervisor starts where there is no Docker.

Becomes that program, with the environment variables that the last `make up` wrote down. It stays at this place: a
Supervisor that runs has `-m stack.child` in its configuration, and `make scale` is no reason to restart it.
"""

import json
import os
import sys

from stack import paths

# These run the user's code and see the user's variables, as in compose.yaml.
OWN = ("node", "beat")


def main(role: str, *arguments: str) -> None:
    """Become the program of that role."""
    written = json.loads(paths.ENVIRONMENT.read_text(encoding="utf-8"))
    environment = written["all"] | (written["own"] if role in OWN else {})
    module = ["stack.local.redis_server"] if role == "redis" else ["services.launch", role]
    os.execve(sys.executable, [sys.executable, "-m", *module, *arguments], environment)


if __name__ == "__main__":
    main(*sys.argv[1:])
