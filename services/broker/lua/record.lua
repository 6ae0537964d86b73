-- What the scripts share: records in `unacked`, and the way of a message back to its list.
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

-- A whole double: Lua would shorten it to 14 digits, which is a tenth of a millisecond too few.
local function exact(number)
    return string.format('%.6f', number)
end

-- The message and the queue of a record of ours; nothing for a stock one.
local function parts(record)
    local message, queue = record:match('^%[(.*),"","([^"\\]*)"%]$')
    if message then
        return message, queue
    end
    -- A queue name with a quote or a backslash in it; they are written by their numbers.
    message, queue = record:match('^%[(.*),"",("[^"]*")%]$')
    if message then
        return message, cjson.decode('[' .. queue .. ']')[1]
    end
end

-- The list of a queue in which a message of this priority waits; `steps` are the lowest priorities of each list.
local function list_of(message, queue, steps)
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

-- The counts that stand first in a message that somebody has started, or has held when he died: the starts that did not
-- end in a requeue, and the requeues; and what follows them.
local function counted(message)
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
local function counts_of(message)
    local deliveries, requeues = counted(message)
    return deliveries or 1, requeues or 0
end

-- The same message as it was before anybody counted. A stock worker keeps the counts, wherever its own encoder puts
-- spaces.
local function without_counts(message)
    local _, _, rest = counted(message)
    return rest and '{' .. rest:match('^,?%s*(.*)$') or message
end

-- The same message with other counts.
local function with_counts(message, deliveries, requeues)
    local rest = without_counts(message):match('^%s*{(.*)$')
    if not rest then
        return message
    end
    local asked = requeues > 0 and string.format(',"requeue_count":%d', requeues) or ''
    local comma = rest:match('^%s*}') and '' or ','
    return string.format('{"delivery_count":%d', deliveries) .. asked .. comma .. rest
end

-- A message that waits for a token of a rate limit ends with it: ,"rate_limit_token":[task,interval,node,due,start]}
-- (services/delayed/rate_limits.py).
local MARK = '"rate_limit_token"'

-- What is before a token, the token as text, and what is behind it; nothing when there is none.
local function around_token(message)
    -- First, because a pattern takes long to find nothing in a large message.
    if message:find(MARK, 1, true) then
        return message:match('^(.*),%s*' .. MARK .. '%s*:%s*(%b[])%s*(}%s*)$')
    end
end

-- What a message waits for; nothing when there is no token.
local function token_of(message)
    local _, text = around_token(message)
    local readable, found = pcall(cjson.decode, text or '')
    if readable and type(found) == 'table' then
        return { task = found[1], node = found[3] }
    end
end

local function without_token(message)
    local before, _, behind = around_token(message)
    return before and before .. behind or message
end

local function with_token(message, token)
    local whole = without_token(message)
    local brace = whole:match('^.*()}%s*$')
    if not brace or whole:match('^%s*{%s*}') then
        return whole
    end
    return whole:sub(1, brace - 1) .. ',' .. MARK .. ':' .. token .. whole:sub(brace)
end

-- What gives back or renews takes no memory, and is refused nothing however full Redis is (see headroom.lua).
local function take_no_memory()
    redis.call('SREM', KEYS[4], '')
end

-- Take a record out of everything that says it is held. KEYS 1 to 4 are the same in every script.
local function forget(tag)
    redis.call('HDEL', KEYS[1], tag)
    redis.call('ZREM', KEYS[2], tag)
    redis.call('ZREM', KEYS[3], tag)
    redis.call('SREM', KEYS[4], tag)
end

-- Queues that expire (x-expires): their lists are keys with a time to live, which is gone with the last message that is
-- taken, while only who has declared such a queue knows how long it is.
--
-- expires:<list>  milliseconds that the list had left when something was taken from it; for a month

-- As long as a revocation is remembered: whatever waits longer for its time is put back without an end.
local A_MONTH = 30 * 24 * 3600 * 1000

-- A user who may not touch that key gets no error: what is under way is to be done whole.
local function remember_expiry(list)
    local left = redis.call('PTTL', list)
    if left > 0 then
        redis.pcall('SET', EXPIRES .. list, left, 'PX', A_MONTH)
    elseif left == -1 then
        -- Its queue expires no more: nobody would renew what is given back.
        redis.pcall('DEL', EXPIRES .. list)
    end
end

-- Put a message into a list; `push` says at which end.
local function put_back(push, list, message)
    -- First, as long as an error has done nothing yet.
    local left = redis.call('GET', EXPIRES .. list)
    write(push, list, message)
    if left and redis.call('PTTL', list) == -1 then
        redis.call('PEXPIRE', list, left)
    end
end

-- Back to the end of the list that is taken from next: it was there before what has come since.
local function requeue(message, queue, steps)
    put_back('RPUSH', list_of(message, queue, steps), message)
end
