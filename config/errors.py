"""What a mistake in the configuration raises, and how a command ends that meets one."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

EXIT_CODE = 2


class ConfigError(Exception):
    """The configuration cannot be used. `problems` has a sentence for each mistake."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def print_error(problem: str) -> None:
    print(f"error: {problem}", file=sys.stderr)


@contextmanager
def exit_on_mistakes(report: Callable[[str], None] = print_error) -> Iterator[None]:
    """Report each problem of a ConfigError that is raised inside, and exit with 2: no traceback."""
    try:
        yield
    except ConfigError as error:
        for problem in error.problems:
            report(problem)
        sys.exit(EXIT_CODE)
