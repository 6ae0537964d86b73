-- Requeue later: the task of this delivery asks to be run later. It waits twice as long each time; when it has asked too
-- often, it becomes a dead letter.
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
    forget(tag)
    return { 0, '0' }
end
local message, queue = parts(record)
local deliveries, requeues = counts_of(message)
local id, seconds = 0, 0
if requeues >= tonumber(ARGV[1]) then
    local keys = { letters = KEYS[5], next = KEYS[6], untold = KEYS[7], letter = ARGV[2] }
    local detail = 'its task has asked ' .. requeues .. ' times to be run later'
    id = write_dead_letter(message, queue, 'requeued', detail, deliveries + requeues, false, keys, now())
else
    seconds = math.min(tonumber(ARGV[4]) * 2 ^ math.min(requeues, 30), tonumber(ARGV[5]))
    -- What follows the message in its record names the queue.
    local again = '[' .. with_counts(message, deliveries, requeues + 1) .. record:sub(#message + 2)
    schedule(again, exact(now() + seconds), { unpack(ARGV, 6) }, tag, KEYS[8], KEYS[9])
end
forget(tag)
return { id, exact(seconds) }
