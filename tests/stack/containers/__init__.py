"""What is particular to containers: networks, limits, images, secrets, a Redis of your own."""
