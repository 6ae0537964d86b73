-- Requeue tasks that wait for a token of their rate , so that they take new ones.
--
-- The last one first: what is put back last is taken next. What nodes take again meanwhile may go back once more.
--
-- KEYS 1 scheduled           zset  field -> when it is due, Unix time
--      2 scheduled_messages  hash  field -> record
--      3 rate_limit:<task>   hash  see token.lua
-- ARGV 1 steps   the lowest priority of each list, JSON
--      2 task    its name
--      3 gone    a node: only its tokens are taken back; "" for those of all
--      4 offset  so many are passed over
--      5 look    how many are looked at
-- Returns {how many were looked at, how many of them went back}
local steps, first, released = cjson.decode(ARGV[1]), tonumber(ARGV[4]), 0

local function is_meant(node)
    return ARGV[3] == '' or node == ARGV[3]
end

local nodes = redis.call('HGETALL', KEYS[3])
for position = 1, #nodes, 2 do
    local rest = nodes[position + 1]:match('^%S+( %S+ %S+)$')
    if rest and is_meant(nodes[position]) then
        -- In each call: what has been taken again since the last one goes back with the last, and so does its token.
        write('HSET', KEYS[3], nodes[position], '0' .. rest)
    end
end
local fields = redis.call('ZREVRANGE', KEYS[1], first, first + tonumber(ARGV[5]) - 1)
for _, field in ipairs(fields) do
    local record = redis.call('HGET', KEYS[2], field)
    local message, queue
    if record then
        message, queue = parts(record)
    end
    local token = token_of(message or '')
    if token and token.task == ARGV[2] and is_meant(token.node) then
        requeue(without_token(message), queue, steps)
        redis.call('HDEL', KEYS[2], field)
        redis.call('ZREM', KEYS[1], field)
        released = released + 1
    end
end
return { #fields, released }
