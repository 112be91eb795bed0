-- Node agents: what lets them in, what they were given, and our own certificate authorities.

CREATE TABLE authorities (
    id          INTEGER PRIMARY KEY,
    certificate TEXT NOT NULL,                                   -- PEM
    sealed_key  BYTEA NOT NULL,                                  -- AES-256-GCM under a key that derives from the node secret
    created_at  TIMESTAMPTZ NOT NULL,
    issues_from TIMESTAMPTZ NOT NULL,                            -- trusted before it issues: agents must have heard of it
    expires_at  TIMESTAMPTZ NOT NULL,
    CHECK (issues_from >= created_at AND expires_at > issues_from)
);

-- A token lets one key register one node. The first key that used it may use it again: its answer may have been lost.
CREATE TABLE join_tokens (
    token_hash BYTEA PRIMARY KEY CHECK (length(token_hash) = 32),   -- SHA-256; the token is never stored
    node_id    UUID NOT NULL UNIQUE,
    org_id     UUID REFERENCES orgs,                             -- NULL: serves everybody
    model      TEXT REFERENCES models,                           -- NULL: launched by us, so the node's row says
    region     TEXT REFERENCES regions,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    expires_at TIMESTAMPTZ NOT NULL,
    used_at    TIMESTAMPTZ,
    key_hash   BYTEA CHECK (length(key_hash) = 32),              -- SHA-256 of the public key that used it
    CHECK ((used_at IS NULL) = (key_hash IS NULL)),
    CHECK ((model IS NULL) = (region IS NULL))
);

CREATE TABLE agents (
    node_id         UUID PRIMARY KEY,                            -- an invited node's row comes a moment later
    org_id          UUID REFERENCES orgs,
    endpoint        TEXT NOT NULL,
    engine          TEXT NOT NULL,
    version         TEXT NOT NULL,
    registered_at   TIMESTAMPTZ NOT NULL DEFAULT now(),
    renewal_asked_at TIMESTAMPTZ,
    logs_asked_at   TIMESTAMPTZ,
    logs_at         TIMESTAMPTZ,
    logs            TEXT NOT NULL DEFAULT '',
    notice          TEXT NOT NULL DEFAULT '',                    -- the cloud's word that it takes the machine
    notice_at       TIMESTAMPTZ
);

CREATE TABLE agent_certificates (
    serial       TEXT PRIMARY KEY,                               -- hexadecimal
    node_id      UUID NOT NULL REFERENCES agents,
    authority_id INTEGER NOT NULL REFERENCES authorities,
    issued_at    TIMESTAMPTZ NOT NULL,
    expires_at   TIMESTAMPTZ NOT NULL
);
CREATE INDEX agent_certificates_by_node ON agent_certificates (node_id, issued_at DESC);

-- A node of an org serves that org alone (H6); one with an agent is reached with certificates of ours.
ALTER TABLE nodes
    ADD COLUMN org_id UUID REFERENCES orgs,
    ADD COLUMN has_agent BOOLEAN NOT NULL DEFAULT FALSE;

-- In the same statement as the row itself, whoever writes it: a node is never for a moment somebody else's.
CREATE FUNCTION take_over_agent() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    SELECT TRUE, a.org_id INTO NEW.has_agent, NEW.org_id FROM agents a WHERE a.node_id = NEW.id;
    NEW.has_agent := coalesce(NEW.has_agent, FALSE);
    RETURN NEW;
END
$$;
CREATE TRIGGER nodes_take_over_agent BEFORE INSERT ON nodes
    FOR EACH ROW EXECUTE FUNCTION take_over_agent();
