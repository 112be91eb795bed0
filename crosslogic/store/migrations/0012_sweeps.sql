-- Sweeps of the clouds: each proves that every machine was intended, and says what was done about the others.

CREATE TABLE sweeps (
    id          UUID PRIMARY KEY,
    started_at  TIMESTAMPTZ NOT NULL,
    ended_at    TIMESTAMPTZ NOT NULL DEFAULT now(),
    provider    TEXT NOT NULL,                                   -- '': every cloud that was connected
    is_dry_run  BOOLEAN NOT NULL,
    machines    INTEGER NOT NULL CHECK (machines >= 0),
    created     INTEGER NOT NULL CHECK (created >= 0),           -- nodes written down since the sweep before
    owned       INTEGER NOT NULL CHECK (owned >= 0),
    ending      INTEGER NOT NULL CHECK (ending >= 0),
    destroyed   INTEGER NOT NULL CHECK (destroyed >= 0),
    foreign_machines INTEGER NOT NULL CHECK (foreign_machines >= 0),
    missing     INTEGER NOT NULL CHECK (missing >= 0),
    unexplained INTEGER NOT NULL CHECK (unexplained >= 0),
    unasked     TEXT[] NOT NULL                                  -- clouds that did not answer
);

CREATE TABLE sweep_findings (
    sweep_id UUID NOT NULL REFERENCES sweeps ON DELETE CASCADE,
    provider TEXT NOT NULL,
    cluster  TEXT NOT NULL,
    standing TEXT NOT NULL CHECK (standing IN ('orphan', 'unintended', 'foreign', 'missing')),
    node_id  UUID,                                               -- NULL: no node has ever claimed the machine
    reason   TEXT NOT NULL,
    outcome  TEXT NOT NULL,
    PRIMARY KEY (sweep_id, provider, cluster)
);
