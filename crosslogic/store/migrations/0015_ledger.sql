-- Prices by version, the double-entry ledger, and what each hour costs.

CREATE TABLE price_books (
    name              TEXT PRIMARY KEY CHECK (name ~ '^[a-z0-9][a-z0-9.-]{0,62}$'),
    tiers             JSONB NOT NULL DEFAULT '[]',               -- [[above_tokens, discount_percent], …], ascending
    free_tokens       BIGINT NOT NULL CHECK (free_tokens >= 0),
    capacity_unit_e10 BIGINT NOT NULL CHECK (capacity_unit_e10 >= 0),   -- 10⁻¹⁰ USD a month
    created_at        TIMESTAMPTZ NOT NULL DEFAULT now()
);
CREATE TABLE price_book_prices (
    book        TEXT NOT NULL REFERENCES price_books,
    model       TEXT NOT NULL,
    token_class TEXT NOT NULL CHECK (token_class IN ('prompt', 'completion')),
    price_e10   BIGINT NOT NULL CHECK (price_e10 >= 0),          -- 10⁻¹⁰ USD a token
    PRIMARY KEY (book, model, token_class)
);
CREATE TABLE price_book_regions (
    book          TEXT NOT NULL REFERENCES price_books,
    region        TEXT NOT NULL,
    multiplier_bp INTEGER NOT NULL CHECK (multiplier_bp > 0),
    PRIMARY KEY (book, region)
);
-- From which full hour on a book holds. One that never starts answers what-if questions only.
CREATE TABLE price_book_starts (
    starts_at TIMESTAMPTZ PRIMARY KEY CHECK (starts_at = full_hour(starts_at)),
    book      TEXT NOT NULL REFERENCES price_books
);
-- An enterprise org's own prices; NULL: the book's again.
CREATE TABLE price_overrides (
    org_id      UUID NOT NULL REFERENCES orgs,
    model       TEXT NOT NULL,
    token_class TEXT NOT NULL CHECK (token_class IN ('prompt', 'completion')),
    starts_at   TIMESTAMPTZ NOT NULL CHECK (starts_at = full_hour(starts_at)),
    price_e10   BIGINT CHECK (price_e10 >= 0),
    PRIMARY KEY (org_id, model, token_class, starts_at)
);

INSERT INTO price_books (name, tiers, free_tokens, capacity_unit_e10)
VALUES ('v1', '[[10000000, 10], [100000000, 20], [1000000000, 30]]', 25000, 10000000000);
INSERT INTO price_book_prices SELECT 'v1', name, 'prompt', input_price_e10 FROM models;
INSERT INTO price_book_prices
SELECT 'v1', name, 'completion', output_price_e10 FROM models WHERE output_price_e10 IS NOT NULL;
INSERT INTO price_book_regions SELECT 'v1', name, multiplier_bp FROM regions;
INSERT INTO price_book_starts VALUES ('epoch', 'v1');

CREATE TABLE ledger_accounts (
    id     BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    org_id UUID,                                                 -- NULL: ours
    name   TEXT NOT NULL,
    unit   TEXT NOT NULL CHECK (unit IN ('tokens', 'e10_usd')),
    UNIQUE NULLS NOT DISTINCT (org_id, name, unit),
    CHECK (unit = 'tokens' AND org_id IS NOT NULL AND name IN ('usage', 'free_allowance', 'reservation')
        OR unit = 'tokens' AND org_id IS NULL AND name IN ('generated', 'waste', 'shadow', 'probes')
        OR unit = 'e10_usd' AND org_id IS NOT NULL AND name IN ('receivable', 'discounts', 'credits', 'corrections')
        OR unit = 'e10_usd' AND org_id IS NULL AND name IN ('revenue', 'rounding', 'granted_credits', 'corrections'))
);
INSERT INTO ledger_accounts (name, unit) VALUES
    ('generated', 'tokens'), ('waste', 'tokens'), ('shadow', 'tokens'), ('probes', 'tokens'),
    ('revenue', 'e10_usd'), ('rounding', 'e10_usd'), ('granted_credits', 'e10_usd'), ('corrections', 'e10_usd');

-- `key` is the business fact that it stands for, so that none is posted twice: seal/<org>/<hour>, rate/<org>/<hour>, …
CREATE TABLE ledger_transactions (
    id        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key       TEXT NOT NULL UNIQUE,
    org_id    UUID,
    hour      TIMESTAMPTZ NOT NULL,
    posted_at TIMESTAMPTZ NOT NULL DEFAULT now()
);
CREATE TABLE ledger_postings (
    transaction_id BIGINT NOT NULL REFERENCES ledger_transactions,
    account_id     BIGINT NOT NULL REFERENCES ledger_accounts,
    amount         BIGINT NOT NULL CHECK (amount <> 0),
    PRIMARY KEY (transaction_id, account_id)
);
CREATE INDEX ledger_postings_by_account ON ledger_postings (account_id);

CREATE FUNCTION check_balance() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (
        SELECT FROM ledger_postings p JOIN ledger_accounts a ON a.id = p.account_id
        WHERE p.transaction_id = NEW.transaction_id GROUP BY a.unit HAVING sum(p.amount) <> 0
    ) THEN
        RAISE EXCEPTION 'ledger transaction % does not balance', NEW.transaction_id USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER ledger_balances AFTER INSERT ON ledger_postings
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION check_balance();

-- What an hour costs an org, and how its month stood behind it: rating goes on from the latest. A month is rated in order.
CREATE TABLE rated_hours (
    org_id        UUID NOT NULL,
    hour          TIMESTAMPTZ NOT NULL,
    microdollars  BIGINT NOT NULL CHECK (microdollars >= 0),     -- the hour's charge
    volume_tokens BIGINT NOT NULL CHECK (volume_tokens >= 0),    -- of the month so far
    exact_e10     BIGINT NOT NULL CHECK (exact_e10 >= 0),        -- of the month so far, in 10⁻¹⁰ USD
    price_book    TEXT NOT NULL REFERENCES price_books,
    PRIMARY KEY (org_id, hour)
);
CREATE INDEX rated_hours_by_hour ON rated_hours (hour);

CREATE TRIGGER price_books_are_versions BEFORE UPDATE OR DELETE ON price_books
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER price_book_prices_are_versions BEFORE UPDATE OR DELETE ON price_book_prices
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER price_book_regions_are_versions BEFORE UPDATE OR DELETE ON price_book_regions
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER price_book_starts_are_facts BEFORE UPDATE OR DELETE ON price_book_starts
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER price_overrides_are_facts BEFORE UPDATE OR DELETE ON price_overrides
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER ledger_accounts_are_kept BEFORE UPDATE OR DELETE ON ledger_accounts
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER ledger_transactions_are_kept BEFORE UPDATE OR DELETE ON ledger_transactions
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER ledger_postings_are_kept BEFORE UPDATE OR DELETE ON ledger_postings
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER rated_hours_are_kept BEFORE UPDATE OR DELETE ON rated_hours
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
