"""What a delivery costs, beside kombu's own transport."""
