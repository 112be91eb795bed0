-- What is known of Stripe: ids of what we made there, which notices came, and how its objects stood when last read.

CREATE TABLE IF NOT EXISTS stripe_objects (
    kind          TEXT NOT NULL,                     -- product, meter, price, webhook, destination …
    key           TEXT NOT NULL,                     -- our own name for it
    stripe_id     TEXT NOT NULL,
    sealed_secret BYTEA,                             -- an endpoint's signing secret, encrypted
    created_at    TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (kind, key)
);

CREATE TABLE IF NOT EXISTS stripe_events (
    id          TEXT PRIMARY KEY,
    type        TEXT NOT NULL,
    subject_id  TEXT NOT NULL,
    received_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    handled_at  TIMESTAMPTZ                          -- NULL: not yet, so that a second delivery is not a duplicate
);

-- Drawn before an object is read: of two readings that overlap, the one that began later counts.
CREATE SEQUENCE IF NOT EXISTS stripe_readings;

CREATE TABLE IF NOT EXISTS stripe_states (
    kind      TEXT NOT NULL,
    stripe_id TEXT NOT NULL,
    customer  TEXT NOT NULL,
    status    TEXT NOT NULL,
    details   JSONB NOT NULL,
    reading   BIGINT NOT NULL,
    read_at   TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (kind, stripe_id)
);
CREATE INDEX IF NOT EXISTS stripe_states_of ON stripe_states (customer);

CREATE TABLE IF NOT EXISTS stripe_meter_errors (
    event_id        TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    code            TEXT NOT NULL,
    meter           TEXT NOT NULL,
    errors          INTEGER NOT NULL CHECK (errors >= 0), -- of that code in the report; the key is a sample
    message         TEXT NOT NULL,
    noted_at        TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (event_id, idempotency_key, code)
);
