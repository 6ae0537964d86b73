"""The commands of make, a module each; stack/__main__.py is their command line."""
