-- Autoscaling: what a deployment says of its own growth, how long nodes took to come, and what was decided.

ALTER TABLE deployments
    ADD COLUMN placement TEXT NOT NULL DEFAULT 'spread' CHECK (placement IN ('spread', 'packed')),
    ADD COLUMN on_demand_base INTEGER NOT NULL DEFAULT 0 CHECK (on_demand_base BETWEEN 0 AND 1000),
    ADD COLUMN ttft_target_ms INTEGER CHECK (ttft_target_ms > 0),                          -- NULL: no target
    ADD COLUMN spend_cap_microdollars_per_h BIGINT CHECK (spend_cap_microdollars_per_h >= 0),   -- NULL: no cap
    ADD COLUMN idle_s INTEGER NOT NULL DEFAULT 600 CHECK (idle_s BETWEEN 1 AND 86400),
    ADD COLUMN gpus TEXT[] NOT NULL DEFAULT '{}';

-- How long each phase of a node's start took; the rows outlive the node.
CREATE TABLE node_phases (
    node_id UUID NOT NULL,
    phase   TEXT NOT NULL CHECK (phase IN ('provision', 'boot', 'pull', 'load', 'warm')),
    seconds DOUBLE PRECISION NOT NULL CHECK (seconds >= 0),
    cloud   TEXT NOT NULL,
    gpu     TEXT NOT NULL,
    model   TEXT NOT NULL,
    region  TEXT NOT NULL,
    at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (node_id, phase)
);
CREATE INDEX node_phases_by_age ON node_phases (at);

-- A phase ends where the node's state moves on, in the same transaction. It began when the ones before it had ended;
-- changed_at would not say that, because prices and tombstones move it, too. Joined nodes have no phases.
CREATE FUNCTION note_phase() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO node_phases (node_id, phase, seconds, cloud, gpu, model, region)
    SELECT NEW.id,
           CASE OLD.state WHEN 'booting' THEN 'boot' WHEN 'loading' THEN 'load' ELSE 'provision' END,
           greatest(0, extract(epoch FROM now() - NEW.created_at) - coalesce(sum(before.seconds), 0)),
           -- The cloud behind the provider, as soon as nodes have such a column.
           coalesce(nullif(to_jsonb(NEW) ->> 'cloud', ''), NEW.provider), NEW.gpu, NEW.model, NEW.region
    FROM node_phases before WHERE before.node_id = NEW.id
    ON CONFLICT (node_id, phase) DO NOTHING;
    RETURN NULL;
END
$$;
CREATE TRIGGER nodes_phase_ended AFTER UPDATE OF state ON nodes
    FOR EACH ROW
    WHEN (NEW.provider <> 'joined' AND (OLD.state, NEW.state) IN (
        ('requested', 'booting'), ('launching', 'booting'), ('booting', 'loading'), ('loading', 'ready')))
    EXECUTE FUNCTION note_phase();

-- Bounded by age; one row whenever something was done or the numbers have changed, and one now and then in between.
CREATE TABLE scaling_decisions (
    deployment TEXT NOT NULL,
    region     TEXT NOT NULL,
    at         TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    desired    INTEGER NOT NULL,
    needed     INTEGER,                                          -- NULL: it could not be seen
    present    INTEGER NOT NULL,
    serving    INTEGER NOT NULL,
    ordered    INTEGER NOT NULL,
    drained    INTEGER NOT NULL,
    reason     TEXT NOT NULL,
    PRIMARY KEY (deployment, region, at)
);
CREATE INDEX scaling_decisions_by_age ON scaling_decisions (at);
