-- Revoke: keep what was revoked for those who do not hear it now; what has been kept for long enough is forgotten.
--
-- KEYS 1 revoked_tasks   sorted set: id of a task → when its revocation is forgotten, Unix time
--      or revoked_stamps sorted set: JSON [name, value] of a stamp → the same
-- ARGV 1 seconds for which these are kept  2 most that are kept, the newest  3… members
-- Returns nothing.
local time = now()
-- First, so that a Redis that is full keeps what comes now as well: it refuses only the first write of a script, and not
-- one that deletes. A revocation is small, and they are bounded.
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', exact(time))
for i = 3, #ARGV do
    redis.call('ZADD', KEYS[1], exact(time + tonumber(ARGV[1])), ARGV[i])
end
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -tonumber(ARGV[2]) - 1)
-- Nobody may revoke anything any more.
redis.call('EXPIRE', KEYS[1], ARGV[1])
