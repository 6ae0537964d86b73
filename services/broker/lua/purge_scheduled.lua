-- Purge scheduled: delete what waits for its time in a queue, a part of it in each call.
--
-- KEYS 1 scheduled           zset  field -> when it is due, Unix time
--      2 scheduled_messages  hash  field -> record
-- ARGV 1 queue
--      2 cursor   of HSCAN: 0, then what the last call has returned
--      3 look     how many are looked at, more or less
-- Returns {cursor, how many were deleted, the tasks among them that waited for a token of their rate}
local deleted, rated, seen = 0, {}, {}
local cursor, fields = unpack(redis.call('HSCAN', KEYS[2], ARGV[2], 'COUNT', ARGV[3]))
for position = 1, #fields, 2 do
    local message, queue = parts(fields[position + 1])
    if queue == ARGV[1] then
        local token = token_of(message)
        if token and not seen[token.task] then
            seen[token.task] = true
            rated[#rated + 1] = token.task
        end
        redis.call('ZREM', KEYS[1], fields[position])
        deleted = deleted + redis.call('HDEL', KEYS[2], fields[position])
    end
end
return { cursor, deleted, rated }
