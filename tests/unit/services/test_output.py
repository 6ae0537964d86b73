"""services.commands.output: tables as people see them, on a terminal and elsewhere."""

import io

import pytest

from services.commands.output import RED, Cell, print_error, print_table
from tests.unit.stack.test_terminal import Screen, replace_stream

ROWS: list[tuple[Cell, ...]] = [("1", ("crashed", RED), "a worker died while it ran"), ("12", "rejected", "")]
HEADER = ("ID", "Reason", "Detail")


def print_rows(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **variables: str) -> str:
    replace_stream(monkeypatch, "stdout", stream, **variables)
    print_table(ROWS, HEADER)
    return stream.getvalue()


def test_a_row_is_one_plain_line_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert print_rows(monkeypatch, io.StringIO(), TERM="xterm", COLUMNS="20").splitlines() == [
        "ID  Reason    Detail",
        "1   crashed   a worker died while it ran",
        "12  rejected",
    ]


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_shows_rows_folded_to_its_width(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    assert print_rows(monkeypatch, Screen(), COLUMNS="26", **variables).splitlines() == [
        "ID  Reason    Detail",
        "1   crashed   a worker",
        "              died while",
        "              it ran",
        "12  rejected",
    ]


def test_a_terminal_shows_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    head, first, _ = print_rows(monkeypatch, Screen(), TERM="xterm", COLUMNS="80").splitlines()

    assert head.startswith("\x1b[1mID\x1b[0m  \x1b[1mReason  \x1b[0m  ")
    assert first.startswith("1   \x1b[31mcrashed \x1b[0m  a worker")


def test_control_characters_that_somebody_has_sent_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([("\x1b[2Jtask\ud800", "x")])
    print_error("found '\x1b'")

    assert capsys.readouterr() == ("\\x1b[2Jtask\\ud800  x\n", "error: found '\\x1b'\n")
