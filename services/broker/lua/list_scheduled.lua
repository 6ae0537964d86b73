-- List scheduled: the messages of these queues that wait for their time, the next one first.
--
-- KEYS 1 scheduled  2 scheduled_messages (see schedule.lua)
-- ARGV 1 most     how many
--      2 look     how many are looked at
--      3 bytes    stop after the message with which there are so many
--      4…         queues
-- Returns {due, queue, message, due, queue, message, …}
local most, bytes = tonumber(ARGV[1]), tonumber(ARGV[3])
local wanted = {}
for position = 4, #ARGV do
    wanted[ARGV[position]] = true
end
local found = {}
local fields = redis.call('ZRANGE', KEYS[1], 0, tonumber(ARGV[2]) - 1, 'WITHSCORES')
for position = 1, #fields, 2 do
    local message, queue = parse_record(redis.call('HGET', KEYS[2], fields[position]) or '')
    if queue and wanted[queue] then
        for _, value in ipairs({ fields[position + 1], queue, message }) do
            found[#found + 1] = value
        end
        bytes = bytes - #message
        if #found == 3 * most or bytes <= 0 then
            break
        end
    end
end
return found
