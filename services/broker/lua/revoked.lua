-- Revoked: what was revoked and is not forgotten. It writes nothing, so that a Redis that is full answers as well.
--
-- KEYS 1 revoked_tasks  2 revoked_stamps (see revoke.lua)
-- Returns {{member, seconds until it is forgotten, …}, {the same of stamps}}, oldest first
local time = now()

local function left(key)
    local found = redis.call('ZRANGEBYSCORE', key, '(' .. exact(time), '+inf', 'WITHSCORES')
    for i = 2, #found, 2 do
        found[i] = exact(tonumber(found[i]) - time)
    end
    return found
end

return { left(KEYS[1]), left(KEYS[2]) }
