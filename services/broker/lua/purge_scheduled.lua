-- Purge scheduled: delete the messages of a queue that wait for their time, a part of them in each call.
--
-- KEYS 1 scheduled  2 scheduled_messages (see schedule.lua)
-- ARGV 1 queue
--      2 cursor   of HSCAN: 0, then what the last call has returned
--      3 look     how many are looked at, more or less
-- Returns {cursor, how many were deleted, the tasks among them that waited for a token of their rate}
local deleted, rate_limited, seen = 0, {}, {}
local cursor, fields = unpack(redis.call('HSCAN', KEYS[2], ARGV[2], 'COUNT', ARGV[3]))
for position = 1, #fields, 2 do
    local message, queue = parse_record(fields[position + 1])
    if queue == ARGV[1] then
        local token = get_token(message)
        if token and not seen[token.task] then
            seen[token.task] = true
            rate_limited[#rate_limited + 1] = token.task
        end
        deleted = deleted + unschedule(fields[position], KEYS[1], KEYS[2])
    end
end
return { cursor, deleted, rate_limited }
