-- Touch undeclared: read a key that is not among this script's KEYS, as other scripts do with lists and dead letters.
--
-- Their names come from a message, inside the script that moves it. Some servers refuse that, and would show it only
-- when the first worker dies.
--
-- KEYS of several slots: a proxy in front of a cluster cannot split a script
-- ARGV 1 dead_letters
-- Returns how many dead letters there are
return redis.call('ZCARD', ARGV[1])
