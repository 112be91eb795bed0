-- Revisions of a deployment, and the roll-out that replaces one with another.

CREATE TABLE deployment_revisions (
    deployment TEXT NOT NULL REFERENCES deployments ON DELETE CASCADE,
    revision   INTEGER NOT NULL CHECK (revision > 0),
    spec       JSONB NOT NULL DEFAULT '{}',                      -- crosslogic.domain.revision.RevisionSpec
    state      TEXT NOT NULL DEFAULT 'candidate' CHECK (state IN ('candidate', 'serving', 'retired', 'returned')),
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    created_by TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (deployment, revision)
);

ALTER TABLE deployments
    ADD COLUMN revision            INTEGER NOT NULL DEFAULT 1 CHECK (revision > 0),   -- the one that serves
    -- The roll-out in progress: one at most for each deployment. Its traffic is in basis points; what is left goes to
    -- the other revision. rollout_step orders its writes, so that a late one is told from the newest.
    ADD COLUMN rollout_revision    INTEGER,
    ADD COLUMN rollout_from        INTEGER,
    ADD COLUMN rollout_workflow_id TEXT,
    ADD COLUMN rollout_step        BIGINT NOT NULL DEFAULT 0,
    ADD COLUMN traffic_bp          INTEGER NOT NULL DEFAULT 0 CHECK (traffic_bp BETWEEN 0 AND 10000),
    ADD CONSTRAINT deployments_rollout_is_whole
        CHECK ((rollout_revision IS NULL) = (rollout_workflow_id IS NULL)
           AND (rollout_revision IS NULL) = (rollout_from IS NULL)
           AND (rollout_revision IS NOT NULL OR traffic_bp = 0));

-- Every deployment begins with a revision that leaves everything to its provider.
INSERT INTO deployment_revisions (deployment, revision, state) SELECT name, 1, 'serving' FROM deployments;

CREATE FUNCTION add_first_revision() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO deployment_revisions (deployment, revision, state) VALUES (NEW.name, NEW.revision, 'serving');
    RETURN NULL;
END
$$;
CREATE TRIGGER deployments_have_a_revision AFTER INSERT ON deployments
    FOR EACH ROW EXECUTE FUNCTION add_first_revision();

CREATE TRIGGER deployment_revisions_changed AFTER INSERT OR UPDATE OR DELETE ON deployment_revisions
    FOR EACH STATEMENT EXECUTE FUNCTION note_change('catalog');

ALTER TABLE nodes
    ADD COLUMN revision INTEGER NOT NULL DEFAULT 1 CHECK (revision > 0),
    ADD COLUMN is_held  BOOLEAN NOT NULL DEFAULT FALSE;          -- ready, but no request may start there yet
