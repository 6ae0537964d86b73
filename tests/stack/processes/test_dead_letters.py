"""make dead-letters, replay, purge-dead-letters and to-plain without Docker."""

import json
import os
import pty
import subprocess
from contextlib import suppress
from typing import Any

import pytest

from services.broker.keys import DEAD_LETTER, DEAD_LETTERS, DEAD_LETTERS_UNTOLD, SCHEDULED
from tests.stack.deployment import MAKE_SECONDS
from tests.stack.processes.deployment import Local

HOUR = 3600


@pytest.fixture
def letters(local: Local) -> list[int]:
    """The ids of the only two dead letters."""
    with local.redis() as client:
        if client.zcard(DEAD_LETTERS) != 2:
            client.delete(DEAD_LETTERS, DEAD_LETTERS_UNTOLD, *client.keys(f"{DEAD_LETTER}*"))
            for argument in (1, "[red]two[/]"):
                local.send("nobody.knows", argument)
    return sorted(map(int, wait_letters(local, 2)))


def wait_letters(local: Local, count: int) -> list[str]:
    """The ids of so many dead letters, once there are and their tasks were told; a purge keeps those before."""

    def ids() -> list[str]:
        with local.redis() as client:
            found: list[str] = client.zrange(DEAD_LETTERS, 0, -1)
            told = not client.scard(DEAD_LETTERS_UNTOLD)
        return found if told and len(found) == count else []

    return local.wait(ids, f"{count} dead letters, and their tasks told")


def test_dead_letters_are_a_line_each_or_one_json_object(local: Local, letters: list[int]) -> None:
    head, *lines = local.make("dead-letters").stdout.splitlines()

    assert head.split() == ["ID", "When", "Reason", "Task", "Task", "ID", "Queue", "Deliveries", "Detail"]
    assert [int(line.split()[0]) for line in lines] == letters
    assert [line.split()[2:4] for line in lines] == [["unknown-task", "nobody.knows"]] * 2
    assert "\x1b" not in head + "".join(lines)
    told = json.loads(local.make("dead-letters", JSON="1").stdout)

    assert [one["id"] for one in told["dead_letters"]] == letters
    assert told["more"] == 0


def test_one_dead_letter_shows_its_arguments_as_they_were_sent(local: Local, letters: list[int]) -> None:
    output = local.make("dead-letters", ID=str(letters[1])).stdout

    lines = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert lines["args"].strip() == '["[red]two[/]"]'
    assert lines["reason"].strip() == "unknown-task"
    assert lines["priority"].strip() == "0 (0 is the most urgent)"


def test_the_status_shows_them(local: Local, letters: list[int]) -> None:
    assert local.status()["dead_letters"] == 2
    assert "Dead letters: 2, see 'make dead-letters'" in local.make("status").stdout


def on_terminal(local: Local, target: str, typed: bytes = b"", **variables: str) -> bytes:
    """What a target of make shows on a terminal on which this is typed."""
    ours, theirs = pty.openpty()
    os.write(ours, typed)
    options: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    options |= {"env": local.environment(TERM="xterm", **variables), "timeout": MAKE_SECONDS}
    subprocess.run(local.command(target), cwd=local.directory, check=False, **options)
    os.close(theirs)
    shown = b""
    with suppress(OSError):
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    return shown


def test_the_reason_is_coloured_on_a_terminal(local: Local, letters: list[int]) -> None:
    assert b"\x1b[31m" in on_terminal(local, "dead-letters")
    assert b"\x1b" not in on_terminal(local, "dead-letters", NO_COLOR="1")


def test_a_purge_asks_on_a_terminal(local: Local, letters: list[int]) -> None:
    shown = on_terminal(local, "purge-dead-letters", b"no\n")

    assert b"This deletes all dead letters for ever. Type yes to go on: " in shown
    assert b"error:\x1b[0m nothing was deleted" in shown
    assert wait_letters(local, 2) == [str(number) for number in letters]


def test_who_stops_reading_gets_no_traceback(local: Local, letters: list[int]) -> None:
    for target in ("status", "dead-letters"):
        make = subprocess.Popen(
            local.command(target),
            cwd=local.directory,
            env=local.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert make.stdout
        make.stdout.close()
        assert make.stderr
        assert "Traceback" not in make.stderr.read()
        make.wait(MAKE_SECONDS)


def test_a_replay_puts_them_back_one_or_all(local: Local, letters: list[int]) -> None:
    assert local.make("replay", ID=str(letters[0])).stdout == "1 dead letter is back in the queues.\n"
    # Nobody knows that task yet.
    again = list(map(int, wait_letters(local, 2)))
    assert again[0] == letters[1]

    assert local.make("replay", ALL="1").stdout == "2 dead letters are back in the queues.\n"
    assert min(map(int, wait_letters(local, 2))) > again[1]


@pytest.mark.parametrize(
    ("target", "variables", "says"),
    [
        ("replay", {}, "say which dead letters: make replay ID=7, or ID=7,9, or ALL=1 for all"),
        ("replay", {"ID": "9998, 9999"}, "there are no dead letters 9998, 9999: see 'make dead-letters'"),
        ("dead-letters", {"ID": "-1"}, "ID: found '-1'; it must be the number of a dead letter, such as 7"),
        ("purge-dead-letters", {}, "this deletes all dead letters, and nobody can be asked: run 'make purge-dead-let"),
        (
            "to-plain",
            {},
            "would take it in again: stop Stalk's workers first, with 'make scale WORKERS=0' for instance",
        ),
    ],
)
def test_what_cannot_be_done_is_one_sentence(local: Local, target: str, variables: dict[str, str], says: str) -> None:
    done = local.make(target, False, None, **variables)

    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("make: "))
    assert line.startswith("error: ")
    assert says in line


def test_a_purge_says_how_many(local: Local, letters: list[int]) -> None:
    assert local.make("purge-dead-letters", YES="1").stdout == "2 dead letters are deleted.\n"
    assert local.make("dead-letters").stdout == "There are no dead letters.\n"


def test_without_workers_all_goes_back_to_plain_queues(local: Local) -> None:
    local.send("own_probe.rest", "later", 0, countdown=HOUR)
    with local.redis() as client:
        local.wait(lambda: client.zcard(SCHEDULED) == 1, "it waits for its time")
    assert local.status()["scheduled"] == 1
    local.make("scale", WORKERS="0")

    output = local.make("to-plain").stdout

    assert output.startswith("Back in the queues: 1 tasks that waited for their time, 0 of workers that are gone.")
    with local.redis() as client:
        assert (client.zcard(SCHEDULED), client.llen("celery")) == (0, 1)
        assert "No node answers; what waits: 1 in celery." in local.make("status").stdout
        client.delete("celery")
    local.make("scale", WORKERS="1")
