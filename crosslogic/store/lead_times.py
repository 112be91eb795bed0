"""How long the phases of nodes' starts took. The rows are written by a trigger wherever a node's state moves on."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import asyncpg

from crosslogic.domain.lead_time import LeadTimes, Phase, PhaseSample

# What is older says little about a cloud of today.
MEMORY_DAYS = 90
MOST_ROWS = 10_000


class LeadTimeStore:
    """Reads what was learnt."""

    SELECT_RECENT = """
        SELECT phase, seconds, cloud, gpu, model FROM node_phases
        WHERE phase = ANY($1::text[]) ORDER BY at DESC LIMIT $2
    """
    SELECT_OF_NODES = "SELECT node_id, phase, seconds FROM node_phases WHERE node_id = ANY($1::uuid[])"
    PRUNE = "DELETE FROM node_phases WHERE at < now() - make_interval(days => $1)"

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def load(self) -> LeadTimes:
        """The newest `MOST_ROWS` phases."""
        rows = await self._pool.fetch(self.SELECT_RECENT, list(Phase), MOST_ROWS)
        return LeadTimes(
            PhaseSample(Phase(row["phase"]), row["seconds"], row["cloud"], row["gpu"], row["model"]) for row in rows
        )

    async def ended_phases(self, node_ids: Sequence[UUID]) -> dict[UUID, dict[Phase, float]]:
        """How long the phases of these nodes took that have ended; nodes without any are left out."""
        ended: dict[UUID, dict[Phase, float]] = {}
        for row in await self._pool.fetch(self.SELECT_OF_NODES, list(node_ids)):
            if row["phase"] in list(Phase):
                ended.setdefault(row["node_id"], {})[Phase(row["phase"])] = row["seconds"]
        return ended

    async def prune(self) -> None:
        """Forget what is older than `MEMORY_DAYS`."""
        await self._pool.execute(self.PRUNE, MEMORY_DAYS)
