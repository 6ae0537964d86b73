"""The documents' commands and code, run as they are printed."""
