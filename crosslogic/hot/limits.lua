-- The limits' decision: place, settle, release, adopt and add, each in one atomic step; and who takes part in it.
--
-- The rules are those of crosslogic/domain/limits.py (`Book`), which a property test compares with this file.
-- One call does what a process has gathered in one turn of its event loop, in order. Its keys are not passed one by
-- one, for a hold names its subjects: this needs one primary, not a cluster.
--
-- Everything lies under the prefix of one generation, which a rebuild makes anew:
--   "<subject>"            4 maps of bucket -> amount (requests/min, tokens/min, tokens/day, spend by month), and how
--                          many requests run
--   "fence:<process>"      the number of the process's latest joining; calls with another number came too late
--   "holds:<process>"      hash of its running holds: minute, day and month bucket, tokens, spend, reservation, subjects
--   "late:<process>"       hash of its holds that were given back because it seemed dead; with what they had held
--   "added:<process>"      the last of its additions that was made
--   "processes"            sorted set of processes by their last sign of life
-- A subject travels as {name, time to live in ms, its limits in the order below, its dry-run limits as bits}; -1 is
-- unlimited.

local REQUESTS, MINUTE_TOKENS, DAY_TOKENS, SPEND, CONCURRENCY = 1, 2, 3, 4, 5
local RUNNING = 5
local MINUTE_BUCKET_MS, MINUTE_BUCKETS = 5000, 12
local DAY_BUCKET_MS, DAY_BUCKETS = 3600000, 24
local MINUTE_TTL_MS = 120000
local KEPT_MS = 86400000
local CONCURRENCY_WAIT_MS = 1000
-- A call gives back at most so many holds of a dead process: a large one is shared by many calls.
local MOST_BURIED = 100
local NEVER = math.huge
local PLACE, SETTLE, RELEASE, ADOPT = 1, 2, 3, 4

local what, prefix, process = ARGV[1], ARGV[2], ARGV[3]
local given = cmsgpack.unpack(ARGV[5])
local now = given[1]
local this_minute = math.floor(now / MINUTE_BUCKET_MS)
local this_day = math.floor(now / DAY_BUCKET_MS)

-- Subjects are loaded once and saved once by a call, whatever it does with them.
local amounts_of, packed_of, ttl_of = {}, {}, {}
local subjects_of = {}

local function load(name)
  local amounts = amounts_of[name]
  if not amounts then
    local packed = redis.call('GET', prefix .. name)
    amounts = packed and cmsgpack.unpack(packed) or {{}, {}, {}, {}, 0}
    amounts_of[name], packed_of[name] = amounts, packed
  end
  return amounts
end

local function save_all()
  for name, ttl in pairs(ttl_of) do
    local packed = cmsgpack.pack(amounts_of[name])
    packed_of[name] = packed
    redis.call('SET', prefix .. name, packed, 'PX', ttl)
  end
end

local function unpack_subjects(packed)
  local subjects = subjects_of[packed]
  if not subjects then
    subjects = cmsgpack.unpack(packed)
    subjects_of[packed] = subjects
  end
  return subjects
end

local function add_to(buckets, bucket, more)
  buckets[bucket] = math.max(0, (buckets[bucket] or 0) + more)
end

-- Counts these for a hold. What lands in a bucket that no longer counts is dropped at the next look.
local function count(record, requests, tokens, spend, running)
  local minute, reservation = record[1], record[6]
  for _, subject in ipairs(unpack_subjects(record[7])) do
    local name = subject[1]
    local amounts = load(name)
    if requests ~= 0 and subject[2 + REQUESTS] >= 0 then add_to(amounts[REQUESTS], minute, requests) end
    if not reservation then
      if tokens ~= 0 then
        if subject[2 + MINUTE_TOKENS] >= 0 then add_to(amounts[MINUTE_TOKENS], minute, tokens) end
        if subject[2 + DAY_TOKENS] >= 0 then add_to(amounts[DAY_TOKENS], record[2], tokens) end
      end
      if spend ~= 0 and subject[2 + SPEND] >= 0 then add_to(amounts[SPEND], record[3], spend) end
    end
    if subject[2 + CONCURRENCY] >= 0 then amounts[RUNNING] = math.max(0, amounts[RUNNING] + running) end
    ttl_of[name] = math.max(subject[2], ttl_of[name] or 0)
  end
  if reservation then
    add_to(load(reservation)[MINUTE_TOKENS], minute, tokens)
    ttl_of[reservation] = MINUTE_TTL_MS
  end
