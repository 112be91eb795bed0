-- Takes a route entry unless the board knows a generation of that node as new or newer. Returns 1 when taken.
-- KEYS: the hash of entries, this node's tombstone. ARGV: node id, generation, entry (JSON), channel,
--       "1" when the node has ended, seconds to keep its tombstone.
local generation = tonumber(ARGV[2])
local current = redis.call('HGET', KEYS[1], ARGV[1])
if current and cjson.decode(current)['generation'] >= generation then
  return 0
end
local gone = redis.call('GET', KEYS[2])
if gone and tonumber(gone) >= generation then
  return 0
end
if ARGV[5] == '1' then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[6])
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
end
redis.call('PUBLISH', ARGV[4], ARGV[3])
return 1
