"""Tasks that will not run, or not again: kept, listed, replayed, and reported to whoever waits."""
