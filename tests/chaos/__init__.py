"""Faults as named operations against real Redis and real workers: `python -m tests.chaos`, and a short form for pytest.

A run starts nodes on a Redis of its own, keeps tasks coming, lets one fault strike, waits until nothing moves any
more, and counts from events that the tasks leave outside Redis: sent, executed, lost, started twice and why.
"""
