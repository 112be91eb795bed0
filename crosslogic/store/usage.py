"""Usage records' SQL: written once in batches, summed for those who ask."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import asyncpg
import msgspec

from crosslogic.domain.errors import InvariantViolated, Rejected
from crosslogic.domain.ids import unix_ms_of, uuid7
from crosslogic.domain.months import hour_of
from crosslogic.domain.reservation import HOUR
from crosslogic.domain.usage import UsageRecord

# How long it can be asked why a request went where it went.
DECISIONS_KEPT = timedelta(days=7)
PRUNED_AT_ONCE = 5000
# A NUL character in JSON, or an escaped backslash before "u0000": worth a look.
_NUL = b"\\u0000"
_REFUSALS = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, UnicodeDecodeError)

EPOCH = datetime.fromtimestamp(0, UTC)


class _Identified(msgspec.Struct):
    """The id of a record; the rest is not looked at."""

    id: UUID


_decode_id = msgspec.json.Decoder(_Identified).decode


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

    # Whole hours are read from their sums, what lies before and behind them from the records.
    SUM_ENVIRONMENT = """
        SELECT model, sum(requests)::bigint AS requests, sum(prompt_tokens)::bigint AS prompt_tokens,
               sum(completion_tokens)::bigint AS completion_tokens, sum(cached_tokens)::bigint AS cached_tokens
        FROM (
            SELECT model, requests, prompt_tokens, completion_tokens, cached_tokens
            FROM usage_hours WHERE environment_id = $1 AND hour >= $3 AND hour < $4
            UNION ALL
            SELECT model, 1, prompt_tokens, completion_tokens, cached_tokens
            FROM usage_records
            WHERE environment_id = $1
              AND (admitted_at >= $2 AND admitted_at < $3 AND id >= $6 AND id < $7
                   OR admitted_at >= $4 AND admitted_at < $5 AND id >= $8 AND id < $9)
        ) parts
        GROUP BY model ORDER BY model
    """

    SUM_BY = """
        SELECT sums.org_id, o.name AS org, sums.environment_id, e.name AS environment, sums.model, sums.day,
               sums.requests, sums.prompt_tokens, sums.completion_tokens, sums.cached_tokens
        FROM (
            SELECT CASE WHEN 'org' = ANY($1::text[]) THEN org_id END AS org_id,
                   CASE WHEN 'environment' = ANY($1) THEN environment_id END AS environment_id,
                   CASE WHEN 'model' = ANY($1) THEN model END AS model,
                   CASE WHEN 'day' = ANY($1) THEN (at AT TIME ZONE 'UTC')::date END AS day,
                   sum(requests)::bigint AS requests, sum(prompt_tokens)::bigint AS prompt_tokens,
                   sum(completion_tokens)::bigint AS completion_tokens, sum(cached_tokens)::bigint AS cached_tokens
            FROM (
                SELECT org_id, environment_id, model, hour AS at, requests, prompt_tokens, completion_tokens,
                       cached_tokens
                FROM usage_hours WHERE hour >= $3 AND hour < $4 AND ($10::uuid IS NULL OR org_id = $10)
                UNION ALL
                SELECT org_id, environment_id, model, admitted_at, 1, prompt_tokens, completion_tokens, cached_tokens
                FROM usage_records
                WHERE ($10::uuid IS NULL OR org_id = $10)
                  AND (admitted_at >= $2 AND admitted_at < $3 AND id >= $6 AND id < $7
                       OR admitted_at >= $4 AND admitted_at < $5 AND id >= $8 AND id < $9)
            ) parts
            GROUP BY 1, 2, 3, 4
        ) sums LEFT JOIN orgs o ON o.id = sums.org_id LEFT JOIN environments e ON e.id = sums.environment_id
        ORDER BY sums.day, o.name, e.name, sums.model LIMIT $11
    """

    ADD_PARTITIONS = "SELECT count(add_usage_partition(at)) FROM unnest($1::timestamptz[]) at"

    # Oldest first, from behind an id; `billed_hour` only of those that came late.
    EXPORT = """
        SELECT r.id, r.client_request_id, r.org_id, r.environment_id, r.key_id, r.reservation_id, r.home_region,
               r.served_region, r.model, r.node_id, r.endpoint_kind, r.is_streamed, r.prompt_tokens,
               r.completion_tokens, r.cached_tokens, r.token_source, r.latency_ms, r.ttft_ms, r.status, r.outcome,
               r.list_price_microdollars, r.tries, r.continuations, late.billed_hour
        FROM usage_records r LEFT JOIN late_usage late ON late.request_id = r.id
        WHERE r.id >= $1 AND r.id < $2 AND ($3::uuid IS NULL OR r.id > $3) AND ($4::uuid IS NULL OR r.org_id = $4)
        ORDER BY r.id LIMIT $5
    """
    # A late record of another installation keeps the hour that it was billed in there, unless that is sealed here.
    KEEP_HOURS = """
        INSERT INTO late_usage (request_id, billed_hour)
        SELECT id, billed_hour FROM ROWS FROM (unnest($1::uuid[]), unnest($2::timestamptz[])) AS given (id, billed_hour)
        WHERE billed_hour >= (SELECT sealed_until FROM usage_horizon FOR SHARE)
          AND NOT EXISTS (SELECT FROM usage_records known WHERE known.id = given.id)
        ON CONFLICT (request_id) DO NOTHING
    """
    FIND_KNOWN = "SELECT id FROM usage_records WHERE id = ANY($1::uuid[])"

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def add(self, payloads: Sequence[bytes]) -> None:
        """Write records, each the JSON of a UsageRecord; those that are there already are left alone (A2, B2).

        Their waste and decisions come with them. Raises InvariantViolated when Postgres will never take one of them;
        then none was written.
        """
        if not payloads:
            return
        try:
            await self._pool.execute(self.ADD, _document(payloads))
        except asyncpg.CheckViolationError as error:
            if error.constraint_name is not None:
                raise InvariantViolated(f"Postgres refuses a usage record: {error}") from error
            # Nobody has made their month's partition yet.
            await self.add_partitions([_admitted_at(payload) for payload in payloads])
            await self._add_again(payloads)
        except _REFUSALS as error:
            raise InvariantViolated(f"Postgres refuses a usage record: {error}") from error

    async def _add_again(self, payloads: Sequence[bytes]) -> None:
        try:
            await self._pool.execute(self.ADD, _document(payloads))
        except _REFUSALS as error:
            raise InvariantViolated(f"Postgres refuses a usage record: {error}") from error

    async def add_partitions(self, instants: Sequence[datetime]) -> None:
        """See to it that there is a partition for every month that these lie in."""
        months = {(at.year, at.month): at for at in (at.astimezone(UTC) for at in instants)}
        await self._pool.execute(self.ADD_PARTITIONS, list(months.values()))

    async def take(self, records: Sequence[tuple[UsageRecord, datetime | None]]) -> int:
        """Write records that come from elsewhere, each with the hour it was billed in there if it came late.

        How many were new; those whose id is known are left alone. Raises Rejected when one can never be stored; then
        none was written.
        """
        given = [record.id for record, _ in records]
        await self.add_partitions([datetime.fromtimestamp(unix_ms_of(id) / 1000, UTC) for id in given])
        late = [(record.id, hour) for record, hour in records if hour is not None]
        try:
            async with self._pool.acquire() as connection, connection.transaction():
                known = {row["id"] for row in await connection.fetch(self.FIND_KNOWN, given)}
                await connection.execute(self.KEEP_HOURS, [id for id, _ in late], [hour for _, hour in late])
                await connection.execute(self.ADD, _document([msgspec.json.encode(record) for record, _ in records]))
        except _REFUSALS as error:
            raise Rejected(f"A record cannot be stored: {error}", code="invalid_usage", param="records") from error
        return len(set(given) - known)

    async def export(
        self, start_at: datetime, end_at: datetime, *, after: UUID | None = None, org_id: UUID | None = None, limit: int
    ) -> list[dict[str, Any]]:
        """Records admitted in [start_at, end_at), oldest first, as `take` wants them."""
        rows = await self._pool.fetch(self.EXPORT, lowest_id(start_at), lowest_id(end_at), after, org_id, limit)
        return [dict(row) for row in rows]

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
        rows = await self._pool.fetch(self.SUM_ENVIRONMENT, environment_id, *_parts(start_at, end_at))
        return [dict(row) for row in rows]

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
        rows = await self._pool.fetch(self.SUM_BY, list(dimensions), *_parts(start_at, end_at), org_id, limit)
        return [dict(row) for row in rows]


def lowest_id(at: datetime) -> UUID:
    """The lowest id of a request that was admitted at this instant or later; ids know milliseconds."""
    return uuid7(-((EPOCH - at) // timedelta(milliseconds=1)), 0)


def _parts(start_at: datetime, end_at: datetime) -> tuple[Any, ...]:
    """A span as what precedes its whole hours, those, and what follows: four instants, and the ids of both edges."""
    first = min(hour_of(start_at + HOUR - timedelta.resolution), end_at)
    last = max(hour_of(end_at), first)
    edges = ((start_at, first), (last, end_at))
    return start_at, first, last, end_at, *(lowest_id(at) for edge in edges for at in edge)


def _admitted_at(payload: bytes) -> datetime:
    return datetime.fromtimestamp(unix_ms_of(_decode_id(payload).id) / 1000, UTC)


def _document(payloads: Sequence[bytes]) -> str:
    document = b"[" + b",".join(payloads) + b"]"
    if _NUL in document:
        document = _without_nul(document)
    return document.decode()


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
