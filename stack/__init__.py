"""The host's side of the stack: what `make` runs. Nothing here runs inside a container."""
