-- Undeclared: touch a key that this script was not told of, as other scripts here do with lists and dead letters.
--
-- Their names are made of what a message says, inside the script that moves it. Some servers refuse that, and would
-- do so only when the first worker dies.
--
-- KEYS what lies in several slots: no proxy before a cluster can part a script
-- ARGV 1 dead_letters
-- Returns how many dead letters there are
return redis.call('ZCARD', ARGV[1])
