-- Postpone: a delivery that is not due waits in Redis, and not in this process.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
--      5 scheduled  6 scheduled_messages (see schedule.lua)
-- ARGV 1 tag  2 due, Unix time  3 the token that it waits for (see record.lua), or ""  4… fields for its task
-- Returns the field under which it waits, or "" when another process has the message by now
local record = redis.call('HGET', KEYS[1], ARGV[1])
local field = ''
if record then
    local message = ARGV[3] ~= '' and parse_record(record)
    if message then
        record = replace_message(record, message, set_token(message, ARGV[3]))
    end
    field = schedule(record, ARGV[2], { unpack(ARGV, 4) }, ARGV[1], KEYS[5], KEYS[6])
end
remove_delivery(ARGV[1])
return field
