"""The same stack as processes of this host, with Docker switched off: these tests run on every machine."""
