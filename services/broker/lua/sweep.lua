-- Sweep: restore what belonged to processes that are gone, and put back what is due.
--
-- A lease that ran out proves death only while the living can renew theirs. Every caller leaves the time of its
-- call; when the last one is long past, Redis was away or all were cut off, and nobody's leases are taken before
-- the living have had a whole lease to renew them.
--
-- Tasks that ran together when their worker died are suspects together: one of them may have killed the others, as a
-- segmentation fault in a pool of threads does. They go back at once, together, as long as they have starts enough.
-- For its last two starts each waits for its turn, in an order that chance decides, so that the one that kills does
-- it alone and is counted alone.
--
-- KEYS 1 unacked  2 unacked_index  3 unacked_leases  4 unacked_started (see claim.lua)
--      5 dead_letters  6 dead_letters_next  7 dead_letters_untold (see dead_letter.lua)
--      8 sweeps              hash  last: time of the last sweep; rest: no leases are taken before; turn: when the
--                                  next suspect may start
--      9 scheduled  10 scheduled_messages (see schedule.lua)
-- ARGV 1 steps        the lowest priority of each list, JSON
--      2 most         deliveries that a message gets
--      3 letter       the beginning of a dead letter's key
--      4 lease        seconds, the caller's
--      5 visibility   seconds after which a stock consumer's message is given to somebody else
--      6 limit        how many of each kind in one call
--      7 separator    between the id of a task and the number of a copy of it, in a field
--      8 copies       fields for a task
-- Returns {now, next lease that ends or "", next due or "", restored, promoted, {tags of stock messages that are
--          overdue}, {ids of dead letters whose task does not say FAILURE yet}, {id parked now, …}}
local steps, most = cjson.decode(ARGV[1]), tonumber(ARGV[2])
local lease, visibility, limit = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local time = now()
local restored, promoted, parked, suspects = 0, 0, {}, {}
-- Seconds between the turns of suspects: a worker that was killed is back by then, and most tasks have ended.
local APART = 10
-- Seconds that a suspect waits at most. So many of them have died of something else, and go back in any order.
local LONGEST = 600

local seen = redis.call('HMGET', KEYS[8], 'last', 'rest')
local last, rest = tonumber(seen[1] or 0), tonumber(seen[2] or 0)
if last > time + 1 then
    -- Redis' clock was ahead and has been put back: what was written meanwhile lies in the future.
    rest = time + lease
elseif time - last > lease / 2 then
    rest = math.max(rest, time + lease)
end
write('HSET', KEYS[8], 'last', exact(time), 'rest', exact(rest))

local function take_back(tag)
    local record = redis.call('HGET', KEYS[1], tag)
    if record then
        local message, queue = parts(record)
        local count, requeues = counts_of(message)
        if redis.call('SISMEMBER', KEYS[4], tag) == 0 then
            -- That there is a count says that somebody had it, and it says that nobody has started it.
            requeue(with_counts(message, count, requeues), queue, steps)
        elseif count >= most then
            local keys = { letters = KEYS[5], next = KEYS[6], untold = KEYS[7], letter = ARGV[3] }
            local detail = 'its worker died or was cut off while it ran'
            parked[#parked + 1] = write_dead_letter(message, queue, 'crashed', detail, count + requeues, false, keys, time)
        elseif count + 1 < most - 1 then
            requeue(with_counts(message, count + 1, requeues), queue, steps)
        else
            local again = with_counts(message, count + 1, requeues)
            -- What follows the message in its record names the queue.
            local ending = record:sub(#message + 2)
            suspects[#suspects + 1] = { tag = tag, message = again, queue = queue, ending = ending }
        end
        restored = restored + 1
    end
    forget(tag)
end

-- The first of them, the first one last: what is put back last is taken next.
local function until_now(key)
    local members = redis.call('ZRANGEBYSCORE', key, '-inf', exact(time), 'LIMIT', 0, limit)
    local position = #members + 1
    return function()
        position = position - 1
        return members[position]
    end
end

-- The names under which a task waits, as services/broker/keys.py gives them.
local function fields_of(message)
    local readable, found = pcall(cjson.decode, message)
    local headers = readable and type(found) == 'table' and found.headers
    local id = type(headers) == 'table' and headers.id
    local fields = {}
    if type(id) == 'string' then
        fields[1] = id
        for copy = 2, tonumber(ARGV[8]) do
            fields[copy] = id .. ARGV[7] .. copy
        end
    end
    return fields
end

local function take_turns()
    if #suspects == 0 then
        return
    end
    -- Redis 6 begins each script with the same random numbers, Redis 7 each of its starts.
    math.randomseed(time * 1000000 % 2147483647)
    local first, last = time, time + LONGEST
    local turn = math.min(math.max(first, tonumber(redis.call('HGET', KEYS[8], 'turn') or 0)), last)
    for left = #suspects, 1, -1 do
        local one = table.remove(suspects, math.random(left))
        if turn == first then
            requeue(one.message, one.queue, steps)
        else
            local due = turn < last and turn or first + math.random() * LONGEST
            local record = '[' .. one.message .. one.ending
            schedule(record, exact(due), fields_of(one.message), one.tag, KEYS[9], KEYS[10])
        end
        turn = math.min(turn + APART, last)
    end
    redis.call('HSET', KEYS[8], 'turn', exact(turn))
end

local stock = {}
if time >= rest then
    for tag in until_now(KEYS[3]) do
        take_back(tag)
    end
    take_turns()
    local overdue = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', exact(time - visibility), 'LIMIT', 0, limit)
    for _, tag in ipairs(overdue) do
        if not redis.call('ZSCORE', KEYS[3], tag) then
            stock[#stock + 1] = tag
        end
    end
end

for field in until_now(KEYS[9]) do
    local record = redis.call('HGET', KEYS[10], field)
    if record then
        local message, queue = parts(record)
        requeue(message, queue, steps)
        promoted = promoted + 1
    end
    redis.call('HDEL', KEYS[10], field)
    redis.call('ZREM', KEYS[9], field)
end

-- The mark of a start travels over a connection of its own (services/delivery/start_marks.py), and may arrive after its
-- acknowledgement.
for _, tag in ipairs(redis.call('SRANDMEMBER', KEYS[4], limit)) do
    if redis.call('HEXISTS', KEYS[1], tag) == 0 then
        redis.call('SREM', KEYS[4], tag)
    end
end

local function first_score(key)
    return redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2] or ''
end

local untold = redis.call('SRANDMEMBER', KEYS[7], limit)
local ends = first_score(KEYS[3])
if time < rest then
    ends = exact(rest)
end
return { exact(time), ends, first_score(KEYS[9]), restored, promoted, stock, untold, parked }
