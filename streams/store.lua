#!lua name=starcast

-- A partition's header is a hash: `token` counts its claims, `data` is the owner's own header.
-- All keys of one call share the header's hash tag, so the functions work in a cluster.

-- KEYS: header. Returns {token, data or false}.
local function claim(keys, args)
  local token = redis.call('HINCRBY', keys[1], 'token', 1)
  return {token, redis.call('HGET', keys[1], 'data')}
end

-- KEYS: header, key...; ARGV: token, header data ('' leaves it), value... ('' deletes the key).
-- Returns 1, or 0 when a newer owner has claimed the partition: then nothing is changed.
local function write(keys, args)
  local token = redis.call('HGET', keys[1], 'token')
  if token ~= args[1] then
    return 0
  end
  local pairs_ = {}
  for i = 2, #keys do
    if args[i + 1] == '' then
      redis.call('DEL', keys[i])
    else
      pairs_[#pairs_ + 1] = keys[i]
      pairs_[#pairs_ + 1] = args[i + 1]
    end
  end
  if #pairs_ > 0 then
    redis.call('MSET', unpack(pairs_))
  end
  if args[2] ~= '' then
    redis.call('HSET', keys[1], 'data', args[2])
  end
  return 1
end

redis.register_function('starcast_claim', claim)
redis.register_function('starcast_write', write)
