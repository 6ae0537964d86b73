-- Store that a task is retried, unless a later try has ended already: its retry is sent before this is stored.
--
-- KEYS 1 a result  ARGV 1 the state to store  2 seconds for which it is kept; 0: for ever  3 retries before this try
-- Returns nothing
local ENDED = { SUCCESS = true, FAILURE = true, REVOKED = true }

local found = redis.call('GET', KEYS[1])
if found then
    -- A result in another encoding than JSON cannot be compared, and is overwritten.
    local readable, meta = pcall(cjson.decode, found)
    if readable and type(meta) == 'table' and ENDED[meta.status] then
        -- A success has no number of retries: nothing is stored after it.
        if (tonumber(meta.retries) or math.huge) > tonumber(ARGV[3]) then
            return
        end
    end
end
if tonumber(ARGV[2]) > 0 then
    redis.call('SETEX', KEYS[1], ARGV[2], ARGV[1])
else
    redis.call('SET', KEYS[1], ARGV[1])
end
redis.call('PUBLISH', KEYS[1], ARGV[1])
