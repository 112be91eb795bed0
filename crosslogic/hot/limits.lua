-- The limits' decision: place, settle, release and renew holds, each in one atomic step.
--
-- The rules are those of crosslogic/domain/limits.py (`Book`), which a property test compares with this file.
-- KEYS: the records of the holds concerned. ARGV: what to do, the time in Unix ms, its arguments in MessagePack.
-- A hold's record names its subjects, so their keys are not passed again: this needs one primary, not a cluster.
--
-- What is kept:
--   a subject, "<key>"        4 maps of bucket -> amount: requests/min, tokens/min, tokens/day, spend by month
--   its holds, "<key>:holds"  sorted set of record keys by expiry; how many are not expired is the concurrency
--   a hold, its record key    minute, day and month bucket, tokens and spend it holds, time to live, its subjects
-- A subject travels as {key, time to live in ms, then its limits in the order below}; -1 is unlimited.

local REQUESTS, MINUTE_TOKENS, DAY_TOKENS, SPEND, CONCURRENCY = 1, 2, 3, 4, 5
local MINUTE_BUCKET_MS, MINUTE_BUCKETS = 5000, 12
local DAY_BUCKET_MS, DAY_BUCKETS = 3600000, 24
local CONCURRENCY_WAIT_MS = 1000
-- A call gives back at most so many expired holds of a subject: the dead of a large process are shared by many calls.
local MOST_SWEPT = 100
local NEVER = math.huge

local now = tonumber(ARGV[2])
local this_minute = math.floor(now / MINUTE_BUCKET_MS)
local this_day = math.floor(now / DAY_BUCKET_MS)

local function limit_of(subject, meter)
  return subject[2 + meter]
end

local function is_holding(subject)
  return limit_of(subject, MINUTE_TOKENS) >= 0 or limit_of(subject, DAY_TOKENS) >= 0
    or limit_of(subject, SPEND) >= 0 or limit_of(subject, CONCURRENCY) >= 0
end

local function load_amounts(subject)
  local packed = redis.call('GET', subject[1])
  return packed and cmsgpack.unpack(packed) or {{}, {}, {}, {}}
end

local function save_amounts(subject, amounts)
  redis.call('SET', subject[1], cmsgpack.pack(amounts), 'PX', subject[2])
end

local function sum_since(buckets, oldest)
  local sum = 0
  for bucket, amount in pairs(buckets) do
    if bucket < oldest then buckets[bucket] = nil else sum = sum + amount end
  end
  return sum
end

