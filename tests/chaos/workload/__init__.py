"""What runs in nodes and producers under test: tasks that record events, the producer, the stock application."""
