-- Requeue later: the task of this delivery asks to be run later. It waits twice as long each time; after too many
-- requeues it becomes a dead letter.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
--      5 dead_letters  6 dead_letters_next  7 dead_letters_untold (see dead_letter.lua)
--      8 scheduled  9 scheduled_messages (see schedule.lua)
-- ARGV 1 most     requeues that a message gets
--      2 letter   the beginning of a dead letter's key
--      3 tag
--      4 first    seconds for which it waits the first time
--      5 longest  seconds for which it waits at most
--      6…         fields for its task
-- Returns {the id of the dead letter or 0, seconds for which it waits}
local tag = ARGV[3]
local record = redis.call('HGET', KEYS[1], tag)
if not record then
    remove_delivery(tag)
    return { 0, '0' }
end
local message, queue = parse_record(record)
local deliveries, requeues = get_counts(message)
local id, seconds = 0, 0
if requeues >= tonumber(ARGV[1]) then
    local detail = 'its task has asked ' .. requeues .. ' times to be run later'
    id = write_dead_letter(ARGV[2], message, queue, 'requeued', detail, deliveries + requeues)
else
    seconds = math.min(tonumber(ARGV[4]) * 2 ^ math.min(requeues, 30), tonumber(ARGV[5]))
    local again = replace_message(record, message, set_counts(message, deliveries, requeues + 1))
    schedule(again, format_number(now() + seconds), { unpack(ARGV, 6) }, tag, KEYS[8], KEYS[9])
end
remove_delivery(tag)
return { id, format_number(seconds) }
