"""Spot machines that clouds took back, and for how long the others have lived."""

from __future__ import annotations

from uuid import UUID

import asyncpg

from crosslogic.domain.spot import Place, Preemption


class PreemptionStore:
    """What hazards are learnt from. Written once per node, however often it is told."""

    # A migration of its own brings the columns cloud and zone of a node; without them its provider is its cloud.
    RECORD = """
        INSERT INTO preemptions AS p (node_id, cloud, region, zone, gpu, had_notice, lived_s)
        SELECT n.id, coalesce(nullif(to_jsonb(n) ->> 'cloud', ''), n.provider), n.region,
               coalesce(to_jsonb(n) ->> 'zone', ''), n.gpu, $2,
               greatest(0, extract(epoch FROM now() - coalesce(n.ready_at, n.created_at)))
        FROM nodes n WHERE n.id = $1 AND n.is_spot
        ON CONFLICT (node_id) DO UPDATE SET had_notice = TRUE WHERE excluded.had_notice AND NOT p.had_notice
    """
    SELECT_RECENT = """
        SELECT cloud, region, zone, gpu, at, had_notice, lived_s FROM preemptions
        WHERE at > now() - make_interval(days => $1) ORDER BY at DESC LIMIT $2
    """
    # Machine-hours within the window, of machines that came to serve.
    SELECT_EXPOSURE = """
        SELECT coalesce(nullif(to_jsonb(n) ->> 'cloud', ''), n.provider) AS cloud,
               coalesce(to_jsonb(n) ->> 'zone', '') AS zone, n.gpu,
               sum(extract(epoch FROM coalesce(n.ended_at, now())
                   - greatest(n.ready_at, now() - make_interval(days => $1))) / 3600)::float8 AS hours
        FROM nodes n
        WHERE n.is_spot AND n.ready_at IS NOT NULL
          AND (n.ended_at IS NULL OR n.ended_at > now() - make_interval(days => $1))
        GROUP BY 1, 2, 3
    """

    MOST = 100_000  # Preemptions that are read at once.

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def record(self, node_id: UUID, *, had_notice: bool) -> None:
        """Remember that the cloud took this node, or said that it will. Of a node that is no spot machine: nothing."""
        await self._pool.execute(self.RECORD, node_id, had_notice)

    async def list_recent(self, days: int) -> list[Preemption]:
        """The preemptions of the last days, newest first, at most `MOST`."""
        return [
            Preemption(
                Place(row["cloud"], row["zone"], row["gpu"]),
                row["region"],
                row["at"],
                row["had_notice"],
                row["lived_s"],
            )
            for row in await self._pool.fetch(self.SELECT_RECENT, days, self.MOST)
        ]

    async def exposure_hours(self, days: int) -> dict[Place, float]:
        """For how many hours spot machines of each place have served in the last days."""
        return {
            Place(row["cloud"], row["zone"], row["gpu"]): row["hours"]
            for row in await self._pool.fetch(self.SELECT_EXPOSURE, days)
        }
