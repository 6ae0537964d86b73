-- Renew: give the deliveries that this process has a whole lease from now on.
--
-- Only those in `unacked` are renewed: one that was acknowledged or requeued does not come back.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
-- ARGV 1 lease    seconds
--      2 started  how many of the tags, the first ones, belong to tasks that run
--      3…         tags
-- Returns the tags that this process has lost
skip_memory_check()
local expiry = format_number(now() + tonumber(ARGV[1]))
local started = tonumber(ARGV[2])
local lost = {}
for position = 3, #ARGV do
    local tag = ARGV[position]
    if redis.call('HEXISTS', KEYS[1], tag) == 0 then
        remove_delivery(tag)
        lost[#lost + 1] = tag
    else
        redis.call('ZADD', KEYS[2], expiry, tag)
        redis.call('ZADD', KEYS[3], expiry, tag)
        if position < 3 + started then
            -- The mark that is sent when a task starts may have been lost with its connection.
            redis.call('SADD', KEYS[4], tag)
        end
    end
end
return lost
