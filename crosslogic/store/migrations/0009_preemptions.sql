-- Spot machines that a cloud took back, or said that it would: what placement learns hazards from.

CREATE TABLE preemptions (
    id         BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    node_id    UUID NOT NULL UNIQUE REFERENCES nodes,            -- one machine is taken once
    cloud      TEXT NOT NULL,
    region     TEXT NOT NULL REFERENCES regions,
    zone       TEXT NOT NULL DEFAULT '',                         -- the cloud's; empty: unknown
    gpu        TEXT NOT NULL,
    at         TIMESTAMPTZ NOT NULL DEFAULT now(),
    had_notice BOOLEAN NOT NULL,
    lived_s    DOUBLE PRECISION NOT NULL CHECK (lived_s >= 0)    -- since it served, else since it was ordered
);
CREATE INDEX preemptions_by_time ON preemptions (at);
