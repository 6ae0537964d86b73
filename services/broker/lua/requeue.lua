-- Requeue: put back what this process has claimed and will not run. It counts as no delivery.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
-- ARGV 1 steps    the lowest priority of each list, JSON
--      2…         tags, the one to be taken next last
-- Returns how many were put back
skip_memory_check()
local steps = cjson.decode(ARGV[1])
local requeued = 0
for position = 2, #ARGV do
    local record = redis.call('HGET', KEYS[1], ARGV[position])
    if record then
        local message, queue = parse_record(record)
        requeue(message, queue, steps)
        requeued = requeued + 1
    end
    remove_delivery(ARGV[position])
end
return requeued
