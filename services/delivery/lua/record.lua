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

-- How often a message has been started, as the count that stands first in it says, and what follows the count.
local function counted(message)
    local count, rest = message:match('^%s*{%s*"delivery_count"%s*:%s*(%d+)%s*(.*)$')
    if count and rest:match('^[,}]') then
        return tonumber(count), rest
    end
end

-- How often a message has been started: once, unless it says otherwise.
local function count_of(message)
    return counted(message) or 1
end

-- The same message as it was before anybody counted. A stock worker keeps the count, wherever its own encoder puts
-- spaces.
local function without_count(message)
    local _, rest = counted(message)
    return rest and '{' .. rest:match('^,?%s*(.*)$') or message
end

-- The same message with another count.
local function with_count(message, count)
    local rest = without_count(message):match('^%s*{(.*)$')
    if not rest then
        return message
    end
    local comma = rest:match('^%s*}') and '' or ','
    return '{"delivery_count":' .. string.format('%d', count) .. comma .. rest
end

-- What gives back or renews takes no memory, and is refused nothing however full Redis is (see reserve.lua).
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

-- Back to the end of the list that is taken from next: it was there before what has come since.
local function requeue(message, queue, steps)
    write('RPUSH', list_of(message, queue, steps), message)
end
