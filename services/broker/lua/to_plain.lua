-- To plain: bring back to their lists what only Stalk would bring back, for workers that are not Stalk's.
--
-- What waits for its time goes to the far end of its list, the next one first: a stock worker keeps such tasks in
-- its memory, and takes what is due before them.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
--      5 scheduled           zset  field -> when it is due, Unix time
--      6 scheduled_messages  hash  field -> record
-- ARGV 1 steps    the lowest priority of each list, JSON
--      2 limit    how many of each kind in one call
-- Returns {how many waited for their time, how many belonged to the dead, how many leases have not run out}
local steps, limit = cjson.decode(ARGV[1]), tonumber(ARGV[2])
local time = exact(now())
local scheduled, restored = 0, 0
take_no_memory()

for _, field in ipairs(redis.call('ZRANGE', KEYS[5], 0, limit - 1)) do
    local record = redis.call('HGET', KEYS[6], field)
    if record then
        local message, queue = parts(record)
        put_back('LPUSH', list_of(message, queue, steps), without_token(message))
        scheduled = scheduled + 1
    end
    redis.call('HDEL', KEYS[6], field)
    redis.call('ZREM', KEYS[5], field)
end

-- The first one last: what is put back last is taken next.
local ended = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', time, 'LIMIT', 0, limit)
for position = #ended, 1, -1 do
    local tag = ended[position]
    local record = redis.call('HGET', KEYS[1], tag)
    if record then
        local message, queue = parts(record)
        if redis.call('SISMEMBER', KEYS[4], tag) == 1 then
            local deliveries, requeues = counts_of(message)
            message = with_counts(message, deliveries + 1, requeues)
        end
        requeue(message, queue, steps)
        restored = restored + 1
    end
    forget(tag)
end
return { scheduled, restored, redis.call('ZCOUNT', KEYS[3], '(' .. time, '+inf') }
