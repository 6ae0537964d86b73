-- Take unreported: take on dead letters whose tasks do not say FAILURE yet, to report that.
--
-- One process at a time reports a failure; when it has died over it, another one may after a while.
--
-- KEYS 1 dead_letters_untold (see dead_letter.lua)
-- ARGV 1 letter   the beginning of a dead letter's key
--      2 seconds  after which another process may
--      3…         ids
-- Returns {id, message, reason, detail, id, message, …} of those that are the caller's
local time, seconds = now(), tonumber(ARGV[2])
local taken = {}
for position = 3, #ARGV do
    local id = ARGV[position]
    local key = ARGV[1] .. id
    local message, reason, detail, since =
        unpack(redis.call('HMGET', key, 'message', 'reason', 'detail', 'telling_since'))
    if not message then
        redis.call('SREM', KEYS[1], id)
    elseif redis.call('SISMEMBER', KEYS[1], id) == 1 and time - tonumber(since or 0) >= seconds then
        write('HSET', key, 'telling_since', format_number(time))
        for _, value in ipairs({ id, message, reason, detail }) do
            taken[#taken + 1] = value
        end
    end
end
return taken
