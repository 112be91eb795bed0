-- Capacity that an org has prepaid: so many tokens a second of one model in one region, from one full hour to another.

CREATE TABLE reservations (
    id             UUID PRIMARY KEY,
    org_id         UUID NOT NULL REFERENCES orgs,
    model          TEXT NOT NULL REFERENCES models,
    region         TEXT NOT NULL REFERENCES regions,
    capacity_units INTEGER NOT NULL CHECK (capacity_units > 0),        -- tokens a second
    starts_at      TIMESTAMPTZ NOT NULL CHECK (extract(epoch FROM starts_at) % 3600 = 0),
    ends_at        TIMESTAMPTZ CHECK (extract(epoch FROM ends_at) % 3600 = 0),   -- NULL: until it is ended
    overage        BOOLEAN NOT NULL DEFAULT TRUE,                      -- tokens beyond it: serverless, or refused
    created_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    CHECK (ends_at >= starts_at)                                       -- equal: ended before it began
);
CREATE INDEX reservations_by_org ON reservations (org_id, id);

CREATE TRIGGER reservations_changed AFTER INSERT OR UPDATE OR DELETE ON reservations
    FOR EACH STATEMENT EXECUTE FUNCTION note_change('catalog');
