"""Supervisor, the process manager of nodes: its watchdog, its commands, and the heartbeat files that it reads."""
