"""What the autoscaler decided, and why, for `MEMORY_DAYS`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import asyncpg

from crosslogic.domain.autoscaling import RegionPlan

MEMORY_DAYS = 7
# A decision that repeats the one before is written so often all the same, as a sign of life.
REPEAT_S = 300


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """One decision about one region of a deployment."""

    deployment: str
    region: str
    at: datetime
    desired: int
    needed: int | None
    present: int
    serving: int
    ordered: int
    drained: int
    reason: str


class ScalingStore:
    """Writes decisions and reads the last ones."""

    RECORD = """
        INSERT INTO scaling_decisions (deployment, region, desired, needed, present, serving, ordered, drained, reason)
        SELECT $1, $2, $3::integer, $4::integer, $5::integer, $6::integer, $7::integer, $8::integer, $9
        WHERE $7::integer + $8::integer > 0 OR NOT EXISTS (
            SELECT FROM (
                SELECT * FROM scaling_decisions WHERE deployment = $1 AND region = $2 ORDER BY at DESC LIMIT 1
            ) last
            WHERE (last.desired, last.present, last.serving) = ($3, $5, $6)
              AND last.needed IS NOT DISTINCT FROM $4 AND last.at > now() - make_interval(secs => $10)
        )
    """
    PRUNE = "DELETE FROM scaling_decisions WHERE at < now() - make_interval(days => $1)"
    LIST = """
        SELECT deployment, region, at, desired, needed, present, serving, ordered, drained, reason
        FROM scaling_decisions WHERE deployment = $1 AND ($2::text IS NULL OR region = $2)
        ORDER BY at DESC LIMIT $3
    """
    LATEST = """
        SELECT DISTINCT ON (deployment, region) deployment, region, at, desired, needed, present, serving, ordered,
               drained, reason
        FROM scaling_decisions WHERE at > now() - make_interval(secs => $1) ORDER BY deployment, region, at DESC
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def record(self, deployment: str, plan: RegionPlan) -> None:
        """Write a decision down, unless it is the one before once more; and forget old ones."""
        await self._pool.execute(
            self.RECORD,
            deployment,
            plan.region,
            plan.desired,
            plan.needed,
            plan.present,
            plan.serving,
            len(plan.orders),
            len(plan.drains),
            plan.reason,
            float(REPEAT_S),
        )
        await self._pool.execute(self.PRUNE, MEMORY_DAYS)

    async def list_decisions(
        self, deployment: str, *, region: str | None = None, limit: int = 50
    ) -> list[ScalingDecision]:
        """The last decisions, newest first."""
        return [ScalingDecision(**row) for row in await self._pool.fetch(self.LIST, deployment, region, limit)]

    async def latest(self) -> list[ScalingDecision]:
        """The last decision about each region of each deployment that is still looked after."""
        return [ScalingDecision(**row) for row in await self._pool.fetch(self.LATEST, 3.0 * REPEAT_S)]
