-- Purge dead letters: delete those among these whose task says FAILURE.
--
-- KEYS 1 dead_letters  2 dead_letters_untold (see dead_letter.lua)
-- ARGV 1 letter   the beginning of a dead letter's key
--      2…         ids
-- Returns how many were deleted
local deleted = 0
for position = 2, #ARGV do
    local id = ARGV[position]
    if redis.call('SISMEMBER', KEYS[2], id) == 0 then
        redis.call('DEL', ARGV[1] .. id)
        deleted = deleted + redis.call('ZREM', KEYS[1], id)
    end
end
return deleted
