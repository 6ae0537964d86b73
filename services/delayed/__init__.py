"""Tasks that wait in Redis: for their ETA, a retry, or a token of their rate limit."""
