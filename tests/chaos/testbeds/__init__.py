"""Where faults strike: processes of this machine, or the shipped containers."""
