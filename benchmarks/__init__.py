"""What Stalk costs and how fast it is, measured on real processes against a real Redis."""