-- When enough buckets have left for no more than `room` to be counted.
local function opens_at(buckets, used, room, bucket_ms, count)
  local order = {}
  for bucket in pairs(buckets) do order[#order + 1] = bucket end
  table.sort(order)
  for _, bucket in ipairs(order) do
    used = used - buckets[bucket]
    if used <= room then return (bucket + count + 1) * bucket_ms end
  end
end

-- Amounts are put right where they were counted. What that adds to a bucket that no longer counts is dropped at the
-- next look.
local function adjust(record, tokens, spend, requests)
  local more_tokens = tokens - record[4]
  local deltas = {requests, more_tokens, more_tokens, spend - record[5]}
  local places = {record[1], record[1], record[2], record[3]}
  for _, subject in ipairs(record[7]) do
    local amounts
    for meter = REQUESTS, SPEND do
      local place = places[meter]
      if limit_of(subject, meter) >= 0 and deltas[meter] ~= 0 then
        amounts = amounts or load_amounts(subject)
        amounts[meter][place] = math.max(0, (amounts[meter][place] or 0) + deltas[meter])
      end
    end
    if amounts then save_amounts(subject, amounts) end
  end
  record[4], record[5] = tokens, spend
end

local function leave(record_key, record)
  for _, subject in ipairs(record[7]) do
    if is_holding(subject) then redis.call('ZREM', subject[1] .. ':holds', record_key) end
  end
end

-- Gives back what expired holds had grabbed. Their records stay, so that a late settling still books the truth.
local function sweep(subject)
  local holds = subject[1] .. ':holds'
  for _, record_key in ipairs(redis.call('ZRANGEBYSCORE', holds, '-inf', now, 'LIMIT', 0, MOST_SWEPT)) do
    local packed = redis.call('GET', record_key)
    if packed then
      local record = cmsgpack.unpack(packed)
      adjust(record, 0, 0, 0)
      leave(record_key, record)
      redis.call('SET', record_key, cmsgpack.pack(record), 'KEEPTTL')
    else
      redis.call('ZREM', holds, record_key)
    end
  end
end

-- Returns {1, then limit, remaining and ms to reset for requests, and the same for tokens; limit -1 where there is none},
-- or {0, number of the subject, meter, limit, used, asked, ms to wait or -1 for ever}.
local function place(record_key, tokens, spend, month, month_ends, expires, subjects)
  for _, subject in ipairs(subjects) do
    if is_holding(subject) then sweep(subject) end
  end
  local asked = {1, tokens, tokens, spend, 1}
  local places = {this_minute, this_minute, this_day, month}
  local oldest = {this_minute - MINUTE_BUCKETS, this_minute - MINUTE_BUCKETS, this_day - DAY_BUCKETS, month}
  local bucket_ms = {MINUTE_BUCKET_MS, MINUTE_BUCKET_MS, DAY_BUCKET_MS}
  local count = {MINUTE_BUCKETS, MINUTE_BUCKETS, DAY_BUCKETS}
  local all = {}
  local refusal, opens = nil, 0
  local standing = {1, -1, 0, 0, -1, 0, 0}
  for number, subject in ipairs(subjects) do
    local amounts = load_amounts(subject)
    all[number] = amounts
    for meter = REQUESTS, CONCURRENCY do
      local limit = limit_of(subject, meter)
      if limit >= 0 then
        local used
        if meter == CONCURRENCY then
          used = redis.call('ZCOUNT', subject[1] .. ':holds', '(' .. ARGV[2], '+inf')
        else
          used = sum_since(amounts[meter], oldest[meter])
        end
        local wanted = asked[meter]
        if used + wanted > limit then
          local at
          if wanted > limit then
            at = NEVER
          elseif meter == CONCURRENCY then
            at = now + CONCURRENCY_WAIT_MS
          elseif meter == SPEND then
            at = month_ends
          else
            at = opens_at(amounts[meter], used, limit - wanted, bucket_ms[meter], count[meter])
          end
          if not refusal or at > opens then
            refusal, opens = {0, number, meter, limit, used, wanted, at == NEVER and -1 or at - now}, at
          end
        elseif meter < SPEND then
          local first = meter == REQUESTS and 2 or 5
          local remaining = limit - used - wanted
          if standing[first] < 0 or remaining < standing[first + 1] then
            standing[first] = limit
            standing[first + 1] = remaining
            standing[first + 2] = (places[meter] + count[meter] + 1) * bucket_ms[meter] - now
          end
        end
      end
    end
  end
  if refusal then return refusal end

  local longest = 0
  for number, subject in ipairs(subjects) do
    local amounts = all[number]
    for meter = REQUESTS, SPEND do
      if limit_of(subject, meter) >= 0 then
        amounts[meter][places[meter]] = (amounts[meter][places[meter]] or 0) + asked[meter]
      end
    end
    save_amounts(subject, amounts)
    if is_holding(subject) then
      redis.call('ZADD', subject[1] .. ':holds', expires, record_key)
      redis.call('PEXPIRE', subject[1] .. ':holds', subject[2])
    end
    longest = math.max(longest, subject[2])
  end
  local record = {this_minute, this_day, month, tokens, spend, longest, subjects}
  redis.call('SET', record_key, cmsgpack.pack(record), 'PX', longest)
  return standing
end

local function finish(record_key, tokens, spend, requests)
  local packed = redis.call('GET', record_key)
  if not packed then return 0 end
  local record = cmsgpack.unpack(packed)
  adjust(record, tokens, spend, requests)
  leave(record_key, record)
  redis.call('DEL', record_key)
  return 1
end

local function renew(record_keys, expires)
  local found = 0
  for _, record_key in ipairs(record_keys) do
    local packed = redis.call('GET', record_key)
    if packed then
      found = found + 1
      local record = cmsgpack.unpack(packed)
      redis.call('PEXPIRE', record_key, record[6])
      for _, subject in ipairs(record[7]) do
        if is_holding(subject) then
          redis.call('ZADD', subject[1] .. ':holds', expires, record_key)
          redis.call('PEXPIRE', subject[1] .. ':holds', subject[2])
        end
      end
    end
  end
  return found
end

local given = cmsgpack.unpack(ARGV[3])
if ARGV[1] == 'place' then
  return place(KEYS[1], unpack(given))
elseif ARGV[1] == 'settle' then
  return finish(KEYS[1], given[1], given[2], 0)
elseif ARGV[1] == 'release' then
  return finish(KEYS[1], 0, 0, -1)
else
  return renew(KEYS, given[1])
end
