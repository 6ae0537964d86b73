-- Requeue tasks that wait for a token of their rate, so that they take new ones.
--
-- The last one first: what is put back last is taken next. What a node takes and postpones again meanwhile may be
-- requeued once more.
--
-- KEYS 1 scheduled           zset  field -> when it is due, Unix time
--      2 scheduled_messages  hash  field -> record
--      3 rate_limit:<task>   hash  see token.lua
-- ARGV 1 steps   the lowest priority of each list, JSON
--      2 task    its name
--      3 node    whose tokens are taken back; "" for those of all
--      4 offset  so many are passed over
--      5 look    how many are looked at
-- Returns {how many were looked at, how many of them were requeued}
local steps, first, requeued = cjson.decode(ARGV[1]), tonumber(ARGV[4]), 0

local function matches(node)
    return ARGV[3] == '' or node == ARGV[3]
end

local nodes = redis.call('HGETALL', KEYS[3])
for position = 1, #nodes, 2 do
    local rest = nodes[position + 1]:match('^%S+( %S+ %S+)$')
    if rest and matches(nodes[position]) then
        -- In each call: what has taken a token since the last call is requeued by a later one, and gives it back.
        write('HSET', KEYS[3], nodes[position], '0' .. rest)
    end
end
local fields = redis.call('ZREVRANGE', KEYS[1], first, first + tonumber(ARGV[5]) - 1)
for _, field in ipairs(fields) do
    local message, queue = parse_record(redis.call('HGET', KEYS[2], field) or '')
    local token = message and get_token(message)
    if token and token.task == ARGV[2] and matches(token.node) then
        requeue(strip_token(message), queue, steps)
        unschedule(field, KEYS[1], KEYS[2])
        requeued = requeued + 1
    end
end
return { #fields, requeued }
