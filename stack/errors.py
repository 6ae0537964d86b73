"""How a command on the host fails: one sentence, never a traceback."""


class Failure(Exception):
    """A command cannot go on; its message says what was found and what to do."""
