"""What commands print: tables and sentences for people, JSON for programs; colour and folding only on a terminal."""

import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, TextIO

import orjson

from config.environment import shows_colour

RED, GREEN, YELLOW, BOLD, PLAIN = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[1m", "\x1b[0m"
GAP = "  "

# A text, or a text and its style.
Cell = str | tuple[str, str]


class BadInput(Exception):
    """The command cannot be run as it was typed: the sentence names the argument, what was found, and what to do."""


def print_table(rows: Iterable[Sequence[Cell]], header: Sequence[str] = ()) -> None:
    """Print rows in columns; on a terminal that is narrower, fold the widest columns."""
    titles = [[(title, BOLD) for title in header]] if header else []
    cells = titles + [[cell if isinstance(cell, tuple) else (cell, "") for cell in row] for row in rows]
    cells = [[(_escape(text), style) for text, style in row] for row in cells]
    widths = [max(len(text) for text, _ in column) for column in zip(*cells, strict=True)]
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns - len(GAP) * (len(widths) - 1)
        while (excess := sum(widths) - max(room, len(widths))) > 0:
            *_, second, first = sorted([0, *widths])
            widths[widths.index(first)] -= min(excess, max(1, first - second))
    for row in cells:
        folded = (_fold(text, width) for (text, _), width in zip(row, widths, strict=True))
        for parts in zip_longest(*folded, fillvalue=""):
            line = zip(parts, widths, row, strict=True)
            print(GAP.join(_apply_style(part.ljust(width), style) for part, width, (_, style) in line).rstrip())


def print_line(text: str, style: str = "") -> None:
    """Print a sentence, however long it is, on one line."""
    print(_apply_style(_escape(text), style))


def print_error(text: str) -> None:
    """Print on standard error what is wrong."""
    print(_apply_style("error:", RED, sys.stderr), _escape(text), file=sys.stderr)


def print_json(value: Any) -> None:
    """Print one JSON object on one line."""
    try:
        text = orjson.dumps(value, default=str)
    except TypeError:
        # orjson has no whole numbers beyond 64 bits; Python's own would print NaN for what JSON calls null.
        text = json.dumps(value, default=str).encode()
    sys.stdout.buffer.write(text + b"\n")


def _apply_style(text: str, style: str, stream: TextIO | None = None) -> str:
    return f"{style}{text}{PLAIN}" if style and shows_colour(stream or sys.stdout) else text


def _fold(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` characters, which end between two words where they can."""
    # Not textwrap, which takes minutes for a message of megabytes without a space.
    line = rf"\S.{{0,{max(width - 1, 0)}}}"
    return re.findall(rf"{line}(?=\s|$)|{line}", text)


def _escape(text: str) -> str:
    """`text` on one line, control characters escaped: names and errors come from whoever has sent a message."""
    return "".join(one if one.isprintable() else " " if one.isspace() else ascii(one)[1:-1] for one in text)
