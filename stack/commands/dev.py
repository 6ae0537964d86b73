"""make dev: the stack runs this checkout's source, and takes up every change of it.

What does not compile or cannot be imported is refused, and the old code goes on. Ctrl-C ends watching, not the stack.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, strftime
from typing import TYPE_CHECKING

from watchfiles import watch

import config
from config import ConfigError
from stack import readiness, terminal
from stack.checkout_lock import own_turn
from stack.commands import source_check, up
from stack.errors import Failure
from stack.fingerprints import contents
from stack.paths import ROOT, SOURCE

if TYPE_CHECKING:
    from stack.runtime import Runtime

SHOWN_FILES = 3
# Somebody who has just saved a file does not notice a second; a look takes 5 ms.
UNHEARD_MILLISECONDS = 1_000


def dev() -> None:
    """Start the stack with the source, then take up changes until Ctrl-C.

    Raises Failure or ConfigError when it does not start.
    """
    watched = [ROOT / name for name in SOURCE]
    # As it was before anything was started: what changes meanwhile is a change too.
    content = contents(*watched)
    runtime = up.up(from_source=True)
    print(f"\nWatching {' and '.join(f'{name}/' for name in SOURCE)}; Ctrl-C ends watching, and the stack goes on.")
    try:
        for files in changes(content, *watched):
            with until_done():
                take_up(runtime, [str(Path(file).relative_to(ROOT)) for file in files])
    except KeyboardInterrupt:
        print()
    print("Watching has ended; the stack goes on, and 'make up' takes up what you change later.")


def changes(content: dict[str, str], *watched: Path) -> Iterator[list[str]]:
    """Yield the files that have changed, each time that some are no longer what they were; `content` comes first.

    Not those that were saved as they were, or of which only the mode or the time has changed.
    """
    # It looks although it has heard nothing, too: of what changes before it listens it never hears.
    for _ in watch(*watched, rust_timeout=UNHEARD_MILLISECONDS, yield_on_timeout=True):
        before, content = content, contents(*watched)
        if changed := before.items() ^ content.items():
            yield sorted({file for file, _ in changed})


def take_up(runtime: Runtime, files: list[str]) -> None:
    """Restart what runs the source, or say why not."""
    started = monotonic()
    more = f" and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else ""
    print(f"{strftime('%H:%M:%S')} {', '.join(files[:SHOWN_FILES])}{more} …")
    try:
        source_check.refuse(runtime.check_source(), "the old code goes on")
        with own_turn():
            runtime.restart(config.load())
        readiness.until_healthy(runtime)
    except ConfigError as error:
        for problem in error.problems:
            terminal.error(problem)
    except Failure as failure:
        terminal.error(str(failure))
    else:
        print(f"{strftime('%H:%M:%S')} the new code runs ({monotonic() - started:.1f} s)")


@contextmanager
def until_done() -> Iterator[None]:
    """Hold back Ctrl-C: half a restart is no state to leave the stack in."""
    asked = []
    before = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt
