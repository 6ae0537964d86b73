-- Token: when a task with a rate limit may start.
--
-- Each start takes one token, and tokens come one interval after the other. A task that has waited for its token starts
-- when it comes back, on whichever node. One that comes back long after its token starts if that node has started none
-- for an interval, and else takes another token: after an outage many come back late, and would all start at once.
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
-- Seconds by which a task may come late to its token: the way from Redis to a busy node takes as long.
local MAX_LATE_SECONDS = 1
local time = now()

local function parse(value)
    local coming, last, seconds = value:match('^(%S+) (%S+) (%S+)$')
    return tonumber(coming or 0), tonumber(last or 0), seconds
end

local coming, last, before = parse(redis.call('HGET', KEYS[1], ARGV[1]) or '')
local new_interval, due = ARGV[2], nil
if before ~= new_interval and coming > time then
    -- Nodes with another interval take tokens here too: one that learns of it requeues what waits for any
    -- (requeue_rate_limited.lua).
    new_interval = 'mixed'
elseif before ~= new_interval then
    -- A new rate, for which nothing waits any more.
    coming, last = 0, 0
end
if waited > 0 and (time < waited + math.max(interval, MAX_LATE_SECONDS) or time >= last + interval) then
    due = time
else
    due = math.max(time, earliest, coming, last + interval)
    if expires > 0 and due >= expires then
        -- The node that takes it then finds it expired, also if its clock is a little slow.
        return { format_number(math.max(time, expires) + MAX_LATE_SECONDS), 0 }
    end
    coming = due + interval
end
local starts = due <= math.max(time, earliest)
if starts then
    last = due
end
local value = format_number(coming) .. ' ' .. format_number(last) .. ' ' .. new_interval
local is_new = write('HSET', KEYS[1], ARGV[1], value) == 1
local ends = math.max(coming, last + interval)
if redis.call('PTTL', KEYS[1]) < (ends - time) * 1000 then
    redis.call('PEXPIREAT', KEYS[1], math.ceil(ends * 1000))
end
if is_new then
    -- Other nodes may be gone by now: nodes have new names after a deployment.
    local nodes = redis.call('HGETALL', KEYS[1])
    for position = 1, #nodes, 2 do
        local next_token, started, seconds = parse(nodes[position + 1])
        if math.max(next_token, started + (tonumber(seconds) or 0)) < time then
            redis.call('HDEL', KEYS[1], nodes[position])
        end
    end
end
return { starts and '' or format_number(due), 1 }
