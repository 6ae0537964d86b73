"""python -m config check | show | reference | example

Exit codes: 0 the configuration is good, 2 it is not or the command is unknown.
"""

from __future__ import annotations

import sys

import click

from config import ConfigError, Settings, load
from config.reference import example, in_force, reference


@click.group(help="Check, show and document Stalk's configuration.")
def main() -> None:
    pass


def loaded() -> Settings:
    """The settings; on mistakes prints each and exits with 2."""
    try:
        settings = load()
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return settings


@main.command(help="Check every setting; exit code 2 and a line for each mistake.")
def check() -> None:
    loaded()
    print("The configuration is good.")


@main.command(help="Print what is in force, secrets masked.")
def show() -> None:
    print(in_force(loaded()), end="")


@main.command("reference", help="Print docs/configuration.md.")
def print_reference() -> None:
    print(reference(), end="")


@main.command("example", help="Print .env.example.")
def print_example() -> None:
    print(example(), end="")


if __name__ == "__main__":
    main(prog_name="python -m config")
