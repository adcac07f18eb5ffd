#!lua name=starcast

-- A partition's header is a hash: `token` is that of its newest claim, `data` the owner's header.
-- All keys of one call share the header's hash tag, so the functions work in a cluster.

-- KEYS: header. Returns {token, data or false}.
-- A token is higher than the last and no lower than the clock, so that none comes back after the
-- store was emptied: a worker from before could pass for the new owner.
local function claim(keys, args)
  local now = redis.call('TIME')
  local last = tonumber(redis.call('HGET', keys[1], 'token') or 0)
  local token = string.format('%.0f', math.max(last + 1, now[1] * 1000000 + now[2]))
  redis.call('HSET', keys[1], 'token', token)
  return {token, redis.call('HGET', keys[1], 'data')}
end

-- KEYS: header, key...; ARGV: token. Returns the values, or false when a newer owner has claimed
-- the partition or the store has lost it: then a missing key does not mean that there is no state.
local function read(keys, args)
  if redis.call('HGET', keys[1], 'token') ~= args[1] then
    return false
  end
  return redis.call('MGET', unpack(keys, 2))
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
redis.register_function{function_name='starcast_read', callback=read, flags={'no-writes'}}
redis.register_function('starcast_write', write)
