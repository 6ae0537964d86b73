"""What `make` does with the stack, in both runtimes where they do alike."""
