"""`make dev`, in either runtime."""

import os
import signal
import subprocess

from tests.stack.deployment import MAKE_SECONDS, Deployment
from tests.support.waiting import wait_until


class Dev:
    """`make dev`, as it runs in a terminal."""

    def __init__(self, deployment: Deployment) -> None:
        self.log = deployment.directory / "dev.log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                deployment.command("dev"),
                cwd=deployment.directory,
                env=deployment.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def says(self, text: str, times: int = 1) -> None:
        """Return when its output has a text so many times."""
        wait_until(lambda: self.log.read_text().count(text) >= times, MAKE_SECONDS, repr(text), self.log.read_text)

    def interrupt(self) -> None:
        """Ctrl-C: the whole foreground gets it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
