"""What a node and Redis take, and give back."""
