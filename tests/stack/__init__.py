"""The shipped stack in real containers: a clone of this checkout, brought up by `make up` once a session."""
