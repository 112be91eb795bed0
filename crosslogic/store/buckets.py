"""Buckets' SQL: sealed from the sums of records, and read for rating."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

import asyncpg

from crosslogic.domain.months import BillingMonth
from crosslogic.domain.rating import Bucket
from crosslogic.store.ledger import LedgerStore, bucket_of
from crosslogic.store.usage import lowest_id

PROVED_AT_ONCE = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Horizon:
    """Hours before these instants are sealed, were proved from their records, and have their price."""

    sealed_until: datetime
    proved_until: datetime
    rated_until: datetime


@dataclass(frozen=True, slots=True)
class Difference:
    """Where records and buckets disagree (B1): tokens of one org, model, home region and token class."""

    org_id: UUID
    model: str
    region: str
    token_class: str
    recorded: int
    sealed: int


class BucketStore:
    """Sealed hours. What is sealed is never touched again."""

    HORIZON = "SELECT sealed_until, proved_until, rated_until FROM usage_horizon"
    LOCK_HORIZON = "SELECT sealed_until, proved_until, rated_until FROM usage_horizon FOR UPDATE"
    OLDEST_OPEN = "SELECT min(billed_hour) FROM usage_hours WHERE billed_hour >= $1 AND billed_hour < $2"
    SEAL = """
        INSERT INTO usage_buckets (org_id, hour, model, region, token_class, plan, reservation_id, tokens)
        SELECT h.org_id, h.billed_hour, h.model, h.home_region, c.token_class, coalesce(p.plan, 'serverless'),
               h.reservation_id, sum(c.tokens)
        FROM usage_hours h
        LEFT JOIN LATERAL (
            SELECT plan FROM org_plans WHERE org_id = h.org_id AND starts_at <= h.billed_hour
            ORDER BY starts_at DESC LIMIT 1
        ) p ON TRUE
        CROSS JOIN LATERAL (VALUES ('prompt', h.prompt_tokens), ('completion', h.completion_tokens))
            AS c (token_class, tokens)
        WHERE h.billed_hour >= $1 AND h.billed_hour < $2
        GROUP BY 1, 2, 3, 4, 5, 6, 7
        HAVING sum(c.tokens) > 0
    """
    SET_SEALED = "UPDATE usage_horizon SET sealed_until = $1"

    MONTH = """
        SELECT hour, model, region, token_class, plan, tokens, reservation_id
        FROM usage_buckets WHERE org_id = $1 AND hour >= $2 AND hour < $3
    """
    # As SEAL would make them now.
    OPEN_MONTH = """
        SELECT h.billed_hour AS hour, h.model, h.home_region AS region, c.token_class,
               coalesce(p.plan, 'serverless') AS plan, sum(c.tokens)::bigint AS tokens, h.reservation_id
        FROM usage_hours h
        LEFT JOIN LATERAL (
            SELECT plan FROM org_plans WHERE org_id = h.org_id AND starts_at <= h.billed_hour
            ORDER BY starts_at DESC LIMIT 1
        ) p ON TRUE
        CROSS JOIN LATERAL (VALUES ('prompt', h.prompt_tokens), ('completion', h.completion_tokens))
            AS c (token_class, tokens)
        WHERE h.org_id = $1 AND h.billed_hour >= greatest($2, (SELECT sealed_until FROM usage_horizon))
          AND h.billed_hour < $3
        GROUP BY 1, 2, 3, 4, 5, h.reservation_id
        HAVING sum(c.tokens) > 0
    """

    # From the records themselves, beside the sums that buckets were made from.
    COMPARE = """
        SELECT org_id, model, region, token_class, sum(recorded)::bigint AS recorded, sum(sealed)::bigint AS sealed
        FROM (
            SELECT r.org_id, r.model, r.home_region AS region, c.token_class, c.tokens AS recorded, 0 AS sealed
            FROM (
                SELECT org_id, model, home_region, prompt_tokens, completion_tokens FROM usage_records
                WHERE id >= $3 AND id < $4 AND outcome NOT IN ('failed', 'cut')
                  AND NOT EXISTS (SELECT FROM late_usage WHERE request_id = id)
                UNION ALL
                SELECT org_id, model, home_region, prompt_tokens, completion_tokens
                FROM usage_records JOIN late_usage ON request_id = id
                WHERE billed_hour >= $1 AND billed_hour < $2 AND outcome NOT IN ('failed', 'cut')
            ) r
            CROSS JOIN LATERAL (VALUES ('prompt', r.prompt_tokens), ('completion', r.completion_tokens))
                AS c (token_class, tokens)
            UNION ALL
            SELECT org_id, model, region, token_class, 0, tokens FROM usage_buckets WHERE hour >= $1 AND hour < $2
        ) both_sides
        GROUP BY 1, 2, 3, 4
        HAVING sum(recorded) <> sum(sealed)
        ORDER BY 1, 2, 3, 4
    """

    UNPROVED = """
        SELECT proved_until AS start_at,
               least(sealed_until, (SELECT min(hour) FROM usage_buckets WHERE hour >= proved_until) + $1::interval)
                   AS end_at
        FROM usage_horizon
    """
    SET_PROVED = "UPDATE usage_horizon SET proved_until = $1 WHERE proved_until < $1"

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def horizon(self) -> Horizon:
        """How far usage is sealed and rated."""
        row = await self._pool.fetchrow(self.HORIZON)
        assert row is not None
        return Horizon(**dict(row))

    async def seal(self, until: datetime, *, is_closing: bool = False) -> Horizon:
        """Seal every hour before a full hour and post its tokens; how far that is now. Again, it does nothing.

        Where no open hour has usage nothing is sealed, so that an empty database can still be filled; a month that
        closes is sealed all the same. Inserts of records wait meanwhile.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(self.LOCK_HORIZON)
            assert row is not None
            horizon = Horizon(**dict(row))
            sealed = horizon.sealed_until
            has_usage = await connection.fetchval(self.OLDEST_OPEN, sealed, until) is not None
            if until <= sealed or not (has_usage or is_closing):
                return horizon
            await connection.execute(self.SEAL, sealed, until)
            await LedgerStore.post_sealed(connection, sealed, until)
            await connection.execute(self.SET_SEALED, until)
        return replace(horizon, sealed_until=until)

    async def oldest_open(self, until: datetime) -> datetime | None:
        """The oldest hour before `until` that has usage and is not sealed."""
        horizon = await self.horizon()
        return await self._pool.fetchval(self.OLDEST_OPEN, horizon.sealed_until, until)

    async def month(self, org_id: UUID, month: BillingMonth, *, with_open: bool = False) -> list[Bucket]:
        """An org's sealed buckets of a month; with those that are still open, as they stand now."""
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            rows = await connection.fetch(self.MONTH, org_id, month.starts_at, month.ends_at)
            if with_open:
                rows += await connection.fetch(self.OPEN_MONTH, org_id, month.starts_at, month.ends_at)
        return [bucket_of(row) for row in rows]

    async def unproved(self) -> tuple[datetime, datetime]:
        """The next hours that are sealed and not proved yet, about a day of them; an empty span when all are."""
        row = await self._pool.fetchrow(self.UNPROVED, PROVED_AT_ONCE)
        assert row is not None
        return row["start_at"], row["end_at"]

    async def set_proved(self, until: datetime) -> None:
        """Note that every hour before was proved."""
        await self._pool.execute(self.SET_PROVED, until)

    async def compare(self, start_at: datetime, end_at: datetime) -> list[Difference]:
        """Where the records of sealed hours and their buckets disagree: nowhere, or something is broken (B1)."""
        rows = await self._pool.fetch(
            self.COMPARE, start_at, end_at, lowest_id(start_at), lowest_id(end_at), timeout=300
        )
        return [Difference(**dict(row)) for row in rows]
