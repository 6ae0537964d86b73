-- What the scripts share: a message that waits in Redis until it is due.
--
-- scheduled           zset  field -> when it is due, Unix time
-- scheduled_messages  hash  field -> record
--
-- Its field is the first that is free of `fields`: the id of its task, and others for the same task once more, a retry
-- beside a copy of it; or `tag`, which nobody else has.
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
