"""The scheduler, which runs once however many are started."""
