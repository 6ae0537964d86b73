-- Commands: run all of these, in one step.
--
-- ARGV how many words the first command has, its words, how many the second one has, …
-- Returns the reply to each
local replies = {}
local position = 1
while position <= #ARGV do
    local last = position + tonumber(ARGV[position])
    replies[#replies + 1] = redis.call(unpack(ARGV, position + 1, last))
    position = last + 1
end
return replies
