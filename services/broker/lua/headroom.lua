-- What the scripts share: memory that Redis has in reserve for what empties it.
--
-- Redis at maxmemory refuses whatever could take memory, unless the script has written something before: then it has
-- to end what it began. Producers are refused there. Whoever consumes goes on for a while, because a task that ends
-- gives back the memory of its message; and says so with a command that is never refused and changes nothing.

-- Of maxmemory. With docker/redis a quarter takes Redis to 640 MB in its container of 1 GB: what is left is for
-- buffers, fragmentation, and the pages that a rewrite of the append-only file copies.
local RESERVE = 0.25

-- Whether at most this part of the reserve is used: this script is refused nothing any more then. Redis has no
-- reserve for a user who may not ask how much it uses.
local function use_headroom(part)
    local memory = redis.pcall('INFO', 'memory')
    if type(memory) ~= 'string' then
        return false
    end
    local used, most = tonumber(memory:match('used_memory:(%d+)')), tonumber(memory:match('maxmemory:(%d+)'))
    return used < most * (1 + RESERVE * part) and redis.pcall('DEL', '') == 0
end

-- As redis.call, for what may be the first command of a script that takes memory.
local function write(...)
    local answer = redis.pcall(...)
    if type(answer) == 'table' and answer.err then
        use_headroom(1)
        -- An error of another kind is raised now.
        return redis.call(...)
    end
    return answer
end
