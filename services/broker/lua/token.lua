-- Token: when a task with a rate limit may start.
--
-- Each start takes one token, and tokens come one interval after the other. Who has waited for his token starts when
-- he comes back, on whichever node. Who comes back long after it starts if that node has started nobody for an
-- interval, and else takes another token: many who come late together, after an outage, would all start at once.
--
-- KEYS 1 rate_limit:<task>  hash  node, or "" for all nodes together -> "next last interval": when its next token comes
--                                 and when it has started the task last, Unix time; and its seconds from one to the
--                                 next, or "mixed" where nodes have different ones
-- ARGV 1 node      whose rate it is; "" for that of all nodes together
--      2 interval  seconds from one token to the next
--      3 earliest  Unix time before which this task does not start; 0 for none
--      4 expires   Unix time after which it does not start any more; 0 for none
--      5 waited    Unix time of the token for which it has waited; 0 for none
-- Returns {"" for now, or the Unix time until which it waits; 1, or 0 when it will have expired and gets no token}
local interval, earliest, expires, waited = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
-- Seconds by which anybody may be late: as much as the way from Redis to a busy node takes.
local LATE = 1
local time = now()

local function read(value)
    local coming, last, seconds = value:match('^(%S+) (%S+) (%S+)$')
    return tonumber(coming or 0), tonumber(last or 0), seconds
end

local coming, last, before = read(redis.call('HGET', KEYS[1], ARGV[1]) or '')
local stands, due = ARGV[2], nil
if before ~= stands and coming > time then
    -- Nodes with other rates take tokens here too: one that learns of it brings back what waits for any (release.lua).
    stands = 'mixed'
elseif before ~= stands then
    -- A new rate, for which nobody waits any more.
    coming, last = 0, 0
end
if waited > 0 and (time < waited + math.max(interval, LATE) or time >= last + interval) then
    due = time
else
    due = math.max(time, earliest, coming, last + interval)
    if expires > 0 and due >= expires then
        -- Whoever takes it then finds it expired, also if his clock is a little slow.
        return { exact(math.max(time, expires) + LATE), 0 }
    end
    coming = due + interval
end
local starts = due <= math.max(time, earliest)
if starts then
    last = due
end
local new = write('HSET', KEYS[1], ARGV[1], exact(coming) .. ' ' .. exact(last) .. ' ' .. stands) == 1
local ends = math.max(coming, last + interval)
if redis.call('PTTL', KEYS[1]) < (ends - time) * 1000 then
    redis.call('PEXPIREAT', KEYS[1], math.ceil(ends * 1000))
end
if new then
    -- Others may be gone by now: nodes have new names after a deployment.
    local nodes = redis.call('HGETALL', KEYS[1])
    for position = 1, #nodes, 2 do
        local theirs, started, seconds = read(nodes[position + 1])
        if math.max(theirs, started + (tonumber(seconds) or 0)) < time then
            redis.call('HDEL', KEYS[1], nodes[position])
        end
    end
end
return { starts and '' or exact(due), 1 }
