"""Delivery: how a task gets from its list to a worker and is neither lost on the way nor run twice.

claim → lease → ack, or restore, or a dead letter; docs/delivery.md is the contract, lua/ is where each step happens.
"""
