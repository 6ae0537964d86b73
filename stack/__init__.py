"""What `make` runs on the host: commands/ has its commands, docker/ and local/ the two runtimes behind runtime.py."""
