"""Usage records' SQL: written once in batches, summed for those who ask."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, cast
from uuid import UUID

import asyncpg
import msgspec

from crosslogic.domain.errors import InvariantViolated
from crosslogic.domain.ids import uuid7

# How long it can be asked why a request went where it went.
DECISIONS_KEPT = timedelta(days=7)
PRUNED_AT_ONCE = 5000
# A NUL character in JSON, or an escaped backslash before "u0000": worth a look.
_NUL = b"\\u0000"


class UsageStore:
    """The ledger's raw facts. A record is written once and never changed."""

    # One parameter and one statement for records, waste and decisions: the three are there together or not at all, and
    # waste and decision only with the record that was the first of its id. As `json`, not `jsonb`: it is read once.
    ADD = """
        WITH given AS MATERIALIZED (
            SELECT DISTINCT ON (id) *
            FROM ROWS FROM (json_to_recordset($1::json) AS (
                id UUID, client_request_id TEXT, org_id UUID, environment_id UUID, key_id UUID, reservation_id UUID,
                home_region TEXT, served_region TEXT, model TEXT, node_id UUID, endpoint_kind TEXT, is_streamed BOOLEAN,
                prompt_tokens BIGINT, completion_tokens BIGINT, cached_tokens BIGINT, token_source TEXT,
                latency_ms INTEGER, ttft_ms INTEGER, status INTEGER, outcome TEXT, list_price_microdollars BIGINT,
                tries INTEGER, continuations INTEGER, waste JSON, decision JSONB
            )) WITH ORDINALITY AS r (
                id, client_request_id, org_id, environment_id, key_id, reservation_id,
                home_region, served_region, model, node_id, endpoint_kind, is_streamed,
                prompt_tokens, completion_tokens, cached_tokens, token_source,
                latency_ms, ttft_ms, status, outcome, list_price_microdollars,
                tries, continuations, waste, decision, position)
            ORDER BY id, position
        ), added AS (
            INSERT INTO usage_records (
                id, admitted_at, client_request_id, org_id, environment_id, key_id, reservation_id, home_region,
                served_region, model, node_id, endpoint_kind, is_streamed, prompt_tokens, completion_tokens,
                cached_tokens, token_source, latency_ms, ttft_ms, status, outcome, list_price_microdollars, tries,
                continuations)
            SELECT id,
                   -- The first 48 bits of a UUIDv7 are its Unix time in milliseconds.
                   'epoch'::timestamptz
                       + ('x' || left(translate(id::text, '-', ''), 12))::bit(48)::bigint * interval '1 ms',
                   client_request_id, org_id, environment_id, key_id, reservation_id, home_region, served_region, model,
                   node_id, endpoint_kind, is_streamed, prompt_tokens, completion_tokens, cached_tokens, token_source,
                   latency_ms, ttft_ms, status, outcome, list_price_microdollars, coalesce(tries, 0),
                   coalesce(continuations, 0)
            FROM given
            ON CONFLICT (id) DO NOTHING
            RETURNING id
        ), wasted AS (
            INSERT INTO usage_waste (
                request_id, attempt, node_id, served_region, model, reason, prompt_tokens, completion_tokens)
            SELECT given.id, w.attempt, w.node_id, w.region, given.model, w.reason, w.prompt_tokens, w.completion_tokens
            FROM given JOIN added USING (id), ROWS FROM (json_to_recordset(given.waste) AS (
                node_id UUID, region TEXT, reason TEXT, prompt_tokens BIGINT, completion_tokens BIGINT
            )) WITH ORDINALITY AS w (node_id, region, reason, prompt_tokens, completion_tokens, attempt)
            ON CONFLICT (request_id, attempt) DO NOTHING
        )
        INSERT INTO request_decisions (id, decision)
        SELECT id, decision FROM given JOIN added USING (id) WHERE decision IS NOT NULL
        ON CONFLICT (id) DO NOTHING
    """

    PRUNE_DECISIONS = """
        DELETE FROM request_decisions
        WHERE id IN (SELECT id FROM request_decisions WHERE id < $1 ORDER BY id LIMIT $2)
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

    async def add(self, payloads: Sequence[bytes]) -> None:
        """Write records, each the JSON of a UsageRecord; those that are there already are left alone (A2, B2).

        Their waste and decisions come with them. Raises InvariantViolated when Postgres will never take one of them;
        then none was written.
        """
        if not payloads:
            return
        document = b"[" + b",".join(payloads) + b"]"
        if _NUL in document:
            document = _without_nul(document)
        try:
            await self._pool.execute(self.ADD, document.decode())
        except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, UnicodeDecodeError) as error:
            raise InvariantViolated(f"Postgres refuses a usage record: {error}") from error

    async def prune_decisions(self, now: datetime) -> int:
        """Delete the decisions of requests that were admitted more than a week ago; how many they were."""
        until = uuid7(int((now - DECISIONS_KEPT).timestamp() * 1000), 0)
        pruned = 0
        while True:
            # In small statements, so that none holds its locks for long.
            deleted = int((await self._pool.execute(self.PRUNE_DECISIONS, until, PRUNED_AT_ONCE)).split()[-1])
            pruned += deleted
            if deleted < PRUNED_AT_ONCE:
                return pruned

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


def _without_nul(document: bytes) -> bytes:
    """The same JSON without NUL characters, which Postgres has no place for in text."""
    return msgspec.json.encode(_strip(msgspec.json.decode(document)))


def _strip(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\x00", "")
    if isinstance(value, list):
        return [_strip(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {_strip(name): _strip(item) for name, item in cast("dict[str, Any]", value).items()}
    return value
