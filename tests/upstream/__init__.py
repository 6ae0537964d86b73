"""Celery's own integration tests, and those of kombu's transport for Redis, with Stalk in the place of what they test.

celery.toml and kombu.toml list each test that does not run or does not pass, with the reason. stalk.py and verdicts.py
are what the pytest that runs them loads.
"""
