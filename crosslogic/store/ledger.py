"""The ledger's SQL: double entry, append only. Each transaction balances, which the database checks at commit.

Postings are made for an org's hour, not for a request: an hour's sum is derived from its buckets, those from its
records, and neither ever changes (docs/decisions/0023-postings-by-the-hour.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from crosslogic.domain.months import BillingMonth
from crosslogic.domain.pricing import TokenClass
from crosslogic.domain.rating import E10_PER_MICRODOLLAR, Bucket, RatedHour, Standing
from crosslogic.domain.reservation import HOUR
from crosslogic.store.usage import lowest_id

# Serialises those who rate; a number of ours.
_RATING_LOCK = 4_267_351_206


@dataclass(frozen=True, slots=True)
class Unrated:
    """An org's hour that has no price yet, and how its month stood before."""

    org_id: UUID
    hour: datetime
    standing: Standing
    buckets: list[Bucket] = field(default_factory=list[Bucket])


@dataclass(frozen=True, slots=True)
class Balance:
    """What an account holds, in its unit. `org_id` is None for our own."""

    org_id: UUID | None
    name: str
    unit: str
    amount: int


class LedgerStore:
    """Posts and sums. The sum over all accounts of a unit is always zero."""

    OPEN_SEALED_ACCOUNTS = """
        INSERT INTO ledger_accounts (org_id, name, unit)
        SELECT DISTINCT org_id, CASE WHEN reservation_id IS NULL THEN 'usage' ELSE 'reservation' END, 'tokens'
        FROM usage_buckets WHERE hour >= $1 AND hour < $2
        ON CONFLICT (org_id, name, unit) DO NOTHING
    """
    OPEN_SEALED = """
        INSERT INTO ledger_transactions (key, org_id, hour)
        SELECT DISTINCT 'seal/' || org_id || '/' || to_char(hour AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24'), org_id, hour
        FROM usage_buckets WHERE hour >= $1 AND hour < $2
    """
    POST_SEALED = """
        WITH sums AS (
            SELECT org_id, hour, CASE WHEN reservation_id IS NULL THEN 'usage' ELSE 'reservation' END AS name,
                   sum(tokens)::bigint AS tokens
            FROM usage_buckets WHERE hour >= $1 AND hour < $2 GROUP BY 1, 2, 3
        )
        INSERT INTO ledger_postings (transaction_id, account_id, amount)
        SELECT t.id, a.id, s.tokens
        FROM sums s
        JOIN ledger_transactions t
            ON t.key = 'seal/' || s.org_id || '/' || to_char(s.hour AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24')
        JOIN ledger_accounts a ON a.org_id = s.org_id AND a.name = s.name AND a.unit = 'tokens'
        UNION ALL
        SELECT t.id, a.id, -sum(s.tokens)::bigint
        FROM sums s
        JOIN ledger_transactions t
            ON t.key = 'seal/' || s.org_id || '/' || to_char(s.hour AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24')
        JOIN ledger_accounts a ON a.org_id IS NULL AND a.name = 'generated' AND a.unit = 'tokens'
        GROUP BY 1, 2
    """
    # What nodes did in these hours that nobody pays for; of late records with the hour that those are billed in.
    SUM_WASTE = """
        SELECT coalesce(sum(prompt_tokens + completion_tokens), 0)::bigint
        FROM (
            SELECT prompt_tokens, completion_tokens FROM usage_waste
            WHERE request_id >= $3 AND request_id < $4
              AND NOT EXISTS (SELECT FROM late_usage late WHERE late.request_id = usage_waste.request_id)
            UNION ALL
            SELECT prompt_tokens, completion_tokens FROM usage_waste JOIN late_usage USING (request_id)
            WHERE billed_hour >= $1 AND billed_hour < $2
        ) waste
    """
    OPEN_TRANSACTION = """
        INSERT INTO ledger_transactions (key, org_id, hour) VALUES ($1, $2, $3)
        ON CONFLICT (key) DO NOTHING RETURNING id
    """
    OPEN_ACCOUNT = """
        INSERT INTO ledger_accounts (org_id, name, unit) VALUES ($1, $2, $3) ON CONFLICT (org_id, name, unit) DO NOTHING
    """
    POST = """
        INSERT INTO ledger_postings (transaction_id, account_id, amount)
        SELECT $1, id, $5 FROM ledger_accounts WHERE org_id IS NOT DISTINCT FROM $2 AND name = $3 AND unit = $4
    """

    LOCK_RATING = "SELECT pg_advisory_xact_lock($1)"
    NEXT_UNRATED_HOUR = """
        SELECT min(hour) FROM usage_buckets, usage_horizon
        WHERE hour >= rated_until AND hour < sealed_until
    """
    UNRATED = """
        SELECT o.org_id, coalesce(r.volume_tokens, 0) AS volume_tokens, coalesce(r.exact_e10, 0) AS exact_e10
        FROM (
            SELECT DISTINCT b.org_id FROM usage_buckets b
            WHERE b.hour = $1
              AND NOT EXISTS (SELECT FROM rated_hours known WHERE known.org_id = b.org_id AND known.hour = b.hour)
            ORDER BY b.org_id LIMIT $3
        ) o
        LEFT JOIN LATERAL (
            SELECT volume_tokens, exact_e10 FROM rated_hours
            WHERE org_id = o.org_id AND hour >= $2 AND hour < $1 ORDER BY hour DESC LIMIT 1
        ) r ON TRUE
        ORDER BY o.org_id
    """
    BUCKETS_OF_HOUR = """
        SELECT org_id, hour, model, region, token_class, plan, tokens, reservation_id
        FROM usage_buckets WHERE hour = $1 AND org_id = ANY($2::uuid[])
    """
    INSERT_RATED = """
        INSERT INTO rated_hours (org_id, hour, microdollars, volume_tokens, exact_e10, price_book)
        VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (org_id, hour) DO NOTHING RETURNING hour
    """
    SET_RATED = """
        UPDATE usage_horizon SET rated_until = $1 WHERE rated_until < $1 AND $1 <= sealed_until
    """
    SET_ALL_RATED = """
        UPDATE usage_horizon SET rated_until = sealed_until
        WHERE rated_until < sealed_until AND NOT EXISTS (SELECT FROM usage_buckets WHERE hour >= rated_until)
    """

    BALANCES = """
        SELECT a.org_id, a.name, a.unit, coalesce(sum(p.amount), 0) AS amount
        FROM ledger_accounts a LEFT JOIN ledger_postings p ON p.account_id = a.id
        WHERE $1 OR a.org_id IS NOT DISTINCT FROM $2
        GROUP BY a.id ORDER BY a.org_id NULLS FIRST, a.unit, a.name LIMIT $3
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    @classmethod
    async def post_sealed(cls, connection: Any, start_at: datetime, end_at: datetime) -> None:
        """Post the tokens of hours that are sealed within the caller's transaction: an org's, and what was wasted."""
        await connection.execute(cls.OPEN_SEALED_ACCOUNTS, start_at, end_at)
        await connection.execute(cls.OPEN_SEALED, start_at, end_at)
        await connection.execute(cls.POST_SEALED, start_at, end_at)
        waste = await connection.fetchval(cls.SUM_WASTE, start_at, end_at, lowest_id(start_at), lowest_id(end_at))
        last = end_at - HOUR
        await cls._post(
            connection, f"waste/{last:%Y-%m-%dT%H}", None, last, [(None, "waste", "tokens", waste),
                                                                    (None, "generated", "tokens", -waste)]
        )  # fmt: skip

    @classmethod
    async def _post(
        cls,
        connection: Any,
        key: str,
        org_id: UUID | None,
        hour: datetime,
        postings: Sequence[tuple[UUID | None, str, str, int]],
    ) -> None:
        """One transaction of (org, account, unit, amount); nothing where it is posted already, or nothing is moved."""
        postings = [posting for posting in postings if posting[3]]
        if not postings or (opened := await connection.fetchval(cls.OPEN_TRANSACTION, key, org_id, hour)) is None:
            return
        await connection.executemany(cls.OPEN_ACCOUNT, [posting[:3] for posting in postings if posting[0] is not None])
        await connection.executemany(cls.POST, [(opened, *posting) for posting in postings])

    async def unrated(self, most: int) -> list[Unrated]:
        """Orgs of the oldest hour that is sealed and has orgs without a price; empty when all is rated."""
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            hour = await connection.fetchval(self.NEXT_UNRATED_HOUR)
            if hour is None:
                return []
            month = BillingMonth.of(hour)
            found = {
                row["org_id"]: Unrated(row["org_id"], hour, Standing(row["volume_tokens"], row["exact_e10"]))
                for row in await connection.fetch(self.UNRATED, hour, month.starts_at, most)
            }
            for row in await connection.fetch(self.BUCKETS_OF_HOUR, hour, list(found)):
                found[row["org_id"]].buckets.append(bucket_of(row))
        if not found:
            # The hour is rated to the last org.
            await self._pool.execute(self.SET_RATED, hour + HOUR)
            return await self.unrated(most)
        return list(found.values())

    async def all_rated(self) -> None:
        """Note that what is sealed is rated, where no sealed hour with usage is left."""
        await self._pool.execute(self.SET_ALL_RATED)

    async def add_rated(self, rated: Sequence[tuple[UUID, RatedHour, str]]) -> None:
        """Write what hours cost, each by which price book, and post it. One that is rated already is left alone."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(self.LOCK_RATING, _RATING_LOCK)
            for org_id, hour, book in rated:
                after = hour.after
                is_new = await connection.fetchval(
                    self.INSERT_RATED,
                    org_id,
                    hour.hour,
                    hour.microdollars,
                    after.volume_tokens,
                    after.exact_e10,
                    book,
                )
                if is_new is not None:
                    await self._post(
                        connection, f"rate/{org_id}/{hour.hour:%Y-%m-%dT%H}", org_id, hour.hour, _postings(org_id, hour)
                    )

    async def balances(self, org_id: UUID | None = None, *, of_all: bool = False, limit: int = 10_000) -> list[Balance]:
        """An org's accounts, or (None) our own; or those of everybody."""
        rows = await self._pool.fetch(self.BALANCES, of_all, org_id, limit)
        return [Balance(row["org_id"], row["name"], row["unit"], int(row["amount"])) for row in rows]


def bucket_of(row: asyncpg.Record) -> Bucket:
    """A bucket from a row that has its columns."""
    return Bucket(
        row["hour"],
        row["model"],
        row["region"],
        TokenClass(row["token_class"]),
        row["plan"],
        row["tokens"],
        row["reservation_id"],
    )


def _postings(org_id: UUID, rated: RatedHour) -> list[tuple[UUID | None, str, str, int]]:
    """What is posted for a rated hour: its charge, and how that came from list prices."""
    charge_e10 = rated.microdollars * E10_PER_MICRODOLLAR
    exact_e10 = rated.after.exact_e10 - rated.before.exact_e10
    return [
        (org_id, "receivable", "e10_usd", charge_e10),
        (org_id, "discounts", "e10_usd", rated.list_e10 - exact_e10),
        (None, "rounding", "e10_usd", exact_e10 - charge_e10),
        (None, "revenue", "e10_usd", -rated.list_e10),
        (org_id, "free_allowance", "tokens", rated.free_tokens),
        (org_id, "usage", "tokens", -rated.free_tokens),
    ]
