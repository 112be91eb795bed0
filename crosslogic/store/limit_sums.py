"""What limits count, summed from usage records: for counters that were lost."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID

import asyncpg

from crosslogic.domain.ids import REQUEST, encode, uuid7
from crosslogic.domain.limits import (
    DAY,
    DAY_TOKENS,
    DEFAULTS,
    MINUTE,
    MINUTE_TOKENS,
    REQUESTS,
    SPEND,
    LayerLimits,
    Month,
    Sum,
)
from crosslogic.domain.tenancy import GLOBAL_SUBJECT, LimitRow


class LimitSums:
    """Reads the ledger as the limits see it: what was released (our failures) is not in it, what is paid flat by a
    reservation counts as a request only. A minute is summed from records, whose ids carry the admission time, so that
    their index finds it; days and months from sums by hour.
    """

    SELECT_LIMITS = """
        SELECT layer, subject_id, requests_per_min, tokens_per_min, tokens_per_day, concurrency,
               monthly_spend_microdollars
        FROM limits
    """

    # One row for each subject and bucket; of its five columns of ids one is set, none for everybody.
    SUM_MINUTES = """
        SELECT key_id, environment_id, org_id, reservation_id, bucket, GROUPING(reservation_id) = 0 AS is_reservation,
               count(*) AS requests,
               coalesce(sum(tokens) FILTER (WHERE reservation_id IS NULL), 0)::bigint AS serverless_tokens,
               sum(tokens)::bigint AS tokens
        FROM (
            SELECT key_id, environment_id, org_id, reservation_id, prompt_tokens + completion_tokens AS tokens,
                   floor(extract(epoch FROM admitted_at) * 1000 / $3::bigint)::bigint AS bucket
            FROM usage_records
            WHERE id >= $1 AND id < $4 AND outcome NOT IN ('failed', 'cut') AND id <> ALL($2::uuid[])
        ) counted
        GROUP BY GROUPING SETS ((key_id, bucket), (environment_id, bucket), (org_id, bucket), (reservation_id, bucket),
                                (bucket))
    """
    # From the sums that are kept by hour, less the few records that do not count.
    SUM_HOURS = """
        SELECT key_id, environment_id, org_id, bucket, sum(tokens)::bigint AS tokens
        FROM (
            SELECT key_id, environment_id, org_id, prompt_tokens + completion_tokens AS tokens,
                   floor(extract(epoch FROM hour) * 1000 / $3::bigint)::bigint AS bucket
            FROM usage_hours
            WHERE hour >= $1 AND reservation_id IS NULL
            UNION ALL
            SELECT key_id, environment_id, org_id, -(prompt_tokens + completion_tokens),
                   floor(extract(epoch FROM admitted_at) * 1000 / $3::bigint)::bigint
            FROM usage_records
            WHERE (id >= $4 OR id = ANY($2::uuid[])) AND admitted_at >= $1 AND reservation_id IS NULL
              AND outcome NOT IN ('failed', 'cut')
        ) counted
        GROUP BY GROUPING SETS ((key_id, bucket), (environment_id, bucket), (org_id, bucket), (bucket))
        HAVING sum(tokens) > 0
    """
    # What was rated, and list_price_microdollars of the hours since: an estimate, here as in every hold.
    SUM_MONTH = """
        SELECT org_id, sum(spend)::bigint AS spend
        FROM (
            SELECT org_id, microdollars AS spend
            FROM rated_hours
            WHERE org_id = ANY($3::uuid[]) AND hour >= $1 AND hour < (SELECT rated_until FROM usage_horizon)
            UNION ALL
            SELECT org_id, list_price_microdollars
            FROM usage_hours
            WHERE org_id = ANY($3) AND billed_hour >= greatest($1, (SELECT rated_until FROM usage_horizon))
              AND reservation_id IS NULL
            UNION ALL
            SELECT org_id, -list_price_microdollars
            FROM usage_records
            WHERE (id >= $4 OR id = ANY($2::uuid[])) AND org_id = ANY($3) AND reservation_id IS NULL
              AND admitted_at >= greatest($1, (SELECT rated_until FROM usage_horizon))
              AND outcome NOT IN ('failed', 'cut')
        ) spent
        GROUP BY org_id
        HAVING sum(spend) > 0
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def read(self, now_ms: int, before_ms: int, without: Sequence[str]) -> list[Sum]:
        """What counts at `now_ms` for every limited subject and meter.

        Of requests admitted before `before_ms`, and without those of these shown ids.
        """
        before = _lowest_id(before_ms)
        left_out = [REQUEST.parse(shown) for shown in without]
        month = Month.at(now_ms)
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            limits = {
                (row["layer"], row["subject_id"]): LayerLimits.of(LimitRow(**dict(row)))
                for row in await connection.fetch(self.SELECT_LIMITS)
            }

            def limits_of(layer: str, subject_id: UUID) -> LayerLimits:
                return limits.get((layer, subject_id)) or DEFAULTS[layer]

            since = _lowest_id(MINUTE.oldest(now_ms) * MINUTE.bucket_ms)
            minutes = await connection.fetch(self.SUM_MINUTES, since, left_out, MINUTE.bucket_ms, before)
            since = _instant(DAY.oldest(now_ms) * DAY.bucket_ms)
            hours = await connection.fetch(self.SUM_HOURS, since, left_out, DAY.bucket_ms, before)
            capped = [
                subject_id
                for (layer, subject_id), found in limits.items()
                if layer == "org" and found.monthly_spend_microdollars is not None
            ]
            months = await connection.fetch(self.SUM_MONTH, _instant(month.starts_ms), left_out, capped, before)
        sums: list[Sum] = []
        for row in minutes:
            if row["is_reservation"]:
                if row["reservation_id"] is not None:
                    name = f"reservation:{encode(row['reservation_id'])}"
                    sums.append(Sum(name, MINUTE_TOKENS, row["bucket"], row["tokens"]))
                continue
            layer, subject_id = _subject(row)
            found = limits_of(layer, subject_id)
            name = f"{layer}:{encode(subject_id)}"
            if found.requests_per_min is not None:
                sums.append(Sum(name, REQUESTS, row["bucket"], row["requests"]))
            if found.tokens_per_min is not None:
                sums.append(Sum(name, MINUTE_TOKENS, row["bucket"], row["serverless_tokens"]))
        for row in hours:
            layer, subject_id = _subject(row)
            if limits_of(layer, subject_id).tokens_per_day is not None:
                sums.append(Sum(f"{layer}:{encode(subject_id)}", DAY_TOKENS, row["bucket"], row["tokens"]))
        sums += [Sum(f"org:{encode(row['org_id'])}", SPEND, month.number, row["spend"]) for row in months]
        return sums


def _subject(row: asyncpg.Record) -> tuple[str, UUID]:
    for layer in ("key", "environment", "org"):
        if row[f"{layer}_id"] is not None:
            return layer, row[f"{layer}_id"]
    return "global", GLOBAL_SUBJECT


def _instant(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms / 1000, UTC)


def _lowest_id(at_ms: int) -> UUID:
    return uuid7(at_ms, 0)
