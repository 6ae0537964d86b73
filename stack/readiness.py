"""Wait until every unit works, and print what is waited for and for how long."""

from time import monotonic, sleep

from stack.errors import CommandError
from stack.runtime import Runtime

# Redis loading 1 GB takes 20 s, a first import of heavy tasks a minute: three minutes are a fault.
LIMIT_SECONDS = 180.0
LOOK_SECONDS = 0.3
# Somebody who waits for longer than that wonders whether anything goes on.
REPEAT_SECONDS = 15.0


def wait_until_healthy(runtime: Runtime) -> None:
    """Return when every unit works.

    Raises CommandError, with the last log lines of the unit that does not work, after LIMIT_SECONDS, or as soon as a
    unit ends again and again; also when there is no unit any more.
    """
    started, printed, printed_at = monotonic(), "", 0.0
    while units := runtime.list_units():
        waiting = [unit for unit in units if not unit.works]
        if not waiting:
            return
        names = ", ".join(unit.name for unit in waiting)
        if names != printed or monotonic() - printed_at > REPEAT_SECONDS:
            print(f"Waiting for {names} ({monotonic() - started:.0f} s) …")
            printed, printed_at = names, monotonic()
        failed = [unit for unit in waiting if unit.failed]
        if failed or monotonic() - started > LIMIT_SECONDS:
            unit = (failed or waiting)[0]
            raise CommandError(
                f"{unit.name} is {unit.health or unit.state} and does not work; its last lines are\n"
                f"{runtime.read_last_lines(unit)}\nand 'make logs' shows more"
            )
        sleep(LOOK_SECONDS)
    raise CommandError("nothing runs any more: the stack was stopped meanwhile; start it again with 'make up'")
