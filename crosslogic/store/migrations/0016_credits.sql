-- Credits, why orgs are suspended, and what they are told.

-- `reason_key` is the business fact that it was granted for: sign_up, referral/<other org>, payment/<id>, …
CREATE TABLE credits (
    id         UUID PRIMARY KEY,
    org_id     UUID NOT NULL REFERENCES orgs,
    kind       TEXT NOT NULL CHECK (kind IN ('sign_up', 'referral', 'promotional', 'paid')),
    reason_key TEXT NOT NULL,
    cents      BIGINT NOT NULL CHECK (cents > 0),
    granted_at TIMESTAMPTZ NOT NULL,
    expires_at TIMESTAMPTZ CHECK (expires_at > granted_at),
    UNIQUE (org_id, reason_key)
);
-- What a closed month took from a credit.
CREATE TABLE credit_draws (
    credit_id UUID NOT NULL REFERENCES credits,
    month     TEXT NOT NULL CHECK (month ~ '^\d{4}-\d{2}$'),
    cents     BIGINT NOT NULL CHECK (cents > 0),
    PRIMARY KEY (credit_id, month)
);
CREATE TRIGGER credits_are_facts BEFORE UPDATE OR DELETE ON credits FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER credit_draws_are_facts BEFORE UPDATE OR DELETE ON credit_draws
    FOR EACH ROW EXECUTE FUNCTION refuse_change();

CREATE FUNCTION check_credit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM credits WHERE id = NEW.credit_id FOR UPDATE;
    IF (SELECT sum(cents) FROM credit_draws WHERE credit_id = NEW.credit_id)
            > (SELECT cents FROM credits WHERE id = NEW.credit_id) THEN
        RAISE EXCEPTION 'credit % does not hold so much', NEW.credit_id USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER credit_draws_fit AFTER INSERT ON credit_draws FOR EACH ROW EXECUTE FUNCTION check_credit();

-- An org is suspended while it has a row here.
CREATE TABLE suspensions (
    org_id UUID NOT NULL REFERENCES orgs,
    reason TEXT NOT NULL CHECK (reason IN ('operator', 'non_payment', 'abuse')),
    since  TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (org_id, reason)
);
INSERT INTO suspensions (org_id, reason) SELECT id, 'operator' FROM orgs WHERE state = 'suspended';

-- Written once by its key; sent until every channel has taken it.
CREATE TABLE notifications (
    id         BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key        TEXT NOT NULL UNIQUE,
    org_id     UUID REFERENCES orgs,
    title      TEXT NOT NULL,
    body       TEXT NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    sent_to    TEXT[] NOT NULL DEFAULT '{}',
    attempts   INTEGER NOT NULL DEFAULT 0,
    due_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
    done_at    TIMESTAMPTZ,
    last_error TEXT NOT NULL DEFAULT ''
);
CREATE INDEX notifications_due ON notifications (due_at) WHERE done_at IS NULL;
