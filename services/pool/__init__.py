"""What the pools of a worker run: children that check leases, batches, time limits, failures."""
