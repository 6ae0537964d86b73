"""The runtime of processes: Supervisor, Redis and the programs of the stack on this host."""
