"""Sweeps of the clouds: what each found and did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg

from crosslogic.contracts.sweep import FleetSweepResult
from crosslogic.domain.ids import NODE, SWEEP, unix_ms_of

# A sweep that found nothing says nothing any more after this.
UNEVENTFUL_DAYS = 30


class SweepStore:
    """Written once by the sweep itself, read by operators. Sweeps with findings are kept for ever."""

    INSERT = """
        INSERT INTO sweeps (id, started_at, provider, is_dry_run, machines, created, owned, ending, destroyed,
                            foreign_machines, missing, unexplained, unasked)
        SELECT $1, $2, $3, $4, $5,
               (SELECT count(*) FROM nodes
                WHERE created_at <= $2
                  AND created_at > coalesce((SELECT max(started_at) FROM sweeps WHERE started_at < $2), '-infinity')),
               $6, $7, $8, $9, $10, $11, $12
        ON CONFLICT (id) DO NOTHING
    """
    INSERT_FINDING = """
        INSERT INTO sweep_findings (sweep_id, provider, cluster, standing, node_id, reason, outcome)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        ON CONFLICT (sweep_id, provider, cluster) DO NOTHING
    """
    FORGET = """
        DELETE FROM sweeps s
        WHERE s.ended_at < now() - make_interval(days => $1)
          AND NOT EXISTS (SELECT 1 FROM sweep_findings f WHERE f.sweep_id = s.id)
    """
    SELECT_CREATED = "SELECT created FROM sweeps WHERE id = $1"
    SELECT_PAGE = """
        SELECT * FROM sweeps
        WHERE ($1::uuid IS NULL OR id < $1)
          AND (NOT $2 OR EXISTS (SELECT 1 FROM sweep_findings f WHERE f.sweep_id = sweeps.id))
        ORDER BY id DESC LIMIT $3
    """
    SELECT_LAST = "SELECT * FROM sweeps WHERE provider = '' AND NOT is_dry_run ORDER BY id DESC LIMIT 1"
    SELECT_FINDINGS = """
        SELECT * FROM sweep_findings WHERE sweep_id = ANY($1::uuid[]) ORDER BY sweep_id, provider, cluster
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def record(self, swept: FleetSweepResult) -> FleetSweepResult:
        """Write a sweep and its findings down, once per id; it comes back with `created` filled in."""
        sweep_id = SWEEP.parse(swept.sweep_id)
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(
                self.INSERT,
                sweep_id,
                datetime.fromtimestamp(unix_ms_of(sweep_id) / 1000, UTC),
                swept.provider,
                swept.dry_run,
                swept.machines,
                swept.owned,
                swept.ending,
                swept.destroyed,
                swept.foreign,
                swept.missing,
                swept.unexplained,
                swept.unasked,
            )
            await connection.executemany(
                self.INSERT_FINDING,
                [
                    (
                        sweep_id,
                        found.provider,
                        found.cluster,
                        found.standing,
                        NODE.parse(found.node_id) if found.node_id else None,
                        found.reason,
                        found.outcome,
                    )
                    for found in swept.findings
                ],
            )
            await connection.execute(self.FORGET, UNEVENTFUL_DAYS)
            created: int = await connection.fetchval(self.SELECT_CREATED, sweep_id)
        return replace(swept, created=created)

    async def list_page(
        self, *, with_findings_only: bool = False, before: UUID | None = None, limit: int = 50
    ) -> list[dict[str, Any]]:
        """Sweeps, newest first, with an id below `before`; each with its `findings`."""
        rows = await self._pool.fetch(self.SELECT_PAGE, before, with_findings_only, limit)
        findings = await self._pool.fetch(self.SELECT_FINDINGS, [row["id"] for row in rows])
        return [dict(row) | {"findings": _of(row["id"], findings)} for row in rows]

    async def find_last(self) -> dict[str, Any] | None:
        """The newest sweep of every cloud that was not a dry run, without its findings; None if there was none."""
        row = await self._pool.fetchrow(self.SELECT_LAST)
        return None if row is None else dict(row)


def _of(sweep_id: UUID, findings: Sequence[asyncpg.Record]) -> list[dict[str, Any]]:
    return [dict(found) for found in findings if found["sweep_id"] == sweep_id]
