"""Beat's scheduler: each periodic task is sent once, however many beats run."""
