"""Usage records' SQL: written once in batches, summed for those who ask."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from crosslogic.domain.errors import InvariantViolated
from crosslogic.domain.ids import unix_ms_of
from crosslogic.domain.usage import UsageRecord


class UsageStore:
    """The ledger's raw facts. A record is written once and never changed."""

    INSERT = """
        INSERT INTO usage_records (
            id, admitted_at, client_request_id, org_id, environment_id, key_id, home_region, served_region, model,
            node_id, endpoint_kind, is_streamed, prompt_tokens, completion_tokens, cached_tokens, token_source,
            latency_ms, ttft_ms, status, outcome, list_price_microdollars)
        SELECT id, to_timestamp(admitted_ms / 1000.0), client_request_id, org_id, environment_id, key_id, home_region,
               served_region, model, node_id, endpoint_kind, is_streamed, prompt_tokens, completion_tokens,
               cached_tokens, token_source, latency_ms, ttft_ms, status, outcome, list_price_microdollars
        FROM unnest($1::uuid[], $2::bigint[], $3::text[], $4::uuid[], $5::uuid[], $6::uuid[], $7::text[], $8::text[],
                    $9::text[], $10::uuid[], $11::text[], $12::bool[], $13::bigint[], $14::bigint[], $15::bigint[],
                    $16::text[], $17::int[], $18::int[], $19::int[], $20::text[], $21::bigint[])
             AS r (id, admitted_ms, client_request_id, org_id, environment_id, key_id, home_region, served_region,
                   model, node_id, endpoint_kind, is_streamed, prompt_tokens, completion_tokens, cached_tokens,
                   token_source, latency_ms, ttft_ms, status, outcome, list_price_microdollars)
        ON CONFLICT (id) DO NOTHING
    """

    SUM_ENVIRONMENT = """
        SELECT model, count(*) AS requests, sum(prompt_tokens)::bigint AS prompt_tokens,
               sum(completion_tokens)::bigint AS completion_tokens, sum(cached_tokens)::bigint AS cached_tokens
        FROM usage_records
        WHERE environment_id = $1 AND admitted_at >= $2 AND admitted_at < $3
        GROUP BY model ORDER BY model
    """

    SUM_BY = """
        SELECT sums.org_id, o.name AS org, sums.environment_id, e.name AS environment, sums.model, sums.day,
               sums.requests, sums.prompt_tokens, sums.completion_tokens, sums.cached_tokens
        FROM (
            SELECT CASE WHEN 'org' = ANY($1::text[]) THEN org_id END AS org_id,
                   CASE WHEN 'environment' = ANY($1) THEN environment_id END AS environment_id,
                   CASE WHEN 'model' = ANY($1) THEN model END AS model,
                   CASE WHEN 'day' = ANY($1) THEN (admitted_at AT TIME ZONE 'UTC')::date END AS day,
                   count(*) AS requests, sum(prompt_tokens)::bigint AS prompt_tokens,
                   sum(completion_tokens)::bigint AS completion_tokens, sum(cached_tokens)::bigint AS cached_tokens
            FROM usage_records
            WHERE admitted_at >= $2 AND admitted_at < $3 AND ($4::uuid IS NULL OR org_id = $4)
            GROUP BY 1, 2, 3, 4
        ) sums LEFT JOIN orgs o ON o.id = sums.org_id LEFT JOIN environments e ON e.id = sums.environment_id
        ORDER BY sums.day, o.name, e.name, sums.model LIMIT $5
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def add(self, records: Sequence[UsageRecord]) -> None:
        """Write records; those that are there already are left alone (A2, B2).

        Raises InvariantViolated when Postgres will never take one of them; then none was written.
        """
        rows = [
            (
                record.id,
                unix_ms_of(record.id),
                record.client_request_id.replace("\x00", ""),
                record.org_id,
                record.environment_id,
                record.key_id,
                record.home_region,
                record.served_region,
                record.model,
                record.node_id,
                record.endpoint_kind,
                record.is_streamed,
                record.prompt_tokens,
                record.completion_tokens,
                record.cached_tokens,
                record.token_source.value,
                record.latency_ms,
                record.ttft_ms,
                record.status,
                record.outcome.value,
                record.list_price_microdollars,
            )
            for record in records
        ]
        if rows:
            try:
                await self._pool.execute(self.INSERT, *(list(column) for column in zip(*rows, strict=True)))
            except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError) as error:
                raise InvariantViolated(f"Postgres refuses a usage record: {error}") from error

    async def sum_environment(self, environment_id: UUID, start_at: datetime, end_at: datetime) -> list[dict[str, Any]]:
        """Requests and tokens of one environment by model, admitted in [start_at, end_at)."""
        return [dict(row) for row in await self._pool.fetch(self.SUM_ENVIRONMENT, environment_id, start_at, end_at)]

    async def sum_by(
        self,
        dimensions: Sequence[str],
        start_at: datetime,
        end_at: datetime,
        *,
        org_id: UUID | None = None,
        limit: int = 10_000,
    ) -> list[dict[str, Any]]:
        """Requests and tokens admitted in [start_at, end_at), by any of `org`, `environment`, `model` and `day` (UTC).

        A dimension that is not asked for is None in every row.
        """
        rows = await self._pool.fetch(self.SUM_BY, list(dimensions), start_at, end_at, org_id, limit)
        return [dict(row) for row in rows]
