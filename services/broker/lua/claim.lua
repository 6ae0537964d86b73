-- Claim: take messages from their lists and record them as unacknowledged, in one step.
--
-- At every moment a message is either in its list or in `unacked` under a lease. Each is written to `unacked` before
-- it is taken, so that a Redis without memory refuses the first command, and nothing has happened. The
-- acknowledgements that come along are made in any case; but last, because a script that has written something is
-- refused nothing more. A claim leaves half of the headroom to the acknowledgements of what was claimed.
--
-- KEYS 1 unacked         hash  tag -> record
--      2 unacked_index   zset  tag -> end of the lease, Redis time; kombu's own clock for stock consumers
--      3 unacked_leases  zset  tag -> end of the lease; without the deliveries of stock consumers
--      4 unacked_started set   tags of tasks that have begun to run
--      5…                lists of the queues: all queues of the most urgent priority (0), then of the next
--      expires:<list>    string for how long a list may live (see record.lua)
-- ARGV 1 claim           the tags are claim:1, claim:2, …
--      2 credit          how many at most
--      3 lease           seconds
--      4 bytes           stop after the message with which so many have been taken
--      5 queues          how many there are
--      6…                for each queue the end of its records
--      …                 tags to acknowledge
-- Returns {refusal or "", queue number, message, queue number, message, …}
local claim, credit, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local bytes, queues = tonumber(ARGV[4]), tonumber(ARGV[5])

local reply = { '' }
local expiry = format_number(now() + lease)
local taken = 0
-- Lists that something was taken from.
local used_lists = {}

-- 1 when a message was taken, 0 when the list was empty, nothing when Redis has no memory for it.
local function take(list, queue)
    local message = redis.call('LINDEX', list, -1)
    if not message then
        return 0
    end
    local tag = claim .. ':' .. (taken + 1)
    local record = '[' .. message .. ARGV[5 + queue]
    local written = redis.pcall('HSET', KEYS[1], tag, record)
    if type(written) == 'table' and written.err and use_headroom(0.5) then
        written = redis.pcall('HSET', KEYS[1], tag, record)
    end
    if type(written) == 'table' and written.err then
        reply[1] = written.err
        return nil
    end
    redis.call('ZADD', KEYS[2], expiry, tag)
    redis.call('ZADD', KEYS[3], expiry, tag)
    if not used_lists[list] then
        used_lists[list] = true
        remember_expiry(list)
    end
    redis.call('RPOP', list)
    taken = taken + 1
    bytes = bytes - #message
    reply[#reply + 1] = queue
    reply[#reply + 1] = message
    return 1
end

-- Take messages until the credit is used up, all lists are empty, or Redis has no memory.
local function take_all()
    for first = 5, #KEYS, queues do
        repeat
            local found = 0
            for queue = 1, queues do
                if taken >= credit or bytes <= 0 then
                    return
                end
                local got = take(KEYS[first + queue - 1], queue)
                if not got then
                    return
                end
                found = found + got
            end
        until found == 0
    end
end

take_all()
for position = 6 + queues, #ARGV do
    remove_delivery(ARGV[position])
end
return reply
