-- Tenancy, catalog, fleet and usage. Ids are UUIDv7, made by us; money is BIGINT; times are UTC.

CREATE TABLE regions (
    name          TEXT PRIMARY KEY,
    title         TEXT NOT NULL,
    multiplier_bp INTEGER NOT NULL CHECK (multiplier_bp > 0),   -- basis points: 10 000 = 1.0×
    aliases       TEXT[] NOT NULL DEFAULT '{}',
    fallback      TEXT[] NOT NULL DEFAULT '{}',
    position      INTEGER NOT NULL
);

CREATE TABLE models (
    name             TEXT PRIMARY KEY,
    family           TEXT NOT NULL,
    kind             TEXT NOT NULL CHECK (kind IN ('chat', 'completion', 'embedding')),
    context_tokens   INTEGER NOT NULL CHECK (context_tokens > 0),
    vram_gb          INTEGER NOT NULL CHECK (vram_gb > 0),
    input_price_e10  BIGINT NOT NULL CHECK (input_price_e10 >= 0),    -- 10⁻¹⁰ USD a token
    output_price_e10 BIGINT CHECK (output_price_e10 >= 0),            -- NULL: the model has no output tokens
    aliases          TEXT[] NOT NULL DEFAULT '{}',
    default_max_tokens INTEGER NOT NULL DEFAULT 1024 CHECK (default_max_tokens > 0),
    -- What clients see under "metadata" of /v1/models, e.g. which weights really serve it in dev mode.
    metadata         JSONB NOT NULL DEFAULT '{}'
);

CREATE TABLE orgs (
    id                 UUID PRIMARY KEY,
    name               TEXT NOT NULL UNIQUE CHECK (name ~ '^[a-z0-9][a-z0-9-]{0,62}$'),
    state              TEXT NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'suspended')),
    plan               TEXT NOT NULL DEFAULT 'serverless' CHECK (plan IN ('serverless', 'reserved', 'enterprise')),
    region_preferences TEXT[] NOT NULL DEFAULT '{}',
    stripe_customer_id TEXT UNIQUE,
    created_at         TIMESTAMPTZ NOT NULL DEFAULT now()
);

CREATE TABLE environments (
    id             UUID PRIMARY KEY,
    org_id         UUID NOT NULL REFERENCES orgs,
    name           TEXT NOT NULL CHECK (name IN ('dev', 'staging', 'prod')),
    state          TEXT NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'suspended')),
    home_region    TEXT REFERENCES regions,
    allowed_models TEXT[],                                       -- NULL: all
    created_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    UNIQUE (org_id, name)
);

CREATE TABLE keys (
    id             UUID PRIMARY KEY,
    environment_id UUID NOT NULL REFERENCES environments,
    secret_hash    BYTEA NOT NULL UNIQUE CHECK (length(secret_hash) = 32),   -- SHA-256; the secret is never stored
    hint           TEXT NOT NULL,                                -- the secret's last four characters
    name           TEXT NOT NULL DEFAULT '',
    role           TEXT NOT NULL DEFAULT 'developer' CHECK (role IN ('admin', 'developer', 'read-only')),
    state          TEXT NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'suspended', 'revoked')),
    expires_at     TIMESTAMPTZ,
    created_at     TIMESTAMPTZ NOT NULL DEFAULT now()
);
CREATE INDEX keys_by_environment ON keys (environment_id);

-- One row per subject that has limits of its own; NULL means the layer's default, -1 no limit at all.
CREATE TABLE limits (
    layer                TEXT NOT NULL CHECK (layer IN ('global', 'org', 'environment', 'key')),
    subject_id           UUID NOT NULL,                          -- all zeros for the global layer
    requests_per_min     BIGINT CHECK (requests_per_min >= -1),
    tokens_per_min       BIGINT CHECK (tokens_per_min >= -1),
    tokens_per_day       BIGINT CHECK (tokens_per_day >= -1),
    concurrency          BIGINT CHECK (concurrency >= -1),
    monthly_spend_microdollars BIGINT CHECK (monthly_spend_microdollars >= -1),
    PRIMARY KEY (layer, subject_id),
    CHECK (layer = 'org' OR monthly_spend_microdollars IS NULL)
);

