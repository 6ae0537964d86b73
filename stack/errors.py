"""How a command of the host fails: one sentence, never a traceback."""


class CommandError(Exception):
    """A command cannot go on; the message says what was found and what to do."""
