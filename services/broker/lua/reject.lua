-- Reject: this delivery becomes a dead letter.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
--      5 dead_letters  6 dead_letters_next  7 dead_letters_untold (see dead_letter.lua)
-- ARGV 1 tag  2 reason  3 detail  4 the beginning of a dead letter's key  5 told: 1 when its task says FAILURE
--      6 most: so many dead letters there may be of tasks that say FAILURE
-- Returns the id of the dead letter, 0 when somebody else has the message by now, or -1 when there are too many:
-- the task has failed and says so, and that is all that is left of it
local record = redis.call('HGET', KEYS[1], ARGV[1])
local id = 0
if record and ARGV[5] == '1' and redis.call('ZCARD', KEYS[5]) >= tonumber(ARGV[6]) then
    id = -1
elseif record then
    local message, queue = parts(record)
    local deliveries, requeues = counts_of(message)
    local keys = { letters = KEYS[5], next = KEYS[6], untold = KEYS[7], letter = ARGV[4] }
    id = write_dead_letter(message, queue, ARGV[2], ARGV[3], deliveries + requeues, ARGV[5] == '1', keys, now())
end
forget(ARGV[1])
return id
