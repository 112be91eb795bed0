-- Limits that count and report but refuse nothing, by name.

ALTER TABLE limits
    ADD COLUMN dry_run TEXT[] NOT NULL DEFAULT '{}'
    CHECK (dry_run <@ ARRAY['requests_per_min', 'tokens_per_min', 'tokens_per_day', 'concurrency',
                            'monthly_spend_microdollars']);
