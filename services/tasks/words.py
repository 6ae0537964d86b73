"""Words: a workflow that counts many documents at the same time and merges what comes back."""

import re
import unicodedata
from collections import Counter

from celery import Signature, Task, chord, group, shared_task
from celery.utils.log import get_task_logger

logger = get_task_logger(__name__)

# Letters, with apostrophes inside ("don't") but not around ('quoted').
WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


@shared_task(bind=True)
def count_words(self: Task, documents: list[str]) -> dict[str, int]:
    """Count the words of all documents, each in a task of its own; the most frequent come first.

    The workflow takes this task's place and its id, so `count_words.delay(…).get()` waits for the merged
    counts. The documents travel in the messages: send the address of a large text rather than the text.

    Idempotent: a second run starts a second workflow with the same id and the same outcome. If a count fails,
    so does this task, with ChordError.
    """
    counts: dict[str, int] = self.replace(word_count(documents))
    return counts


def word_count(documents: list[str]) -> Signature:
    """Return the workflow as a signature: a group of counts, then, when all are in, their merge.

    It can be sent as it is, or built into a larger canvas.
    """
    counts = group(count_document.s(document) for document in documents)
    return chord(counts, merge_counts.s())


@shared_task
def count_document(document: str) -> dict[str, int]:
    """Return how often each word occurs, whatever its case and the encoding of its accents. Idempotent."""
    # In this order: folding the case can take letters and accents apart again.
    text = unicodedata.normalize("NFC", document.casefold())
    return dict(Counter(WORD.findall(text)))


@shared_task
def merge_counts(counts: list[dict[str, int]]) -> dict[str, int]:
    """Return the sum of several counts, the most frequent word first, equals by the alphabet. Idempotent."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    logger.info("%d words, %d of them distinct, in %d documents", total.total(), len(total), len(counts))
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
