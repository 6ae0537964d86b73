-- Requeue a stock consumer's message that was not acknowledged within the visibility timeout.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
-- ARGV 1 tag  2 the record as it was read  3… list, message, list, message, …: where it goes
-- Returns 1, or 0 when the record has changed since
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
    return 0
end
for position = 3, #ARGV, 2 do
    push_message('RPUSH', ARGV[position], ARGV[position + 1])
end
remove_delivery(ARGV[1])
return 1
