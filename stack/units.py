"""A unit of the stack: a container, or a process where there is no Docker."""

from __future__ import annotations

from dataclasses import dataclass

# Of Python, beside or inside the units.
SHELL = ("-m", "celery", "--app", "services.app", "shell")


@dataclass(frozen=True)
class Unit:
    """One container or process."""

    name: str
    service: str
    state: str
    # healthy, starting, unhealthy, or "" where nothing tells.
    health: str
    detail: str
    # What the runtime knows it by.
    id: str = ""
    failed: bool = False

    @property
    def works(self) -> bool:
        """Whether it runs and, as far as anything tells, does its work."""
        return self.state == "running" and self.health in ("healthy", "")
