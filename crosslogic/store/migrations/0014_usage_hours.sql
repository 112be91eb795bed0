-- Usage by month, by hour and sealed: facts in partitions that nobody changes, sums of them, and the buckets that are billed.

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'rows of % are never changed or deleted; add a correction instead', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END
$$;

-- The lowest UUIDv7 of an instant: ids sort by it.
CREATE FUNCTION lowest_uuid7(at TIMESTAMPTZ) RETURNS UUID LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '70008000000000000000')::uuid
$$;

CREATE FUNCTION full_hour(at TIMESTAMPTZ) RETURNS TIMESTAMPTZ LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT date_bin('1 hour', at, 'epoch')
$$;

-- One row: how far usage is sealed, proved and rated. Every insert of records shares its lock, so that none overtakes a sealing.
CREATE TABLE usage_horizon (
    is_only          BOOLEAN PRIMARY KEY DEFAULT TRUE CHECK (is_only),
    partitioned_from TIMESTAMPTZ NOT NULL,                       -- what is older is in one partition
    sealed_until     TIMESTAMPTZ NOT NULL DEFAULT 'epoch' CHECK (sealed_until = full_hour(sealed_until)),
    proved_until     TIMESTAMPTZ NOT NULL DEFAULT 'epoch' CHECK (proved_until <= sealed_until),
    rated_until      TIMESTAMPTZ NOT NULL DEFAULT 'epoch' CHECK (rated_until <= sealed_until)
);

-- By RANGE (id): the primary key stays (id), so that no duplicate hides in another partition. The table as it was becomes
-- the first partition; its rows stay where they are, also those of before usage_records_failures_are_free.
ALTER TABLE usage_records RENAME TO usage_records_before;
ALTER INDEX usage_records_pkey RENAME TO usage_records_before_pkey;
ALTER INDEX usage_records_by_environment RENAME TO usage_records_before_by_environment;
ALTER INDEX usage_records_by_org RENAME TO usage_records_before_by_org;
CREATE TABLE usage_records (LIKE usage_records_before INCLUDING DEFAULTS INCLUDING CONSTRAINTS, PRIMARY KEY (id))
    PARTITION BY RANGE (id);
ALTER TABLE usage_records DROP CONSTRAINT usage_records_failures_are_free;
CREATE INDEX usage_records_by_environment ON usage_records (environment_id, admitted_at);
CREATE INDEX usage_records_by_org ON usage_records (org_id, admitted_at);

DO $$
DECLARE
    latest TIMESTAMPTZ := greatest(now(), (SELECT max(admitted_at) FROM usage_records_before));
    until  TIMESTAMPTZ := date_trunc('month', latest AT TIME ZONE 'UTC') AT TIME ZONE 'UTC';
BEGIN
    until := (until AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC';
    INSERT INTO usage_horizon (partitioned_from) VALUES (until);
    EXECUTE format('ALTER TABLE usage_records ATTACH PARTITION usage_records_before FOR VALUES FROM (MINVALUE) TO (%L)',
                   lowest_uuid7(until));
END
$$;

-- A month's partition is made beside the table and then attached, which keeps nobody from reading or writing it.
CREATE FUNCTION add_usage_partition(at TIMESTAMPTZ) RETURNS BOOLEAN LANGUAGE plpgsql AS $$
DECLARE
    starts    TIMESTAMP := date_trunc('month', at AT TIME ZONE 'UTC');
    lowest    UUID := lowest_uuid7(starts AT TIME ZONE 'UTC');
    beyond    UUID := lowest_uuid7((starts + interval '1 month') AT TIME ZONE 'UTC');
    partition TEXT := 'usage_records_' || to_char(starts, 'YYYY_MM');
BEGIN
    PERFORM pg_advisory_xact_lock(4267351205);
    IF to_regclass(partition) IS NOT NULL OR at < (SELECT partitioned_from FROM usage_horizon) THEN
        RETURN FALSE;
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE usage_records INCLUDING ALL)', partition);
    EXECUTE format('ALTER TABLE %I ADD CONSTRAINT usage_records_failures_are_free CHECK (outcome NOT IN (''failed'', ''cut'')
                    OR prompt_tokens + completion_tokens + list_price_microdollars = 0)', partition);
    EXECUTE format('ALTER TABLE %I ADD CONSTRAINT is_of_its_month CHECK (id >= %L AND id < %L)', partition, lowest, beyond);
    EXECUTE format('ALTER TABLE usage_records ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', partition, lowest, beyond);
    EXECUTE format('ALTER TABLE %I DROP CONSTRAINT is_of_its_month', partition);
    RETURN TRUE;
