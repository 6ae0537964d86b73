"""Redis for tests: servers, the builds they are made of, a proxy before one, and kombu clients."""
