"""Delivery: a task gets from its list to a worker, and is neither lost on the way nor run twice.

claim → lease → ack, or requeue, or a dead letter; docs/delivery.md is the contract. Each step is one Lua script, in
services/broker/lua/.
"""