CREATE TABLE deployments (
    name       TEXT PRIMARY KEY CHECK (name ~ '^[a-z0-9][a-z0-9.-]{0,62}$'),
    model      TEXT NOT NULL REFERENCES models,
    strategy   TEXT NOT NULL DEFAULT 'least-load'
               CHECK (strategy IN ('round-robin', 'least-load', 'latency-weighted', 'cost-weighted', 'prefix-affinity')),
    created_at TIMESTAMPTZ NOT NULL DEFAULT now()
);

CREATE TABLE deployment_regions (
    deployment   TEXT NOT NULL REFERENCES deployments,
    region       TEXT NOT NULL REFERENCES regions,
    replicas_min INTEGER NOT NULL CHECK (replicas_min >= 0),
    replicas_max INTEGER NOT NULL CHECK (replicas_max >= replicas_min AND replicas_max <= 1000),
    PRIMARY KEY (deployment, region)
);

-- A row is written before any cloud is called (F3). generation grows with every change and never goes back (F4).
CREATE TABLE nodes (
    id              UUID PRIMARY KEY,
    deployment      TEXT REFERENCES deployments,
    model           TEXT NOT NULL REFERENCES models,
    region          TEXT NOT NULL REFERENCES regions,
    provider        TEXT NOT NULL,                               -- 'joined': no cloud behind it
    cluster         TEXT NOT NULL UNIQUE,
    gpu             TEXT NOT NULL DEFAULT '',
    is_spot         BOOLEAN NOT NULL DEFAULT FALSE,
    is_pinned       BOOLEAN NOT NULL DEFAULT FALSE,
    state           TEXT NOT NULL DEFAULT 'requested' CHECK (state IN
                    ('requested', 'launching', 'booting', 'loading', 'ready', 'draining', 'terminated', 'failed', 'lost')),
    generation      BIGINT NOT NULL DEFAULT 1,
    reason          TEXT NOT NULL DEFAULT '',
    endpoint        TEXT,
    capacity_tokens_per_s INTEGER NOT NULL DEFAULT 0,            -- measured when it was admitted; 0: unknown
    workflow_id     TEXT NOT NULL,                               -- who is responsible for it now
    drain_timeout_s INTEGER NOT NULL DEFAULT 120,
    created_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    changed_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    ready_at        TIMESTAMPTZ,
    tombstoned_at   TIMESTAMPTZ,                                 -- permanent: set before anything is undone
    ended_at        TIMESTAMPTZ,
    CHECK ((ended_at IS NOT NULL) = (state IN ('terminated', 'failed', 'lost'))),
    CHECK (state NOT IN ('booting', 'loading', 'ready') OR endpoint IS NOT NULL)
);
CREATE INDEX nodes_alive ON nodes (region, model) WHERE ended_at IS NULL;
CREATE INDEX nodes_by_deployment ON nodes (deployment, created_at DESC);

