-- Ack: remove the deliveries that have these tags.
--
-- Each delivery has a tag of its own: the acknowledgement of an old one finds nothing of a newer one.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
-- ARGV tags
-- Returns how many were there
local removed = redis.call('HDEL', KEYS[1], unpack(ARGV))
redis.call('ZREM', KEYS[2], unpack(ARGV))
redis.call('ZREM', KEYS[3], unpack(ARGV))
redis.call('SREM', KEYS[4], unpack(ARGV))
return removed
