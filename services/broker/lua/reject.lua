-- Reject: this delivery becomes a dead letter.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
--      5 dead_letters  6 dead_letters_next  7 dead_letters_untold (see dead_letter.lua)
-- ARGV 1 tag  2 reason  3 detail  4 the beginning of a dead letter's key  5 reported: 1 when its task says FAILURE
--      6 most: so many dead letters there may be of tasks that say FAILURE
-- Returns the id of the dead letter, 0 when another process has the message by now, or -1 when there are too many: the
-- message is dropped, because its task says FAILURE
local record = redis.call('HGET', KEYS[1], ARGV[1])
local id, reported = 0, ARGV[5] == '1'
if record and reported and redis.call('ZCARD', KEYS[5]) >= tonumber(ARGV[6]) then
    id = -1
elseif record then
    local message, queue = parse_record(record)
    local deliveries, requeues = get_counts(message)
    id = write_dead_letter(ARGV[4], message, queue, ARGV[2], ARGV[3], deliveries + requeues, reported)
end
remove_delivery(ARGV[1])
return id