-- One row per request, written once by the usage log's shipper; the id carries the admission time (UUIDv7).
CREATE TABLE usage_records (
    id                 UUID PRIMARY KEY,
    admitted_at        TIMESTAMPTZ NOT NULL,
    client_request_id  TEXT NOT NULL DEFAULT '',
    org_id             UUID NOT NULL,
    environment_id     UUID NOT NULL,
    key_id             UUID NOT NULL,
    reservation_id     UUID,
    home_region        TEXT NOT NULL,
    served_region      TEXT NOT NULL DEFAULT '',
    model              TEXT NOT NULL,
    node_id            UUID,
    endpoint_kind      TEXT NOT NULL CHECK (endpoint_kind IN ('chat', 'completion', 'embedding')),
    is_streamed        BOOLEAN NOT NULL,
    prompt_tokens      BIGINT NOT NULL CHECK (prompt_tokens >= 0),
    completion_tokens  BIGINT NOT NULL CHECK (completion_tokens >= 0),
    cached_tokens      BIGINT NOT NULL CHECK (cached_tokens >= 0),
    token_source       TEXT NOT NULL CHECK (token_source IN ('engine', 'counted', 'none')),
    latency_ms         INTEGER NOT NULL CHECK (latency_ms >= 0),
    ttft_ms            INTEGER CHECK (ttft_ms >= 0),
    status             INTEGER NOT NULL,                         -- what the client was answered
    outcome            TEXT NOT NULL CHECK (outcome IN
                       ('completed', 'client_gone', 'rejected', 'failed', 'cut', 'interrupted')),
    list_price_microdollars BIGINT NOT NULL CHECK (list_price_microdollars >= 0)   -- for display, never summed
);
CREATE INDEX usage_records_by_environment ON usage_records (environment_id, admitted_at);
CREATE INDEX usage_records_by_org ON usage_records (org_id, admitted_at);

-- One counter per noun that API processes hold in memory; they poll it and re-read what moved. The row's lock orders
-- the writers, so that a reader never sees a number before the change that it stands for.
CREATE TABLE change_counters (
    noun TEXT PRIMARY KEY,
    seq  BIGINT NOT NULL
);
INSERT INTO change_counters (noun, seq) VALUES ('catalog', 0), ('tenancy', 0), ('nodes', 0);

CREATE FUNCTION note_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE change_counters SET seq = seq + 1 WHERE noun = TG_ARGV[0];
    RETURN NULL;
END
$$;

CREATE TRIGGER regions_changed AFTER INSERT OR UPDATE OR DELETE ON regions
    FOR EACH STATEMENT EXECUTE FUNCTION note_change('catalog');
CREATE TRIGGER models_changed AFTER INSERT OR UPDATE OR DELETE ON models
    FOR EACH STATEMENT EXECUTE FUNCTION note_change('catalog');
CREATE TRIGGER deployments_changed AFTER INSERT OR UPDATE OR DELETE ON deployments
    FOR EACH STATEMENT EXECUTE FUNCTION note_change('catalog');
CREATE TRIGGER deployment_regions_changed AFTER INSERT OR UPDATE OR DELETE ON deployment_regions
    FOR EACH STATEMENT EXECUTE FUNCTION note_change('catalog');
CREATE TRIGGER orgs_changed AFTER INSERT OR UPDATE OR DELETE ON orgs
    FOR EACH STATEMENT EXECUTE FUNCTION note_change('tenancy');
CREATE TRIGGER environments_changed AFTER INSERT OR UPDATE OR DELETE ON environments
    FOR EACH STATEMENT EXECUTE FUNCTION note_change('tenancy');
CREATE TRIGGER keys_changed AFTER INSERT OR UPDATE OR DELETE ON keys
    FOR EACH STATEMENT EXECUTE FUNCTION note_change('tenancy');
CREATE TRIGGER limits_changed AFTER INSERT OR UPDATE OR DELETE ON limits
    FOR EACH STATEMENT EXECUTE FUNCTION note_change('tenancy');
CREATE TRIGGER nodes_changed AFTER INSERT OR UPDATE OR DELETE ON nodes
    FOR EACH STATEMENT EXECUTE FUNCTION note_change('nodes');

-- Every admin write, each row chained to the one before by its hash (H11).
CREATE TABLE audit_log (
    seq           BIGINT PRIMARY KEY,
    at            TIMESTAMPTZ NOT NULL,
    actor         TEXT NOT NULL,
    action        TEXT NOT NULL,
    subject       TEXT NOT NULL,
    details       JSONB NOT NULL,
    previous_hash BYTEA NOT NULL CHECK (length(previous_hash) = 32),
    hash          BYTEA NOT NULL UNIQUE CHECK (length(hash) = 32)
);