end

local function sum_since(buckets, oldest)
  local sum = 0
  for bucket, amount in pairs(buckets) do
    if bucket < oldest or amount == 0 then buckets[bucket] = nil else sum = sum + amount end
  end
  return sum
end

local month, month_ends = given[2], given[3]
local oldest = {this_minute - MINUTE_BUCKETS, this_minute - MINUTE_BUCKETS, this_day - DAY_BUCKETS, month}
local bucket_ms = {MINUTE_BUCKET_MS, MINUTE_BUCKET_MS, DAY_BUCKET_MS}
local buckets_in = {MINUTE_BUCKETS, MINUTE_BUCKETS, DAY_BUCKETS}

local function leaves_in(bucket, meter)
  return (bucket + buckets_in[meter] + 1) * bucket_ms[meter] - now
end

-- In how long enough buckets have left for no more than `room` to be counted.
local function opens_in(buckets, meter, used, room)
  local order = {}
  for bucket in pairs(buckets) do order[#order + 1] = bucket end
  table.sort(order)
  for _, bucket in ipairs(order) do
    used = used - buckets[bucket]
    if used <= room then return leaves_in(bucket, meter) end
  end
end

local function all_back_in(buckets, meter)
  local newest
  for bucket in pairs(buckets) do
    if not newest or bucket > newest then newest = bucket end
  end
  return newest and leaves_in(newest, meter) or 0
end

local function is_dry_run(subject, meter)
  return subject[8] ~= 0 and math.floor(subject[8] / 2 ^ (meter - 1)) % 2 == 1
end

local function tighten(answer, first, limit, remaining, reset)
  if answer[first] < 0 or remaining < answer[first + 1] then
    answer[first], answer[first + 1], answer[first + 2] = limit, remaining, reset
  end
end

-- How the limits stand where nothing is taken from them, behind what the refusal says; the one that it tells stands
-- for its kind.
local function add_standing(refusal, subjects, is_reserved)
  for _, subject in ipairs(subjects) do
    for meter = REQUESTS, DAY_TOKENS do
      local first = meter == REQUESTS and 8 or 11
      local limit = subject[2 + meter]
      if limit >= 0 and not is_dry_run(subject, meter) and (meter == REQUESTS or not is_reserved) then
        local buckets = load(subject[1])[meter]
        local remaining = math.max(0, limit - sum_since(buckets, oldest[meter]))
        if refusal[first] < 0 or remaining < refusal[first + 1] then
          tighten(refusal, first, limit, remaining, all_back_in(buckets, meter))
        end
      end
    end
  end
  local number, meter, limit, used, wait = refusal[2], refusal[3], refusal[4], refusal[5], refusal[7]
  if meter < SPEND then
    local first = meter == REQUESTS and 8 or 11
    refusal[first], refusal[first + 1] = limit, math.max(0, limit - used)
    refusal[first + 2] = wait >= 0 and wait or all_back_in(load(subjects[number][1])[meter], meter)
  end
  return refusal
end

-- Returns the answer and, where it was placed, the hold's record. The answer is
-- {1, then limit, remaining and ms to reset for requests, and the same for tokens (limit -1 where there is none), 1 if it
-- is reserved, then number of the subject and meter of each dry-run limit that was in the way}
-- or {0, number of the subject, meter, limit, used, asked, ms to wait or -1 for ever, then the standing as above}.
local function place(tokens, spend, packed, reservation, reservation_limit)
  local subjects = unpack_subjects(packed)
  local answer = {1, -1, 0, 0, -1, 0, 0, 0}
  local is_reserved = false
  if reservation then
    local remaining = reservation_limit - sum_since(load(reservation)[MINUTE_TOKENS], oldest[MINUTE_TOKENS]) - tokens
    if remaining >= 0 then
      is_reserved = true
      answer[8] = 1
      tighten(answer, 5, reservation_limit, remaining, leaves_in(this_minute, MINUTE_TOKENS))
    end
  end
  local asked = {1, tokens, tokens, spend, 1}
  local refusal, opens = nil, 0
  for number, subject in ipairs(subjects) do
    local amounts = load(subject[1])
    for meter = REQUESTS, CONCURRENCY do
      local limit = subject[2 + meter]
      if limit >= 0 and not (is_reserved and meter > REQUESTS and meter < CONCURRENCY) then
        local used
        if meter == CONCURRENCY then
          used = amounts[RUNNING]
        else
          used = sum_since(amounts[meter], oldest[meter])
        end
        local wanted = asked[meter]
        local remaining = limit - used - wanted
        if remaining >= 0 then
          if meter < SPEND and not is_dry_run(subject, meter) then
            tighten(answer, meter == REQUESTS and 2 or 5, limit, remaining,
              leaves_in(meter == DAY_TOKENS and this_day or this_minute, meter))
          end
        elseif is_dry_run(subject, meter) then
          answer[#answer + 1] = number
          answer[#answer + 1] = meter
        else
          local wait
          if wanted > limit then
            wait = NEVER
          elseif meter == CONCURRENCY then
            wait = CONCURRENCY_WAIT_MS
          elseif meter == SPEND then
            wait = month_ends - now
          else
            wait = opens_in(amounts[meter], meter, used, limit - wanted)
          end
          if not refusal or wait > opens then
            refusal = {0, number, meter, limit, used, wanted, wait == NEVER and -1 or wait, -1, 0, 0, -1, 0, 0}
            opens = wait
          end
        end
      end
    end
  end
  if refusal then return add_standing(refusal, subjects, is_reserved) end
  local record = {this_minute, this_day, month, tokens, spend, is_reserved and reservation, packed}
  count(record, 1, tokens, spend, 1)
  return answer, record
end

-- What a process has gathered: its places, endings and so on, in order. Returns {1, the places' answers, the subjects
-- that were looked at: name and amounts in turn}, or {0} without doing anything where the process has to join anew.
local function run()
  if redis.call('GET', prefix .. 'fence:' .. process) ~= ARGV[4] then return {0} end
  local holds, late = prefix .. 'holds:' .. process, prefix .. 'late:' .. process
  local records, is_stored, is_new = {}, {}, {}
  local sought = {}
  for index = 4, #given do
    local kind = given[index][1]
    if kind >= SETTLE and kind <= ADOPT then sought[#sought + 1] = given[index][2] end
  end
  if #sought > 0 then
    for number, packed in ipairs(redis.call('HMGET', holds, unpack(sought))) do
      if packed then
        records[sought[number]] = cmsgpack.unpack(packed)
        is_stored[sought[number]] = true
      end
    end
  end
  local answers = {}
  for index = 4, #given do
    local step = given[index]
    local kind, id = step[1], step[2]
    if kind == PLACE then
      local answer, record = place(step[3], step[4], step[5], step[6], step[7])
      answers[#answers + 1] = answer
      if record then
        records[id] = record
        is_new[id] = true
      end
    elseif kind == SETTLE or kind == RELEASE then
      local tokens, spend = step[3] or 0, step[4] or 0
      local requests = kind == SETTLE and 0 or -1
      local record = records[id]
      if record then
        count(record, requests, tokens - record[4], spend - record[5], -1)
        records[id] = nil
      else
        local packed = redis.call('HGET', late, id)
        if packed then
          count(cmsgpack.unpack(packed), requests, tokens, spend, 0)
          redis.call('HDEL', late, id)
        end
      end
    elseif kind == ADOPT then
      if not records[id] and redis.call('HEXISTS', late, id) == 0 then
        local record = {step[3], step[4], step[5], step[6], step[7], step[8], step[9]}
        count(record, 1, step[6], step[7], 1)
        records[id] = record
        is_new[id] = true
      end
    elseif id > tonumber(redis.call('GET', prefix .. 'added:' .. process) or 0) then
      for _, subject in ipairs(step[3]) do
        local name, amounts = subject[1], load(subject[1])
        for meter = REQUESTS, SPEND do
          for bucket, amount in pairs(subject[2 + meter]) do add_to(amounts[meter], bucket, amount) end
        end
        ttl_of[name] = math.max(subject[2], ttl_of[name] or 0)
      end
      redis.call('SET', prefix .. 'added:' .. process, id, 'PX', KEPT_MS)
    end
  end
  save_all()
  local stored, gone = {}, {}
  for id in pairs(is_new) do
    if records[id] then
      stored[#stored + 1] = id
      stored[#stored + 1] = cmsgpack.pack(records[id])
    end
  end
  for id in pairs(is_stored) do
    if not records[id] then gone[#gone + 1] = id end
  end
  if #stored > 0 then redis.call('HSET', holds, unpack(stored)) end
  if #gone > 0 then redis.call('HDEL', holds, unpack(gone)) end
  local looked_at = {}
  for name, packed in pairs(packed_of) do
    if packed then
      looked_at[#looked_at + 1] = name
      looked_at[#looked_at + 1] = packed
    end
  end
  return {1, answers, looked_at}
end

-- A sign of life. What was given back when the process seemed dead is counted again, for it runs on.
local function show_life()
  if redis.call('ZADD', prefix .. 'processes', now, process) == 1 then
    local holds, late = prefix .. 'holds:' .. process, prefix .. 'late:' .. process
    local found = redis.call('HGETALL', late)
    for index = 1, #found, 2 do
      local record = cmsgpack.unpack(found[index + 1])
      count(record, 0, record[4], record[5], 1)
      redis.call('HSET', holds, found[index], found[index + 1])
    end
    redis.call('DEL', late)
  end
  for _, noun in ipairs({'fence:', 'holds:', 'late:'}) do
    redis.call('PEXPIRE', prefix .. noun .. process, KEPT_MS)
  end
  redis.call('PEXPIRE', prefix .. 'processes', KEPT_MS)
end

-- Gives back what a dead process holds. The records stay for a while, so that a late settling still books the truth.
-- Returns 1 while there is more to do.
local function bury(dead_before)
  local dead = redis.call('ZRANGEBYSCORE', prefix .. 'processes', '-inf', dead_before, 'LIMIT', 0, 1)[1]
  if not dead then return 0 end
  local holds, late = prefix .. 'holds:' .. dead, prefix .. 'late:' .. dead
  local buried = 0
  for _, id in ipairs(redis.call('HRANDFIELD', holds, MOST_BURIED)) do
    local packed = redis.call('HGET', holds, id)
    local record = cmsgpack.unpack(packed)
    count(record, 0, -record[4], -record[5], -1)
    redis.call('HSET', late, id, packed)
    redis.call('HDEL', holds, id)
    buried = buried + 1
  end
  redis.call('PEXPIRE', late, KEPT_MS)
  if buried < MOST_BURIED then redis.call('ZREM', prefix .. 'processes', dead) end
  return 1
end

if what == 'run' then
  return run()
elseif what == 'join' then
  -- Takes part from here on, in the generation that counts. Returns how many processes live, itself included.
  if redis.call('GET', KEYS[1]) ~= given[4] then return 0 end
  redis.call('SET', prefix .. 'fence:' .. process, ARGV[4], 'PX', KEPT_MS)
  show_life()
  save_all()
  return redis.call('ZCOUNT', prefix .. 'processes', '(' .. given[5], '+inf')
elseif what == 'beat' then
  -- Returns how many processes live, and 1 while there are dead to bury; or 0 where the process has to join anew.
  if redis.call('GET', prefix .. 'fence:' .. process) ~= ARGV[4] then return {0, 0} end
  show_life()
  local more = bury(given[5])
  save_all()
  return {redis.call('ZCOUNT', prefix .. 'processes', '(' .. given[4], '+inf'), more}
elseif what == 'leave' then
  -- Counts among the living no more. What it should still hold is given back by another's sign of life.
  if redis.call('GET', prefix .. 'fence:' .. process) == ARGV[4] then
    redis.call('ZADD', prefix .. 'processes', 'XX', 0, process)
  end
  return 1
elseif what == 'fill' then
  -- Sums from Postgres, added while only their generation's rebuild can write there.
  if redis.call('GET', KEYS[1]) ~= given[4] then return 0 end
  redis.call('PEXPIRE', KEYS[1], given[5])
  for _, subject in ipairs(given[6]) do
    local name, amounts = subject[1], load(subject[1])
    for meter = REQUESTS, SPEND do
      for bucket, amount in pairs(subject[2 + meter]) do add_to(amounts[meter], bucket, amount) end
    end
    ttl_of[name] = subject[2]
  end
  save_all()
  return 1
else
  -- 'open': the rebuilt generation counts from here on. 'quit': another may rebuild it.
  if redis.call('GET', KEYS[1]) ~= given[4] then return 0 end
  if what == 'open' then redis.call('SET', KEYS[2], given[4]) end
  redis.call('DEL', KEYS[1])
  return 1
end
