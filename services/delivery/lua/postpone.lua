-- Postpone: a delivery that is not due waits in Redis instead of in this process.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
--      5 scheduled           zset  field -> when it is due, Unix time
--      6 scheduled_messages  hash  field -> record
-- ARGV 1 tag  2 due, Unix time  3 field: the id of its task
-- Returns the field under which it waits, or "" when somebody else has the message by now
local record = redis.call('HGET', KEYS[1], ARGV[1])
local field = ''
if record then
    field = ARGV[3]
    if redis.call('HEXISTS', KEYS[6], field) == 1 then
        -- The same task twice, a retry beside a copy of it: the tag tells them apart.
        field = field .. '#' .. ARGV[1]
    end
    redis.call('HSET', KEYS[6], field, record)
    redis.call('ZADD', KEYS[5], ARGV[2], field)
end
forget(ARGV[1])
return field
