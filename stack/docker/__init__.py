"""The runtime of containers: Compose on a Docker Engine."""
