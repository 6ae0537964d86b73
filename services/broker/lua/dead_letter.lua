-- What the scripts share: a message that goes no further becomes a dead letter.
--
-- dead_letters          zset  id -> the same number: a moment would not tell the order of those that one sweep parks
-- dead_letter:<id>      hash  message (its bytes), queue, reason, detail, deliveries, parked_at; telling_since: when
--                             somebody took on to tell its task
-- dead_letters_next     the last id that was given
-- dead_letters_untold   set of the ids whose task does not say FAILURE yet
local function write_dead_letter(message, queue, reason, detail, deliveries, told, keys, time)
    -- First, so that a Redis without memory refuses before anything was moved.
    local id = write('INCR', keys.next)
    redis.call(
        'HSET', keys.letter .. id, 'message', message, 'queue', queue, 'reason', reason, 'detail', detail,
        'deliveries', deliveries, 'parked_at', exact(time)
    )
    redis.call('ZADD', keys.letters, id, id)
    if not told then
        redis.call('SADD', keys.untold, id)
    end
    return id
end
