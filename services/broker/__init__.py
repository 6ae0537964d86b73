"""The Redis that carries tasks: clients, key names, scripts, retries, and what is asked before the start."""
