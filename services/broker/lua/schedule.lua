-- Shared by scripts: a message that waits in Redis until it is due.
--
-- scheduled           zset  field -> when it is due, Unix time
-- scheduled_messages  hash  field -> record
--
-- Its field is the first one of `fields` that is free: the id of its task, and others for further messages of the same
-- task, such as a retry beside a copy; or `tag`, which no other message has.
local function schedule(record, due, fields, tag, scheduled, scheduled_messages)
    local position = 1
    while fields[position] and redis.call('HEXISTS', scheduled_messages, fields[position]) == 1 do
        position = position + 1
    end
    local field = fields[position] or tag
    write('HSET', scheduled_messages, field, record)
    redis.call('ZADD', scheduled, due, field)
    return field
end

-- Remove it from both. Returns 1, or 0 when it was gone already.
local function unschedule(field, scheduled, scheduled_messages)
    redis.call('ZREM', scheduled, field)
    return redis.call('HDEL', scheduled_messages, field)
end