END
$$;
SELECT add_usage_partition(partitioned_from), add_usage_partition(partitioned_from + interval '32 days') FROM usage_horizon;

CREATE TRIGGER usage_records_are_facts BEFORE UPDATE OR DELETE ON usage_records
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER usage_waste_is_a_fact BEFORE UPDATE OR DELETE ON usage_waste
    FOR EACH ROW EXECUTE FUNCTION refuse_change();

-- Records that came when their hour was sealed: the hour that they are billed in. All others are billed in their own.
CREATE TABLE late_usage (
    request_id  UUID PRIMARY KEY,
    billed_hour TIMESTAMPTZ NOT NULL CHECK (billed_hour = full_hour(billed_hour))
);
CREATE INDEX late_usage_by_hour ON late_usage (billed_hour);
CREATE TRIGGER late_usage_is_a_fact BEFORE UPDATE OR DELETE ON late_usage
    FOR EACH ROW EXECUTE FUNCTION refuse_change();

-- Sums of records, kept by a trigger with every insert: what pages and limits read, and what buckets are made from. Rows of
-- a sealed billed_hour do not change any more.
CREATE TABLE usage_hours (
    hour              TIMESTAMPTZ NOT NULL,                      -- of admission
    billed_hour       TIMESTAMPTZ NOT NULL,
    org_id            UUID NOT NULL,
    environment_id    UUID NOT NULL,
    key_id            UUID NOT NULL,
    model             TEXT NOT NULL,
    home_region       TEXT NOT NULL,
    reservation_id    UUID,
    requests          BIGINT NOT NULL,
    prompt_tokens     BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    cached_tokens     BIGINT NOT NULL,
    list_price_microdollars BIGINT NOT NULL,                     -- an estimate, for spend caps
    UNIQUE NULLS NOT DISTINCT (billed_hour, org_id, environment_id, key_id, model, home_region, hour, reservation_id)
) WITH (fillfactor = 70);
CREATE INDEX usage_hours_by_hour ON usage_hours (hour);
CREATE INDEX usage_hours_by_environment ON usage_hours (environment_id, hour);
CREATE INDEX usage_hours_by_org ON usage_hours (org_id, hour);

CREATE FUNCTION count_usage() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    sealed TIMESTAMPTZ;
BEGIN
    -- A sealing that is under way is waited for, and what follows then sees it.
    SELECT sealed_until INTO sealed FROM usage_horizon FOR SHARE;
    INSERT INTO late_usage (request_id, billed_hour)
    SELECT id, greatest(sealed, full_hour(now())) FROM added WHERE full_hour(admitted_at) < sealed
    ON CONFLICT (request_id) DO NOTHING;
    -- In order, so that two inserts never wait for each other.
    INSERT INTO usage_hours AS known (
        billed_hour, org_id, environment_id, key_id, model, home_region, hour, reservation_id,
        requests, prompt_tokens, completion_tokens, cached_tokens, list_price_microdollars)
    SELECT coalesce(late.billed_hour, full_hour(added.admitted_at)), added.org_id, added.environment_id, added.key_id,
           added.model, added.home_region, full_hour(added.admitted_at), added.reservation_id,
           count(*), sum(added.prompt_tokens), sum(added.completion_tokens), sum(added.cached_tokens),
           sum(added.list_price_microdollars)
    FROM added LEFT JOIN late_usage late ON late.request_id = added.id
    GROUP BY 1, 2, 3, 4, 5, 6, 7, 8
    ORDER BY 1, 2, 3, 4, 5, 6, 7, 8
    ON CONFLICT (billed_hour, org_id, environment_id, key_id, model, home_region, hour, reservation_id) DO UPDATE SET
        requests = known.requests + excluded.requests,
        prompt_tokens = known.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = known.completion_tokens + excluded.completion_tokens,
        cached_tokens = known.cached_tokens + excluded.cached_tokens,
        list_price_microdollars = known.list_price_microdollars + excluded.list_price_microdollars;
    RETURN NULL;
