"""The process manager of a worker's container, and the watchdog that restarts a node that hangs."""
