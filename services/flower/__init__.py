"""Flower as it is served here."""
