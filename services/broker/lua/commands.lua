-- Commands: all of these, in one step.
--
-- ARGV how many words the first command has, its words, how many the second one has, …
-- Returns the answer of each
local answers = {}
local position = 1
while position <= #ARGV do
    local last = position + tonumber(ARGV[position])
    answers[#answers + 1] = redis.call(unpack(ARGV, position + 1, last))
    position = last + 1
end
return answers
