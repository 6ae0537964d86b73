-- Crash: the process that ran this delivery has died. The message goes back to its list with a higher count; after too
-- many such starts it becomes a dead letter.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
--      5 dead_letters  6 dead_letters_next  7 dead_letters_untold (see dead_letter.lua)
-- ARGV 1 steps    the lowest priority of each list, JSON
--      2 most     deliveries that a message gets
--      3 letter   the beginning of a dead letter's key
--      4 tag
--      5 detail   how the process died
-- Returns the id of the dead letter, or 0
local record = redis.call('HGET', KEYS[1], ARGV[4])
if not record then
    remove_delivery(ARGV[4])
    return 0
end
local message, queue = parse_record(record)
local count, requeues = get_counts(message)
local id = 0
if count >= tonumber(ARGV[2]) then
    id = write_dead_letter(ARGV[3], message, queue, 'crashed', ARGV[5], count + requeues)
else
    requeue(set_counts(message, count + 1, requeues), queue, cjson.decode(ARGV[1]))
end
remove_delivery(ARGV[4])
return id
