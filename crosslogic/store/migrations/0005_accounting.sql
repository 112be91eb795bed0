-- What a request took, what nodes made for it that nobody pays for, and why it went where it went.

ALTER TABLE usage_records
    ADD COLUMN tries         INTEGER NOT NULL DEFAULT 0 CHECK (tries >= 0),          -- how many nodes were asked
    ADD COLUMN continuations INTEGER NOT NULL DEFAULT 0 CHECK (continuations >= 0),  -- how often another node went on
    DROP CONSTRAINT usage_records_token_source_check,
    -- 'counted' is what earlier versions wrote for 'chunks'.
    ADD CONSTRAINT usage_records_token_source_check
        CHECK (token_source IN ('engine', 'tokenizer', 'chunks', 'counted', 'none')),
    -- Our failures are never charged (A3). Rows of before are left as they are.
    ADD CONSTRAINT usage_records_failures_are_free
        CHECK (outcome NOT IN ('failed', 'cut') OR prompt_tokens + completion_tokens + list_price_microdollars = 0) NOT VALID;

-- The internal account: tokens that nodes read or made for a request and that its org does not pay for (A3).
CREATE TABLE usage_waste (
    request_id        UUID NOT NULL,
    attempt           INTEGER NOT NULL CHECK (attempt > 0),
    node_id           UUID NOT NULL,
    served_region     TEXT NOT NULL,
    model             TEXT NOT NULL,
    reason            TEXT NOT NULL CHECK (reason IN ('failed_try', 'cut_stream', 'reread_prefix', 'not_relayed')),
    prompt_tokens     BIGINT NOT NULL CHECK (prompt_tokens >= 0),
    completion_tokens BIGINT NOT NULL CHECK (completion_tokens >= 0),
    PRIMARY KEY (request_id, attempt)
);

-- Kept for a week, for whoever asks why. The id is the request's; it carries the admission time (UUIDv7).
CREATE TABLE request_decisions (
    id       UUID PRIMARY KEY,
    decision JSONB NOT NULL
);
