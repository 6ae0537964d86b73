"""Dead letters: messages that go no further, kept with the reason until somebody replays or purges them.

What becomes one is decided in services/worker/dead_letter_rules.py, and by the scripts that count deaths and requeues.
"""

import sys


class DeadLetter(Exception):
    """A task will not run, or not again: its message is kept as dead letter `id`.

    Its arguments are reason, detail and id. A client without Stalk gets a class of the same name.
    """

    @property
    def reason(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        reason, detail, number = self.args
        return f"{reason}: {detail} (dead letter {number})"


# A result names the module of its exception, and those stored by the version before name this one.
sys.modules["services.delivery.telling"] = sys.modules[__name__]
