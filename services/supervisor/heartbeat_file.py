"""The heartbeat file of a process: its age tells whether the process is alive, its word tells what it does.

Written by every node, by beat and by Flower. Read by the watchdog, by `make dev` and `make up`, and by
docker/healthcheck, which is a shell script. Only the standard library: supervisord must not carry Celery in memory.
"""

import os
from logging import getLogger
from pathlib import Path

logger = getLogger(__name__)

STARTING = "starting"
READY = "ready"
WAITING = "waiting"
STUCK = "stuck"
TICKING = "ticking"
STANDBY = "standby"

SUFFIX = ".heartbeat"
# A heartbeat comes every 2 to 5 s; 30 s of silence is a fault, not a busy moment. As docker/healthcheck has it.
OLDEST_SECONDS = 30


class HeartbeatFile:
    """The file of one process; written in place, because only its time and its first word are read."""

    def __init__(self, directory: str | Path, name: str) -> None:
        self.path = Path(directory) / f"{name}{SUFFIX}"
        # What was written last; "" where it has to be written anew.
        self.word = ""

    @property
    def usable(self) -> bool:
        """Whether there is a directory to write to; a worker started by hand has none and needs none."""
        return os.access(self.path.parent, os.W_OK)

    def touch(self, word: str) -> None:
        """Say that the process is alive and is `word`."""
        try:
            if word == self.word:
                os.utime(self.path)
            else:
                self.path.write_text(word + "\n")
                self.word = word
        except OSError as error:
            self.word = ""
            logger.error("heartbeat: %s cannot be written (%s)", self.path, error.strerror)

    def read(self) -> tuple[str, float]:
        """The word and the time of the last heartbeat, in seconds since 1970; ("", 0.0) before the first one.

        The time first: a reader that is interrupted then takes a new word for an old one, never the word of the
        process before for the new one's.
        """
        try:
            touched = self.path.stat().st_mtime
            return self.path.read_text().strip(), touched
        except FileNotFoundError:
            return "", 0.0
