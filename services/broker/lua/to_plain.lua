-- To plain: put back into their lists what only Stalk would put back, for workers that are not Stalk's.
--
-- What waits for its time goes to the far end of its list, the next one first: a stock worker keeps such tasks in its
-- memory, and takes what is due before them.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
--      5 scheduled  6 scheduled_messages (see schedule.lua)
-- ARGV 1 steps    the lowest priority of each list, JSON
--      2 limit    how many of each kind in one call
-- Returns {how many waited for their time, how many belonged to dead workers, how many leases have not run out}
local steps, limit = cjson.decode(ARGV[1]), tonumber(ARGV[2])
local time = format_number(now())
local scheduled, requeued = 0, 0
skip_memory_check()

for _, field in ipairs(redis.call('ZRANGE', KEYS[5], 0, limit - 1)) do
    local record = redis.call('HGET', KEYS[6], field)
    if record then
        local message, queue = parse_record(record)
        push_message('LPUSH', get_list(message, queue, steps), strip_token(message))
        scheduled = scheduled + 1
    end
    unschedule(field, KEYS[5], KEYS[6])
end

-- The first one last: what is put back last is taken next.
local ended = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', time, 'LIMIT', 0, limit)
for position = #ended, 1, -1 do
    local tag = ended[position]
    local record = redis.call('HGET', KEYS[1], tag)
    if record then
        local message, queue = parse_record(record)
        if redis.call('SISMEMBER', KEYS[4], tag) == 1 then
            local deliveries, requeues = get_counts(message)
            message = set_counts(message, deliveries + 1, requeues)
        end
        requeue(message, queue, steps)
        requeued = requeued + 1
    end
    remove_delivery(tag)
end
return { scheduled, requeued, redis.call('ZCOUNT', KEYS[3], '(' .. time, '+inf') }
