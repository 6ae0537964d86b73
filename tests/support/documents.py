"""Commands and code in the documents, so that the tests run what people read."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def block(document: str, name: str) -> str:
    """The fenced block that follows `<!-- test: name -->` in a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.findall(rf"<!-- test: {re.escape(name)} -->\n```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"{document} has {len(found)} blocks named {name}"
    return str(found[0])


def commands(document: str, name: str) -> list[str]:
    """The commands of a console block: its lines that start with `$ `."""
    return [line.removeprefix("$ ") for line in block(document, name).splitlines() if line.startswith("$ ")]


def names(document: str) -> list[str]:
    """The names of all blocks that a document marks."""
    return re.findall(r"<!-- test: (\S+) -->", (ROOT / document).read_text(encoding="utf-8"))
