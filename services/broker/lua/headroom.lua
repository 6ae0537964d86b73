-- Shared by scripts: headroom, memory above maxmemory that only scripts of workers use.
--
-- Redis at maxmemory refuses each command that could take memory, unless its script has written something before: then
-- the script has to be finished. Producers are refused there. Workers go on for a while, because a task that ends
-- frees the memory of its message: their scripts begin with a write that is never refused and changes nothing.

-- Part of maxmemory. With docker/redis a quarter takes Redis to 640 MB in its container of 1 GB: what is left is for
-- buffers, fragmentation, and the pages that a rewrite of the append-only file copies.
local HEADROOM = 0.25

-- Whether at most this part of the headroom is used: this script is refused nothing any more then. A user who may not
-- ask how much memory Redis uses has no headroom.
local function use_headroom(part)
    local memory = redis.pcall('INFO', 'memory')
    if type(memory) ~= 'string' then
        return false
    end
    local used, most = tonumber(memory:match('used_memory:(%d+)')), tonumber(memory:match('maxmemory:(%d+)'))
    return used < most * (1 + HEADROOM * part) and redis.pcall('DEL', '') == 0
end

-- As redis.call, for what may be the first command of a script that takes memory.
local function write(...)
    local reply = redis.pcall(...)
    if type(reply) == 'table' and reply.err then
        use_headroom(1)
        -- Raises an error of another kind.
        return redis.call(...)
    end
    return reply
end
