-- Release: tasks that wait for a token that will not come, or not then, go back to their queues.
--
-- The last one first: what is put back last is taken next.
--
-- KEYS 1 scheduled           zset  field -> when it is due, Unix time
--      2 scheduled_messages  hash  field -> record
-- ARGV 1 steps     the lowest priority of each list, JSON
--      2 task      its name
--      3 interval  seconds from one token to the next, as they are now; "" where there is no limit any more
--      4 scope     shared when all nodes have one rate together now, else ""
--      5 gone      a node: only its tokens are taken back; "" for those of all
--      6 offset    so many are passed over
--      7 look      how many are looked at
-- Returns {how many were looked at, how many of them went back}
local steps, first, released = cjson.decode(ARGV[1]), tonumber(ARGV[6]), 0

local function comes(token)
    if token.task ~= ARGV[2] or (ARGV[5] ~= '' and token.node ~= ARGV[5]) then
        return true
    end
    return token.interval == ARGV[3] and (token.node == '') == (ARGV[4] == 'shared')
end

local fields = redis.call('ZREVRANGE', KEYS[1], first, first + tonumber(ARGV[7]) - 1)
for _, field in ipairs(fields) do
    local record = redis.call('HGET', KEYS[2], field)
    local message, queue
    if record then
        message, queue = parts(record)
    end
    local token = token_of(message or '')
    if token and not comes(token) then
        requeue(without_token(message), queue, steps)
        redis.call('HDEL', KEYS[2], field)
        redis.call('ZREM', KEYS[1], field)
        released = released + 1
    end
end
return { #fields, released }
