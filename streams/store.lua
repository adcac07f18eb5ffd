#!lua name=starcast_VERSION

-- A partition's header is a hash: `token` is that of its newest claim, `data` the owner's header,
-- `writes` the number of writes. All keys of one call share the header's hash tag, so the
-- functions work in a cluster.

-- The number of writes that the partition has seen, or -1 when the caller is not the owner.
local function seen(header, token)
  local found = redis.call('HMGET', header, 'token', 'writes')
  return found[1] == token and tonumber(found[2] or '0') or -1
end

-- KEYS: header. Returns {token, data or false, writes}.
-- A token is higher than the last and no lower than the clock, so that none comes back after the
-- store was emptied: a worker from before could pass for the new owner.
local function claim(keys, args)
  local now = redis.call('TIME')
  local last = tonumber(redis.call('HGET', keys[1], 'token') or 0)
  local token = string.format('%.0f', math.max(last + 1, now[1] * 1000000 + now[2]))
  redis.call('HSET', keys[1], 'token', token)
  local found = redis.call('HMGET', keys[1], 'data', 'writes')
  return {token, found[1], found[2] or '0'}
end

-- KEYS: header, key...; ARGV: token, writes. Returns the values, or false when the caller is not
-- the owner or the store has lost something, as a replica has that took over without the last
-- writes: then a missing key does not mean that there is no state. It may have seen more writes:
-- the caller does not wait for those that are under way.
local function read(keys, args)
  if seen(keys[1], args[1]) < tonumber(args[2]) then
    return false
  end
  if #keys == 1 then
    return {}
  end
  return redis.call('MGET', unpack(keys, 2))
end

-- KEYS: header, key...; ARGV: token, writes, header data ('' leaves it), value... ('' deletes the
-- key). Returns 1, or 0 when the caller is not the owner or the store has lost something: then
-- nothing is changed.
local function write(keys, args)
  if seen(keys[1], args[1]) ~= tonumber(args[2]) then
    return 0
  end
  local pairs_ = {}
  for i = 2, #keys do
    if args[i + 2] == '' then
      redis.call('DEL', keys[i])
    else
      pairs_[#pairs_ + 1] = keys[i]
      pairs_[#pairs_ + 1] = args[i + 2]
    end
  end
  if #pairs_ > 0 then
    redis.call('MSET', unpack(pairs_))
  end
  redis.call('HINCRBY', keys[1], 'writes', 1)
  if args[3] ~= '' then
    redis.call('HSET', keys[1], 'data', args[3])
  end
  return 1
end

redis.register_function('starcast_claim_VERSION', claim)
redis.register_function{function_name='starcast_read_VERSION', callback=read, flags={'no-writes'}}
redis.register_function('starcast_write_VERSION', write)
