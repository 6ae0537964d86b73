-- Revoke: keep revocations for nodes that do not hear of them now, and delete those that are too old.
--
-- KEYS 1 revoked_tasks   zset  id of a task -> when its revocation is forgotten, Unix time
--      or revoked_stamps zset  JSON [name, value] of a stamp -> the same
-- ARGV 1 seconds for which these are kept  2 most that are kept, the newest  3… members
-- Returns nothing
local time = now()
-- First, so that a full Redis keeps the new ones as well: it refuses only the first write of a script, and not one
-- that deletes. A revocation is small, and their number has a bound.
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', format_number(time))
for position = 3, #ARGV do
    redis.call('ZADD', KEYS[1], format_number(time + tonumber(ARGV[1])), ARGV[position])
end
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -tonumber(ARGV[2]) - 1)
-- The key goes when nothing is revoked any more.
redis.call('EXPIRE', KEYS[1], ARGV[1])
