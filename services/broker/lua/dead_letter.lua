-- Shared by scripts: a message that no worker can run, or that has failed too often, becomes a dead letter.
--
-- KEYS 5 to 7 are the same in every script that does this:
-- dead_letters          zset  id -> the same number: a moment would not tell the order of those that one sweep makes
-- dead_letters_next     the last id that was given
-- dead_letters_untold   set of the ids whose task does not say FAILURE yet
--
-- dead_letter:<id>      hash  message (its bytes), queue, reason, detail, deliveries, parked_at; telling_since: when
--                             a process began to report the failure of its task
--
-- `prefix` is the beginning of a dead letter's key; `reported` whether its task says FAILURE already.
local function write_dead_letter(prefix, message, queue, reason, detail, deliveries, reported)
    -- First, so that a Redis without memory refuses before anything was moved.
    local id = write('INCR', KEYS[6])
    redis.call(
        'HSET', prefix .. id, 'message', message, 'queue', queue, 'reason', reason, 'detail', detail,
        'deliveries', deliveries, 'parked_at', format_number(now())
    )
    redis.call('ZADD', KEYS[5], id, id)
    if not reported then
        redis.call('SADD', KEYS[7], id)
    end
    return id
end
