-- What routing needs to know: a node's price, a model's own deadlines, whose keys are shown why a node was chosen.

-- What it costs while it runs; 0: unknown. Cost-weighted deployments fill cheaper nodes first.
ALTER TABLE nodes
    ADD COLUMN price_microdollars_per_h BIGINT NOT NULL DEFAULT 0 CHECK (price_microdollars_per_h >= 0);

-- NULL: the API's setting.
ALTER TABLE models
    ADD COLUMN connect_timeout_ms INTEGER CHECK (connect_timeout_ms > 0),
    ADD COLUMN first_token_timeout_ms INTEGER CHECK (first_token_timeout_ms > 0),
    ADD COLUMN idle_timeout_ms INTEGER CHECK (idle_timeout_ms > 0),
    ADD COLUMN total_timeout_ms INTEGER CHECK (total_timeout_ms > 0);

ALTER TABLE orgs ADD COLUMN is_operator BOOLEAN NOT NULL DEFAULT FALSE;

-- Why a request went where it went, by the id of its usage record.
CREATE TABLE IF NOT EXISTS request_decisions (
    id       UUID PRIMARY KEY,
    decision JSONB NOT NULL
);
