"""What is known of one request: its usage record and why it went where it went."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import asyncpg


class RequestStore:
    """Looks requests up; others write them."""

    FIND = """
        SELECT u.id, u.admitted_at, u.client_request_id, u.org_id, o.name AS org, u.environment_id,
               e.name AS environment, u.key_id, u.model, u.endpoint_kind, u.is_streamed, u.home_region, u.served_region,
               u.node_id, u.status, u.outcome, u.prompt_tokens, u.completion_tokens, u.cached_tokens, u.token_source,
               u.latency_ms, u.ttft_ms, u.list_price_microdollars, u.reservation_id,
               u.tries, u.continuations, d.decision::text AS decision
        FROM usage_records u
        LEFT JOIN request_decisions d ON d.id = u.id
        LEFT JOIN orgs o ON o.id = u.org_id
        LEFT JOIN environments e ON e.id = u.environment_id
        WHERE u.id = $1
    """
    WASTE = """
        SELECT node_id, served_region, reason, prompt_tokens, completion_tokens
        FROM usage_waste WHERE request_id = $1 ORDER BY attempt
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def find(self, request_id: UUID) -> dict[str, Any] | None:
        """The request's usage record with its names, and `decision`: a document, or None where none was kept."""
        row = await self._pool.fetchrow(self.FIND, request_id)
        if row is None:
            return None
        decision: str | None = row["decision"]
        waste = await self._pool.fetch(self.WASTE, request_id)
        return dict(row) | {
            "decision": None if decision is None else json.loads(decision),
            "waste": [dict(one) for one in waste],
        }
