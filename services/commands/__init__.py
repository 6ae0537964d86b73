"""`python -m services …`: what people and `make` ask of a running stack."""
