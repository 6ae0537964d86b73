-- Replay: put dead letters back into their queues, as new messages without counts.
--
-- A message is pushed before its letter is removed, so that a Redis without memory refuses before anything was moved.
--
-- KEYS 1 dead_letters  2 dead_letters_untold (see dead_letter.lua)
-- ARGV 1 steps    the lowest priority of each list, JSON
--      2 letter   the beginning of a dead letter's key
--      3…         ids
-- Returns the ids of those that were replayed
local steps = cjson.decode(ARGV[1])
local replayed = {}
for position = 3, #ARGV do
    local id = ARGV[position]
    local message, queue = unpack(redis.call('HMGET', ARGV[2] .. id, 'message', 'queue'))
    if message then
        push_message('LPUSH', get_list(message, queue, steps), strip_token(strip_counts(message)))
        redis.call('DEL', ARGV[2] .. id)
        redis.call('ZREM', KEYS[1], id)
        redis.call('SREM', KEYS[2], id)
        replayed[#replayed + 1] = id
    end
end
return replayed
