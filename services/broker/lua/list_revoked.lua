-- List revoked: the revocations that are kept. It writes nothing, so that a full Redis answers as well.
--
-- KEYS 1 revoked_tasks  2 revoked_stamps (see revoke.lua)
-- Returns {{member, seconds until it is forgotten, …}, {the same of stamps}}, oldest first
local time = now()

local function list_members(key)
    local found = redis.call('ZRANGEBYSCORE', key, '(' .. format_number(time), '+inf', 'WITHSCORES')
    for position = 2, #found, 2 do
        found[position] = format_number(tonumber(found[position]) - time)
    end
    return found
end

return { list_members(KEYS[1]), list_members(KEYS[2]) }
