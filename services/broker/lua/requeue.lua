-- Requeue: put back what this process has claimed and will not run. It counts as no delivery.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
-- ARGV 1 steps    the lowest priority of each list, JSON
--      2…         tags, the one to be taken next last
-- Returns how many were there
take_no_memory()
local steps = cjson.decode(ARGV[1])
local there = 0
for position = 2, #ARGV do
    local record = redis.call('HGET', KEYS[1], ARGV[position])
    if record then
        local message, queue = parts(record)
        requeue(message, queue, steps)
        there = there + 1
    end
    forget(ARGV[position])
end
return there
