"""What each service does in the running stack."""
