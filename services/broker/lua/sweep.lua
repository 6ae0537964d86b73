-- Sweep: requeue messages of dead workers, and put messages that are due into their queues.
--
-- A lease that ran out proves a death only while living workers can renew theirs. Every caller writes down the time of
-- its call; when the last one is long past, Redis was away or all workers were cut off, and no leases are taken before
-- the living have had a whole lease to renew them.
--
-- Tasks that ran together when their worker died are suspects together: one of them may have killed the others, as a
-- segmentation fault in a pool of threads does. They go back at once, together, as long as they have starts enough.
-- For its last two starts each waits for its turn, in random order, so that the one that kills does it alone and is
-- counted alone.
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
--      5 visibility   seconds after which a stock consumer's message is requeued
--      6 limit        how many of each kind in one call
--      7 separator    between the id of a task and the number of a copy of it, in a field
--      8 copies       fields for a task
-- Returns {now, next lease that ends or "", next due or "", requeued, promoted, {tags of stock messages that are
--          overdue}, {ids of dead letters whose task does not say FAILURE yet}, {ids of new dead letters}}
local steps, most = cjson.decode(ARGV[1]), tonumber(ARGV[2])
local lease, visibility, limit = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local time = now()
local requeued, promoted, letters, suspects = 0, 0, {}, {}
-- A worker that was killed is back by then, and most tasks have ended.
local SECONDS_BETWEEN_TURNS = 10
-- Longest wait of a suspect. So many of them have died of something else, and go back in any order.
local MAX_TURN_SECONDS = 600

local before = redis.call('HMGET', KEYS[8], 'last', 'rest')
local last, rest = tonumber(before[1] or 0), tonumber(before[2] or 0)
if last > time + 1 then
    -- Redis' clock was ahead and has been put back: what was written meanwhile lies in the future.
    rest = time + lease
elseif time - last > lease / 2 then
    rest = math.max(rest, time + lease)
end
write('HSET', KEYS[8], 'last', format_number(time), 'rest', format_number(rest))

local function requeue_expired(tag)
    local record = redis.call('HGET', KEYS[1], tag)
    if record then
        local message, queue = parse_record(record)
        local count, requeues = get_counts(message)
        if redis.call('SISMEMBER', KEYS[4], tag) == 0 then
            -- The same count, written into the message: it was claimed, and has not started.
            requeue(set_counts(message, count, requeues), queue, steps)
        elseif count >= most then
            local detail = 'its worker died or was cut off while it ran'
            letters[#letters + 1] = write_dead_letter(ARGV[3], message, queue, 'crashed', detail, count + requeues)
        elseif count + 1 < most - 1 then
            requeue(set_counts(message, count + 1, requeues), queue, steps)
        else
            local again = set_counts(message, count + 1, requeues)
            record = replace_message(record, message, again)
            suspects[#suspects + 1] = { tag = tag, message = again, queue = queue, record = record }
        end
        requeued = requeued + 1
    end
    remove_delivery(tag)
end

-- Iterate over the members that are due, the first one last: what is put back last is taken next.
local function each_due(key)
    local members = redis.call('ZRANGEBYSCORE', key, '-inf', format_number(time), 'LIMIT', 0, limit)
    local position = #members + 1
    return function()
        position = position - 1
        return members[position]
    end
end

-- The fields under which a task waits, as services/broker/keys.py names them.
local function get_fields(message)
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

local function schedule_turns()
    if #suspects == 0 then
        return
    end
    -- Redis 6 begins each script with the same random numbers, Redis 7 each of its starts.
    math.randomseed(time * 1000000 % 2147483647)
    local first, last = time, time + MAX_TURN_SECONDS
    local turn = math.min(math.max(first, tonumber(redis.call('HGET', KEYS[8], 'turn') or 0)), last)
    for left = #suspects, 1, -1 do
        local one = table.remove(suspects, math.random(left))
        if turn == first then
            requeue(one.message, one.queue, steps)
        else
            local due = turn < last and turn or first + math.random() * MAX_TURN_SECONDS
            schedule(one.record, format_number(due), get_fields(one.message), one.tag, KEYS[9], KEYS[10])
        end
        turn = math.min(turn + SECONDS_BETWEEN_TURNS, last)
    end
    redis.call('HSET', KEYS[8], 'turn', format_number(turn))
end

local stock = {}
if time >= rest then
    for tag in each_due(KEYS[3]) do
        requeue_expired(tag)
    end
    schedule_turns()
    local overdue = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', format_number(time - visibility), 'LIMIT', 0, limit)
    for _, tag in ipairs(overdue) do
        if not redis.call('ZSCORE', KEYS[3], tag) then
            stock[#stock + 1] = tag
        end
    end
end

for field in each_due(KEYS[9]) do
    local record = redis.call('HGET', KEYS[10], field)
    if record then
        local message, queue = parse_record(record)
        requeue(message, queue, steps)
        promoted = promoted + 1
    end
    unschedule(field, KEYS[9], KEYS[10])
end

-- The mark of a start travels over a connection of its own (services/delivery/leases.py), and may arrive after its
-- acknowledgement.
for _, tag in ipairs(redis.call('SRANDMEMBER', KEYS[4], limit)) do
    if redis.call('HEXISTS', KEYS[1], tag) == 0 then
        redis.call('SREM', KEYS[4], tag)
    end
end

local function get_first_score(key)
    return redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2] or ''
end

local unreported = redis.call('SRANDMEMBER', KEYS[7], limit)
local ends = get_first_score(KEYS[3])
if time < rest then
    ends = format_number(rest)
end
return { format_number(time), ends, get_first_score(KEYS[9]), requeued, promoted, stock, unreported, letters }
