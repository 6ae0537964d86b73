"""The result backend: a message is acknowledged after its task's result is stored."""
