"""Plugins that tests/conftest.py loads: Redis builds, the guard of the checkout, scheduling, times in the summary."""
