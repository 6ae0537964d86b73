"""`schedule`: every entry of beat's schedule, what it sends, how often, and when next."""

from typing import Any

from celery import Celery

from services.commands.output import print_table


def read_schedule(app: Celery) -> dict[str, Any]:
    """Every entry; see entries.list_entries."""
    # Only here, because RedBeat is needed by no other command.
    from services.beat import entries

    return entries.list_entries(app)


def print_schedule(found: dict[str, Any]) -> None:
    """Print an entry a line."""
    rows = []
    for entry in found["schedule"]:
        on = entry["problem"] or ("yes" if entry["enabled"] else "no")
        cells = [entry[name] for name in ("name", "source", "task", "schedule")]
        rows.append([cell or "-" for cell in (*cells, on, entry["last_run"], entry["next_due"])])
    print_table(rows, header=("Entry", "From", "Task", "Schedule", "On", "Last run", "Next due"))
