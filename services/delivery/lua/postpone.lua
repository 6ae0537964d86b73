-- Postpone: a delivery that is not due waits in Redis instead of in this process.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
--      5 scheduled           zset  field -> when it is due, Unix time
--      6 scheduled_messages  hash  field -> record
-- ARGV 1 tag  2 due, Unix time  3… fields, of which the first that is free is taken: the id of its task, and others
--      for the same task once more, a retry beside a copy of it
-- Returns the field under which it waits, or "" when somebody else has the message by now
local record = redis.call('HGET', KEYS[1], ARGV[1])
local field = ''
if record then
    local position = 3
    while ARGV[position] and redis.call('HEXISTS', KEYS[6], ARGV[position]) == 1 do
        position = position + 1
    end
    field = ARGV[position] or ARGV[1]
    redis.call('HSET', KEYS[6], field, record)
    redis.call('ZADD', KEYS[5], ARGV[2], field)
end
forget(ARGV[1])
return field
