"""The shared service code: everything that a Stalk container runs."""
