"""The stack in real containers and as processes: clones of this checkout, brought up by `make up` once a session."""
