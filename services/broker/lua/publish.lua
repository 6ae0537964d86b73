-- Publish: enqueue a message once, however often its producer has to try.
--
-- A thread repeats a publish before it goes on to the next one, so only its last message has to be known.
--
-- KEYS 1 list
--      2 published:<producer>  string: the tag of the last message that this thread has enqueued; for a message of a
--                              chord's body its own name (services/results/chord_deduplication.py) in place of the
--                              thread's, and 1
-- ARGV 1 message  2 tag  3 seconds for which the tag is kept
-- Returns 1, or 0 when it was enqueued before
if redis.call('GET', KEYS[2]) == ARGV[2] then
    return 0
end
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[3])
return 1
