-- Shared by scripts: records in `unacked`, the counts and the token in a message, and its way back to its list.
--
-- A record is kombu's own form, a JSON list [message, exchange, routing key], so that a stock consumer can read
-- it. Ours are written as text around the bytes of the message, which are never encoded anew (cjson would damage
-- floats and empty tables): "[" .. message .. ',"","' .. queue .. '"]'. No exchange and the queue as routing key
-- is how kombu addresses a queue directly, whatever has become of its bindings.

local SEPARATOR = '\6\22'

local function now()
    local time = redis.call('TIME')
    return tonumber(time[1]) + tonumber(time[2]) / 1000000
end

-- With microseconds: Lua would shorten it to 14 digits, which is too coarse by a tenth of a millisecond.
local function format_number(number)
    return string.format('%.6f', number)
end

-- The message and the queue of a record of ours; nothing for a stock one.
local function parse_record(record)
    local message, queue = record:match('^%[(.*),"","([^"\\]*)"%]$')
    if message then
        return message, queue
    end
    -- A queue's name with a quote or a backslash in it, which are escaped by their numbers.
    message, queue = record:match('^%[(.*),"",("[^"]*")%]$')
    if message then
        return message, cjson.decode('[' .. queue .. ']')[1]
    end
end

-- The same record with another message; what follows the message names the queue.
local function replace_message(record, old, new)
    return '[' .. new .. record:sub(#old + 2)
end

-- The list of a queue in which a message of this priority waits; `steps` are the lowest priorities of each list.
local function get_list(message, queue, steps)
    local readable, fields = pcall(cjson.decode, message)
    local properties = readable and type(fields) == 'table' and fields.properties
    local priority = type(properties) == 'table' and tonumber(properties.priority) or 0
    local step = 0
    for _, lowest in ipairs(steps) do
        if priority >= lowest then
            step = lowest
        end
    end
    if step == 0 then
        return queue
    end
    return queue .. SEPARATOR .. string.format('%d', step)
end

-- The counts that stand first in a message that was started before, or whose worker has died: the starts that did not
-- end in a requeue, and the requeues; and what follows them.
local function parse_counts(message)
    local deliveries, rest = message:match('^%s*{%s*"delivery_count"%s*:%s*(%d+)%s*(.*)$')
    if not deliveries or not rest:match('^[,}]') then
        return
    end
    local requeues, last = rest:match('^,%s*"requeue_count"%s*:%s*(%d+)%s*(.*)$')
    if requeues and last:match('^[,}]') then
        return tonumber(deliveries), tonumber(requeues), last
    end
    return tonumber(deliveries), 0, rest
end

-- Both counts: one start and no requeue, unless the message says otherwise.
local function get_counts(message)
    local deliveries, requeues = parse_counts(message)
    return deliveries or 1, requeues or 0
end

-- The message as its producer wrote it. A stock worker keeps the counts, and its encoder may put spaces between them.
local function strip_counts(message)
    local _, _, rest = parse_counts(message)
    return rest and '{' .. rest:match('^,?%s*(.*)$') or message
end

-- The same message with other counts.
local function set_counts(message, deliveries, requeues)
    local rest = strip_counts(message):match('^%s*{(.*)$')
    if not rest then
        return message
    end
    local asked = requeues > 0 and string.format(',"requeue_count":%d', requeues) or ''
    local comma = rest:match('^%s*}') and '' or ','
    return string.format('{"delivery_count":%d', deliveries) .. asked .. comma .. rest
end

-- A message that waits for a token of a rate limit ends with it: ,"rate_limit_token":[task,interval,node,due,start]}
-- (services/delayed/rate_limits.py).
local TOKEN_FIELD = '"rate_limit_token"'

-- The text before a token, the token as text, and the text after it; nothing when there is none.
local function split_at_token(message)
    -- A plain search comes first, because a pattern takes long to find nothing in a large message.
    if message:find(TOKEN_FIELD, 1, true) then
        return message:match('^(.*),%s*' .. TOKEN_FIELD .. '%s*:%s*(%b[])%s*(}%s*)$')
    end
end

-- The task and the node of the token that a message waits for; nothing when there is none.
local function get_token(message)
    local _, text = split_at_token(message)
    local readable, found = pcall(cjson.decode, text or '')
    if readable and type(found) == 'table' then
        return { task = found[1], node = found[3] }
    end
end

local function strip_token(message)
    local before, _, after = split_at_token(message)
    return before and before .. after or message
end

local function set_token(message, token)
    local whole = strip_token(message)
    local brace = whole:match('^.*()}%s*$')
    if not brace or whole:match('^%s*{%s*}') then
        return whole
    end
    return whole:sub(1, brace - 1) .. ',' .. TOKEN_FIELD .. ':' .. token .. whole:sub(brace)
end

-- Write something that takes no memory: from then on Redis refuses this script nothing, however full it is (see
-- headroom.lua). For scripts that requeue or renew, and take no memory.
local function skip_memory_check()
    redis.call('SREM', KEYS[4], '')
end

-- Remove a delivery from all keys that have it. KEYS 1 to 4 are the same in every script.
local function remove_delivery(tag)
    redis.call('HDEL', KEYS[1], tag)
    redis.call('ZREM', KEYS[2], tag)
    redis.call('ZREM', KEYS[3], tag)
    redis.call('SREM', KEYS[4], tag)
end

-- Queues that expire (x-expires): their lists have a time to live, which Redis forgets with the last message that is
-- taken; only who has declared such a queue knows how long it is.
--
-- expires:<list>  milliseconds that the list had left when something was taken from it; for a month

-- As long as a revocation is kept: what waits longer for its time is put back into a list that does not expire.
local A_MONTH = 30 * 24 * 3600 * 1000

-- A user who may not touch that key gets no error: the script that has begun to move messages has to be finished.
local function remember_expiry(list)
    local left = redis.call('PTTL', list)
    if left > 0 then
        redis.pcall('SET', EXPIRES .. list, left, 'PX', A_MONTH)
    elseif left == -1 then
        -- Its queue expires no more: nobody would renew the list of what is put back.
        redis.pcall('DEL', EXPIRES .. list)
    end
end

-- Put a message into a list; `push` says at which end.
local function push_message(push, list, message)
    -- First, as long as an error has done nothing yet.
    local left = redis.call('GET', EXPIRES .. list)
    write(push, list, message)
    if left and redis.call('PTTL', list) == -1 then
        redis.call('PEXPIRE', list, left)
    end
end

-- Put it at the end of its list that is taken from next: it was there before all that has come since.
local function requeue(message, queue, steps)
    push_message('RPUSH', get_list(message, queue, steps), message)
end
