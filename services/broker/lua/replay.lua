-- Replay: dead letters go back to their queues, as new arrivals that nobody has counted yet.
--
-- A message is pushed before its letter is removed, so that a Redis without memory refuses before anything was moved.
--
-- KEYS 1 dead_letters  2 dead_letters_untold (see dead_letter.lua)
-- ARGV 1 steps    the lowest priority of each list, JSON
--      2 letter   the beginning of a dead letter's key
--      3…         ids
-- Returns the ids that there were
local steps = cjson.decode(ARGV[1])
local there = {}
for position = 3, #ARGV do
    local id = ARGV[position]
    local message, queue = unpack(redis.call('HMGET', ARGV[2] .. id, 'message', 'queue'))
    if message then
        put_back('LPUSH', list_of(message, queue, steps), without_token(without_counts(message)))
        redis.call('DEL', ARGV[2] .. id)
        redis.call('ZREM', KEYS[1], id)
        redis.call('SREM', KEYS[2], id)
        there[#there + 1] = id
    end
end
return there
