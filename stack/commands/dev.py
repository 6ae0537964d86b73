"""make dev: run the stack from this checkout's source, and restart it on every change.

Source that cannot be imported is refused, and the old code goes on. Ctrl-C ends watching, not the stack.
"""

from collections.abc import Iterator
from pathlib import Path
from time import monotonic, strftime

from watchfiles import watch

import config
from config import ConfigError
from stack import terminal
from stack.checkout_lock import lock_checkout
from stack.commands import up
from stack.errors import CommandError
from stack.fingerprints import hash_each_file
from stack.paths import ROOT, SOURCE
from stack.readiness import wait_until_healthy
from stack.runtime import Runtime

SHOWN_FILES = 3
# Somebody who has just saved a file does not notice a second; to hash all files takes 5 ms.
UNHEARD_MILLISECONDS = 1_000


def dev() -> None:
    """Start the stack from the source, or raise what `up` raises; then restart it on changes until Ctrl-C."""
    watched = [ROOT / name for name in SOURCE]
    # Before anything is started: what changes meanwhile is a change too.
    hashes = hash_each_file(*watched)
    runtime = up.up(from_source=True)
    print(f"\nWatching {' and '.join(f'{name}/' for name in SOURCE)}; Ctrl-C ends watching, and the stack goes on.")
    try:
        for files in watch_changes(hashes, *watched):
            # Half a restart is no state to leave the stack in.
            with terminal.catch_interrupts() as caught:
                restart(runtime, [str(Path(file).relative_to(ROOT)) for file in files])
            if caught:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        print()
    print("Watching has ended; the stack goes on, and 'make up' takes up what you change later.")


def watch_changes(hashes: dict[str, str], *watched: Path) -> Iterator[list[str]]:
    """Yield the names of the files that have changed, each time that some have; first those that differ from `hashes`.

    A file that was saved with the same content has not changed, nor one with another mode or time.
    """
    # Without an event too: a change before the watch began causes none.
    for _ in watch(*watched, rust_timeout=UNHEARD_MILLISECONDS, yield_on_timeout=True):
        before, hashes = hashes, hash_each_file(*watched)
        if changed := before.items() ^ hashes.items():
            yield sorted({file for file, _ in changed})


def restart(runtime: Runtime, files: list[str]) -> None:
    """Restart what runs the source, or print why not."""
    started = monotonic()
    more = f" and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else ""
    print(f"{strftime('%H:%M:%S')} {', '.join(files[:SHOWN_FILES])}{more} …")
    try:
        up.require_importable(runtime.check_source(), "the old code goes on")
        with lock_checkout():
            runtime.restart(config.load())
        wait_until_healthy(runtime)
    except ConfigError as error:
        for problem in error.problems:
            terminal.print_error(problem)
    except CommandError as error:
        terminal.print_error(str(error))
    else:
        print(f"{strftime('%H:%M:%S')} the new code runs ({monotonic() - started:.1f} s)")