END
$$;
CREATE TRIGGER usage_records_counted AFTER INSERT ON usage_records REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION count_usage();

INSERT INTO usage_hours
SELECT full_hour(admitted_at), full_hour(admitted_at), org_id, environment_id, key_id, model, home_region, reservation_id,
       count(*), sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens), sum(list_price_microdollars)
FROM usage_records
WHERE outcome NOT IN ('failed', 'cut') OR prompt_tokens + completion_tokens + list_price_microdollars = 0
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8;

-- Each API process's log of usage: everything that it admitted before `complete_until` is in Postgres. A log of a dead
-- process stays until another one has taken it over.
CREATE TABLE usage_logs (
    name           TEXT PRIMARY KEY,
    complete_until TIMESTAMPTZ NOT NULL,
    reported_at    TIMESTAMPTZ NOT NULL DEFAULT now()
);

-- Which plan an org has from which full hour on. orgs.plan acts on requests at once, on money from the next hour.
CREATE TABLE org_plans (
    org_id    UUID NOT NULL REFERENCES orgs,
    starts_at TIMESTAMPTZ NOT NULL CHECK (starts_at = full_hour(starts_at)),
    plan      TEXT NOT NULL CHECK (plan IN ('serverless', 'reserved', 'enterprise')),
    PRIMARY KEY (org_id, starts_at)
);
INSERT INTO org_plans (org_id, starts_at, plan) SELECT id, 'epoch', plan FROM orgs;

CREATE FUNCTION note_plan() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO org_plans (org_id, starts_at, plan)
    VALUES (NEW.id, CASE TG_OP WHEN 'INSERT' THEN 'epoch' ELSE full_hour(now()) + interval '1 hour' END, NEW.plan)
    ON CONFLICT (org_id, starts_at) DO UPDATE SET plan = excluded.plan;
    RETURN NULL;
END
$$;
CREATE TRIGGER orgs_plan_noted AFTER INSERT OR UPDATE OF plan ON orgs FOR EACH ROW EXECUTE FUNCTION note_plan();

-- What is billed: tokens of an hour, sealed once no request admitted in it can still be running.
CREATE TABLE usage_buckets (
    org_id         UUID NOT NULL,
    hour           TIMESTAMPTZ NOT NULL,
    model          TEXT NOT NULL,
    region         TEXT NOT NULL,                                -- the home region
    token_class    TEXT NOT NULL CHECK (token_class IN ('prompt', 'completion')),
    plan           TEXT NOT NULL CHECK (plan IN ('serverless', 'reserved', 'enterprise')),
    reservation_id UUID,                                         -- not NULL: paid for flat
    tokens         BIGINT NOT NULL CHECK (tokens > 0),
    UNIQUE NULLS NOT DISTINCT (org_id, hour, model, region, token_class, plan, reservation_id)
);
CREATE INDEX usage_buckets_by_hour ON usage_buckets (hour, org_id);
CREATE TRIGGER usage_buckets_are_sealed BEFORE UPDATE OR DELETE ON usage_buckets
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
