"""python -m config check | show | reference | example

Exit codes: 0 the configuration is good, 2 it has mistakes or the command is unknown.
"""

import sys

import click

from config import Settings, exit_on_mistakes, load
from config.reference import render_example, render_reference, render_settings


@click.group(help="Check, show and document Stalk's configuration.")
def main() -> None:
    pass


def load_settings() -> Settings:
    """The settings, with their warnings printed; on mistakes prints each and exits with 2."""
    with exit_on_mistakes():
        settings = load()
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return settings


@main.command(help="Check every setting; exit code 2 and a line for each mistake.")
def check() -> None:
    load_settings()
    print("The configuration is good.")


@main.command(help="Print every variable with its value in force, secrets masked.")
def show() -> None:
    print(render_settings(load_settings()), end="")


@main.command("reference", help="Print docs/configuration.md.")
def print_reference() -> None:
    print(render_reference(), end="")


@main.command("example", help="Print .env.example.")
def print_example() -> None:
    print(render_example(), end="")


if __name__ == "__main__":
    main(prog_name="python -m config")
