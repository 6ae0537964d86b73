"""Flower behind a login: its server, its users, the pages that differ, events, workers, health."""
